"""Convert stage 1 of the Data Science Bowl 2018 for configs/nuclei.

It is the set of Kaggle's competition, also BBBC038 of the Broad Bioimage
Benchmark Collection (CC0). stage1_train.zip unpacks to one folder an image,
with a mask for each nucleus::

    stage1_train/
      ID/images/ID.png
      ID/masks/*.png

and is written, with one class, as pictures, COCO json and semantic maps
(0 background, 1 nucleus)::

    data/nuclei/
      images/train/ID.png       images/val/...
      annotations/train.json    annotations/val.json
      semantic/train/ID.png     semantic/val/...

Whether an image is for training or validation depends on its id alone.

Usage::

    python tools/dataset_converters/nuclei.py stage1_train data/nuclei
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

SPLITS = ('train', 'val')
# What is counted on the way, in the order in which it is printed.
REMARKS = dict(
    scaled='images scaled down, with their masks',
    larger='larger images left out',
    bare='images without a nucleus kept',
    empty='masks left out, because no pixel is set',
    vanished='masks left out, because nothing remains of them when scaled',
    holes='masks with holes, which their polygons fill',
    shared='pixels that belong to several nuclei',
)


def in_val(image_id, share):
    """Whether an image is for validation, from nothing but its id.

    Images that are added or taken away do not move the others, and a larger
    share only adds to the images of a smaller one.
    """
    digest = hashlib.sha256(image_id.encode()).digest()
    return int.from_bytes(digest[:8], 'big') < share * 2**64


def find_images(src):
    """The ids and masks of all images, without opening any file.

    Returns:
        dict[str, list[Path]]: image id -> its masks, both in order.

    Raises:
        ValueError: a folder or an image is not where it should be.
    """
    if not src.is_dir():
        raise ValueError(f'{src} is not a folder')
    # Zip files made on a Mac add __MACOSX, and hidden files everywhere.
    folders = sorted(
        path for path in src.iterdir() if path.is_dir() and visible(path)
    )
    masks = {}
    for folder in folders:
        image = image_file(src, folder.name)
        if not image.is_file():
            raise ValueError(f'{image} is missing')
        masks[folder.name] = sorted(
            filter(visible, (folder / 'masks').glob('*.png'))
        )
        # All images of stage1_train have nuclei. Without this check, those
        # of stage1_test or of an unfinished copy would teach background.
        if not masks[folder.name]:
            raise ValueError(f'{folder / "masks"} holds no *.png')
    if not masks:
        raise ValueError(f'{src} holds no folders of images')
    return masks


def visible(path):
    return not path.name.startswith(('.', '__MACOSX'))


def image_file(src, image_id):
    return src / image_id / 'images' / f'{image_id}.png'


def read(path, mode):
    """An image of 8 bits, as an array in Pillow's mode; alpha is dropped.

    Pillow and not OpenCV, which returns what it has of a damaged file or
    prints lines of its own, depending on the version.
    """
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums, which reading passes over
        with Image.open(path) as image:
            if image.mode.startswith(('I', 'F')):
                raise ValueError('it has more than 8 bits a channel')
            return np.asarray(image.convert(mode))
    except UnidentifiedImageError:
        raise ValueError(f'cannot read {path}: it is no image') from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f'cannot read {path}: {error}') from None


def read_masks(paths, shape):
    """Masks, one at a time: bool ndarray[H, W], any value but 0 is nucleus."""
    for path in paths:
        mask = read(path, 'L') > 0
        if mask.shape != shape:
            (height, width), (h, w) = shape, mask.shape
            raise ValueError(
                f'{path} is {w}x{h} pixels, its image is {width}x{height}'
            )
        yield mask


def scaled_size(shape, max_side):
    """Width and height of at most max_side, in the same proportion."""
    scale = max_side / max(shape)
    return tuple(max(1, round(side * scale)) for side in shape[::-1])


def scale_mask(mask, size):
    """The pixels more than half of whose area is in the mask.

    More than half, so that nuclei that share no pixel still share none.
    """
    cover = cv2.resize(
        mask.astype(np.float32), size, interpolation=cv2.INTER_AREA
    )
    return cover > 0.5


def outline(mask):
    """Polygons along the edges of the pixels, and whether there are holes.

    COCO's coordinates count from the corner of a pixel, but findContours
    visits centres: read as COCO's, its contours lose a row and a column, a
    tenth of a common nucleus, and all of a thin one. On a mask of twice the
    size, a centre tells by being even or odd on which side of its pixel it
    is, and so which edge it stands for.

    Args:
        mask (bool ndarray[H, W]): not empty.

    Returns:
        tuple[list[ndarray[P, 2]], bool]: x, y of the corners of each polygon;
        together they cover the mask exactly, holes filled.
    """
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(
        doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    )
    polygons = []
    for contour, (*_, parent) in zip(contours, hierarchy[0]):
        if parent >= 0:  # it goes round a hole
            continue
        corners = (contour[:, 0] + 1) // 2  # [P, 2]
        # An inner corner is visited on both of its sides.
        moved = (corners != np.roll(corners, 1, axis=0)).any(axis=1)
        polygons.append(corners[moved])
    return polygons, len(polygons) < len(contours)


def annotate(mask, remarks):
    """A COCO annotation, without the ids."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    # The window saves searching the whole image for each nucleus.
    polygons, holes = outline(mask[top : top + height, left : left + width])
    remarks['holes'] += holes
    return dict(
        category_id=1,
        bbox=[left, top, width, height],
        area=int(mask.sum()),
        iscrowd=0,
        segmentation=[
            (corners + (left, top)).ravel().tolist() for corners in polygons
        ],
    )


def convert_image(image, masks, max_side, skip_larger, remarks):
    """Read an image and its masks.

    Returns:
        tuple | None: the picture (uint8, ``[H, W, 3]``, RGB), the semantic
        map (uint8, ``[H, W]``) and the annotations; None if it is left out.
    """
    picture = read(image, 'RGB')
    shape = picture.shape[:2]
    size = None
    if max(shape) > max_side:
        if skip_larger:
            remarks['larger'] += 1
            return None
        remarks['scaled'] += 1
        size = scaled_size(shape, max_side)
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    covered = np.zeros(picture.shape[:2], np.uint16)
    annotations = []
    for mask in read_masks(masks, shape):
        if not mask.any():
            remarks['empty'] += 1
            continue
        if size:
            mask = scale_mask(mask, size)
            if not mask.any():
                remarks['vanished'] += 1
                continue
        annotations.append(annotate(mask, remarks))
        covered += mask
    remarks['bare'] += not annotations
    remarks['shared'] += int((covered > 1).sum())
    return picture, (covered > 0).astype(np.uint8), annotations


def write_image(path, image):
    if not cv2.imwrite(str(path), image):
        raise OSError(f'could not write {path}')


def progress(done, total):
    print(f'\r{done}/{total} images', end='', file=sys.stderr, flush=True)


def write_all(root, src, masks, max_side, val_share, skip_larger):
    """Write the data set, image by image.

    Returns:
        tuple[dict, Counter]: the COCO json of each split, and the remarks.
    """
    remarks = Counter()
    coco = {}
    for split in SPLITS:
        (root / 'images' / split).mkdir(parents=True)
        (root / 'semantic' / split).mkdir(parents=True)
        coco[split] = dict(
            info=dict(
                description='nuclei of the Data Science Bowl 2018, stage 1',
                max_side=max_side,
                val_share=val_share,
                skip_larger=skip_larger,
            ),
            licenses=[dict(id=1, name='CC0 1.0')],
            categories=[dict(id=1, name='nucleus')],
            images=[],
            annotations=[],
        )
    for done, image_id in enumerate(masks):
        progress(done, len(masks))
        converted = convert_image(
            image_file(src, image_id),
            masks[image_id],
            max_side,
            skip_larger,
            remarks,
        )
        if converted is None:
            continue
        picture, semantic, annotations = converted
        split = SPLITS[in_val(image_id, val_share)]
        name = f'{image_id}.png'
        write_image(root / 'images' / split / name, picture[..., ::-1])
        write_image(root / 'semantic' / split / name, semantic)
        images = coco[split]['images']
        height, width = semantic.shape
        images.append(
            dict(
                id=len(images) + 1,
                file_name=name,
                width=width,
                height=height,
                license=1,
            )
        )
        for annotation in annotations:
            every = coco[split]['annotations']
            every.append(
                dict(id=len(every) + 1, image_id=len(images), **annotation)
            )
    progress(len(masks), len(masks))
    (root / 'annotations').mkdir()
    for split in SPLITS:
        if not coco[split]['images']:
            raise ValueError(
                f'no image is for {split}, with val_share {val_share}; there '
                f'are {len(masks) - remarks["larger"]} to divide'
            )
        path = root / 'annotations' / f'{split}.json'
        path.write_text(json.dumps(coco[split]))
    return coco, remarks


def convert(src, dst, max_side=400, val_share=0.24, skip_larger=False):
    """Write the data set.

    It is written beside ``dst`` and then renamed, so ``dst`` is either as it
    was or whole, whatever interrupts the writing.

    Args:
        src (str | Path): the folder stage1_train.
        dst (str | Path): folder to write, absent or empty.
        max_side (int): larger images are scaled down to it, in pixels.
        val_share (float): share of the images that is for validation.
        skip_larger (bool): leave larger images out instead.

    Returns:
        tuple[dict, Counter]: the COCO json of each split, and how often each
        of ``REMARKS`` applies.

    Raises:
        ValueError: an argument is out of range, or a file of ``src`` is
            missing or wrong.
        FileExistsError: ``dst`` holds something; it is left alone.
    """
    if not isinstance(max_side, int) or max_side < 32:
        raise ValueError(
            f'max_side must be an integer of at least 32, got {max_side!r}'
        )
    if not 0 < val_share < 1:
        raise ValueError(
            f'val_share must be between 0 and 1, got {val_share!r}'
        )
    src, target = Path(src), Path(dst).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f'{dst} exists and is not an empty folder; remove it or name '
            'another one'
        )
    if src.resolve() in (target, *target.parents):
        raise ValueError(f'{dst} is inside {src}, where it would be an image')
    masks = find_images(src)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(
        tempfile.mkdtemp(prefix=f'.{target.name}-', dir=target.parent)
    )
    try:
        unfinished.chmod(0o755)  # mkdtemp lets only its owner read
        result = write_all(
            unfinished, src, masks, max_side, val_share, skip_larger
        )
        unfinished.rename(target)
    finally:
        print(file=sys.stderr)  # ends the line of progress
        shutil.rmtree(unfinished, ignore_errors=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', type=Path, help='the folder stage1_train')
    parser.add_argument(
        'dst', type=Path, help='folder to write, absent or empty'
    )
    parser.add_argument(
        '--max-side',
        type=int,
        default=400,
        help='larger images are scaled down to it, in pixels (default 400)',
    )
    parser.add_argument(
        '--val-share',
        type=float,
        default=0.24,
        help='share of the images that is for validation (default 0.24)',
    )
    parser.add_argument(
        '--skip-larger',
        action='store_true',
        help='leave larger images out instead of scaling them',
    )
    args = parser.parse_args()
    try:
        coco, remarks = convert(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from None
    for split in SPLITS:
        print(
            f'{args.dst}: {len(coco[split]["images"])} images for {split}, '
            f'with {len(coco[split]["annotations"])} nuclei'
        )
    for key, text in REMARKS.items():
        if remarks[key]:
            print(f'{remarks[key]} {text}')


if __name__ == '__main__':
    main()
