"""Draw a small detection and segmentation data set of plain shapes.

One folder serves both kinds of model: the pictures are stored once, in
ADE20K's layout with its semantic maps, and COCO json files beside the maps::

    data/shapes/
      images/training/00000.jpg          images/validation/...
      annotations/training/00000.png     annotations/validation/...
      annotations/instances_training.json
      annotations/instances_validation.json

A semantic map holds 0 for background and ``1 + CLASSES.index(name)``, which
is also the COCO category id; background is a class like any other here, so
the maps are read with ``reduce_zero_label=False``.

Usage::

    python tools/dataset_converters/shapes.py data/shapes
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from pycocotools import mask as coco_mask

CONFIG = Path(__file__).parents[2] / 'configs/_base_/datasets/shapes.py'
CLASSES = Config.fromfile(CONFIG).shapes.classes
SPLITS = ('training', 'validation')

OVERSAMPLING = 4  # drawn this much larger, then averaged: smooth edges
MIN_SIZE, MAX_SIZE = 0.08, 0.5  # of an object, in picture widths
MIN_VISIBLE = 0.5  # share of an object that the ones in front may not hide
MIN_CONTRAST = 60  # between object and background, in grey levels of 255
USUAL_COLOUR = 0.75  # share of objects in a colour that their class prefers


def outline(name, rng):
    """Contours of a shape, largest radius 1; a second contour is a hole.

    Returns:
        list[ndarray[P, 2]]: polygons around the origin.
    """

    def polygon(corners, radii=1.0):
        angle = np.arange(corners) * 2 * math.pi / corners
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return unit * np.resize(radii, (corners, 1))

    if name == 'disk':
        return [polygon(64)]
    if name == 'ring':
        return [polygon(64), polygon(64, rng.uniform(0.5, 0.85))]
    if name == 'triangle':
        return [polygon(3)]
    if name == 'square':
        return [polygon(4)]
    if name == 'star':
        return [polygon(10, [1, rng.uniform(0.3, 0.45)])]
    half = rng.uniform(0.1, 0.17)
    return [np.array([[-1, -half], [1, -half], [1, half], [-1, half]])]


def draw(contours, size):
    """Share of every pixel that the contours cover.

    Args:
        contours (list[ndarray[P, 2]]): x, y in pixels.
        size (int): width and height of the canvas, in pixels.

    Returns:
        ndarray[size, size, 1]: float32 in [0, 1].
    """
    # fillPoly counts from pixel centres (hence the half) and takes integers,
    # here in sixteenths of a pixel.
    fixed = [
        np.rint((c * OVERSAMPLING - 0.5) * 16).astype(np.int32)
        for c in contours
    ]
    canvas = np.zeros((size * OVERSAMPLING,) * 2, np.uint8)
    cv2.fillPoly(canvas, fixed, 255, shift=4)
    cover = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return cover[..., None] / np.float32(255)


def texture(colour, size, rng):
    """Blotches and stripes around a colour, float32 ndarray[size, size, 3]."""
    cells = rng.integers(2, 9)
    blotches = rng.normal(0, 14, (cells, cells, 3)).astype(np.float32)
    blotches = cv2.resize(
        blotches, (size, size), interpolation=cv2.INTER_CUBIC
    )
    x, y = np.ogrid[:size, :size]
    pace = rng.uniform(-0.5, 0.5, 2)  # radians a pixel
    stripes = rng.uniform(0, 14) * np.sin(pace[0] * x + pace[1] * y)
    return blotches + (stripes[..., None] + colour).astype(np.float32)


def choose_colour(label, rng):
    """A BGR colour: mostly of the class's hue, as real things have, or any."""
    if rng.random() >= USUAL_COLOUR:
        return rng.uniform(0, 255, 3)
    # OpenCV's hues go to 180. Each class has half of its sixth of the circle.
    hue = (label + rng.uniform(-0.25, 0.25)) * 180 / len(CLASSES) % 180
    hsv = np.uint8([[[hue, rng.uniform(120, 255), rng.uniform(120, 255)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float)


def make_image(size, rng):
    """Draw one picture.

    Objects are placed front to back, so each one is known to stay visible
    when it is placed, and nothing hidden is ever drawn or labelled.

    Args:
        size (int): width and height, in pixels.
        rng (numpy.random.Generator): the only source of chance.

    Returns:
        tuple: the picture (uint8, ``[size, size, 3]``), the class index of
        every object, and the map of objects (``[size, size]``: 0 background,
        n for the n-th object).
    """
    ground = rng.uniform(30, 225, 3)
    picture = np.zeros((size, size, 3), np.float32)
    light = np.ones((size, size, 1), np.float32)  # share not yet covered
    objects = np.zeros((size, size), np.uint8)
    labels = []
    for _ in range(rng.integers(4, 15)):
        label = int(rng.integers(len(CLASSES)))
        # Logarithmic: as many from 20 to 40 pixels as from 40 to 80.
        span = size * math.exp(
            rng.uniform(math.log(MIN_SIZE), math.log(MAX_SIZE))
        )
        if CLASSES[label] == 'stick':  # shorter ones are too thin to see
            span = max(span, 2 * MIN_SIZE * size)
        side = math.ceil(span) + 1
        left, top = rng.integers(0, size - side, 2)
        window = np.s_[top : top + side, left : left + side]
        turn = rng.uniform(0, 2 * math.pi)
        rotation = np.array(
            [
                [math.cos(turn), math.sin(turn)],
                [-math.sin(turn), math.cos(turn)],
            ]
        )
        cover = draw(
            [
                c @ rotation * (span / 2) + side / 2
                for c in outline(CLASSES[label], rng)
            ],
            side,
        )
        colour = choose_colour(label, rng)
        while np.abs(colour - ground).max() < MIN_CONTRAST:
            colour = choose_colour(label, rng)

        whole = cover[..., 0] >= 0.5
        visible = whole & (objects[window] == 0)
        if visible.sum() < MIN_VISIBLE * whole.sum():
            continue
        labels.append(label)
        objects[window][visible] = len(labels)
        picture[window] += light[window] * cover * texture(colour, side, rng)
        light[window] *= 1 - cover
    picture += light * texture(ground, size, rng)
    noise = rng.standard_normal(picture.shape, np.float32)
    picture += noise * np.float32(rng.uniform(2, 12))
    return picture.clip(0, 255).astype(np.uint8), labels, objects


def make_split(root, split, num_images, size, seed):
    """Write the pictures, semantic maps and COCO json of one split."""
    images = root / 'images' / split
    maps = root / 'annotations' / split
    images.mkdir(parents=True)
    maps.mkdir(parents=True)
    coco = dict(
        info=describe(num_images, size, seed),
        images=[],
        annotations=[],
        categories=[
            dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)
        ],
    )
    said = time.monotonic()
    for index in range(num_images):
        if time.monotonic() - said > 5:
            print(f'{split}: {index} of {num_images} images', flush=True)
            said = time.monotonic()
        # Seeded one by one, so that a larger set begins with the same images.
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        picture, labels, objects = make_image(size, rng)
        name = f'{index:05d}'
        write_image(images / f'{name}.jpg', picture)
        lookup = np.array([0] + [label + 1 for label in labels], np.uint8)
        write_image(maps / f'{name}.png', lookup[objects])
        coco['images'].append(
            dict(id=index, file_name=f'{name}.jpg', width=size, height=size)
        )
        for n, label in enumerate(labels, start=1):
            # Run lengths, not polygons: rings have holes.
            rle = coco_mask.encode(np.asfortranarray(objects == n))
            coco['annotations'].append(
                dict(
                    id=len(coco['annotations']) + 1,
                    image_id=index,
                    category_id=label + 1,
                    bbox=coco_mask.toBbox(rle).tolist(),
                    area=int(coco_mask.area(rle)),
                    iscrowd=0,
                    segmentation=dict(
                        size=rle['size'], counts=rle['counts'].decode()
                    ),
                )
            )
    annotation_file(root, split).write_text(json.dumps(coco))


def write_image(path, image):
    if not cv2.imwrite(str(path), image):
        raise OSError(f'could not write {path}')


def annotation_file(root, split):
    return root / 'annotations' / f'instances_{split}.json'


def describe(num_images, size, seed):
    """What a split was made from, kept in its json as ``info``."""
    return dict(
        description='mmcarafe shapes',
        num_images=num_images,
        size=size,
        seed=seed,
    )


def is_complete(root, split, num_images, size, seed):
    """Whether the split is there, whole, and made from these numbers."""
    path = annotation_file(root, split)
    if not path.is_file():
        return False
    try:
        info = json.loads(path.read_text())['info']
    except (ValueError, TypeError, KeyError):
        return False
    names = [f'{index:05d}' for index in range(num_images)]
    return info == describe(num_images, size, seed) and all(
        (root / 'images' / split / f'{name}.jpg').is_file()
        and (root / 'annotations' / split / f'{name}.png').is_file()
        for name in names
    )


def make_shapes(root, train=1200, val=100, size=320, seed=0):
    """Write the data set, unless it is there already.

    It is written beside ``root`` and then renamed, so ``root`` is either
    absent or whole, whatever interrupts the writing.

    Args:
        root (str | Path): folder to write.
        train (int): number of training images.
        val (int): number of validation images.
        size (int): width and height of an image, in pixels.
        seed (int): equal seeds give equal files.

    Returns:
        bool: False if the same data set was there already.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: ``root`` holds something else; it is left alone.
    """
    for name, value, least in (
        ('train', train, 1),
        ('val', val, 1),
        ('size', size, 64),
        ('seed', seed, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f'{name} must be an integer of at least {least}, got {value!r}'
            )
    root = Path(root)
    wanted = list(zip(SPLITS, (train, val)))
    if root.exists():
        if all(is_complete(root, s, n, size, seed) for s, n in wanted):
            return False
        raise FileExistsError(
            f'{root} exists, but is not the complete data set of train='
            f'{train}, val={val}, size={size}, seed={seed}; remove it or name '
            'another folder'
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(
        tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent)
    )
    try:
        unfinished.chmod(0o755)  # mkdtemp lets only its owner read
        for split, num_images in wanted:
            make_split(unfinished, split, num_images, size, seed)
        unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('root', type=Path, help='folder to write')
    parser.add_argument(
        '--train', type=int, default=1200, help='number of training images'
    )
    parser.add_argument(
        '--val', type=int, default=100, help='number of validation images'
    )
    parser.add_argument(
        '--size', type=int, default=320, help='width and height, in pixels'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='equal seeds give equal files'
    )
    args = parser.parse_args()
    try:
        written = make_shapes(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from None
    print(
        f'{args.root}: {args.train} training and {args.val} validation '
        f'images, {"written" if written else "there already"}'
    )


if __name__ == '__main__':
    main()
