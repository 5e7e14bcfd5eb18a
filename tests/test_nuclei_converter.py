"""The converter of nuclei, read back as pycocotools and the configs do."""

import contextlib
import hashlib
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from test_shapes import contents, load

TOOL = ROOT / 'tools' / 'dataset_converters' / 'nuclei.py'
nuclei = load(TOOL)


# Ids of images that are for training and for validation by default
TRAIN, VAL = 'a', 'd'


def image_id(n):
    """Like Kaggle's."""
    return hashlib.sha256(f'image {n}'.encode()).hexdigest()


def write(src, name, picture, masks):
    """Add an image to a folder in Kaggle's layout; RGBA, as Kaggle's are."""
    (src / name / 'images').mkdir(parents=True)
    (src / name / 'masks').mkdir()
    rgba = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
    Image.fromarray(rgba).save(src / name / 'images' / f'{name}.png')
    for n, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(
            src / name / 'masks' / f'{n:04d}.png'
        )


def box(height, width, rows, columns):
    mask = np.zeros((height, width), bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def draw_image(n):
    """A noisy picture with ellipses that may touch, overlap or leave it."""
    rng = np.random.default_rng(n)
    height, width = rng.integers(70, 130, 2)
    picture = rng.integers(0, 60, (height, width, 3), np.uint8)
    masks = []
    for _ in range(12):
        mask = np.zeros((height, width), np.uint8)
        centre = tuple(rng.integers(0, (width, height)).tolist())
        axes = tuple(rng.integers(2, 12, 2).tolist())
        turn = int(rng.integers(180))
        cv2.ellipse(mask, centre, axes, turn, 0, 360, 1, -1)
        picture[mask > 0] += 120
        masks.append(mask > 0)
    return picture, masks


def real_images(root, most=6):
    """Pictures and masks of genuine images, a few of each size."""
    for split in ('train', 'val'):
        coco = COCO(str(root / 'annotations' / f'{split}.json'))
        sizes = {}
        for image in coco.loadImgs(sorted(coco.getImgIds())):
            key = image['height'], image['width']
            sizes.setdefault(key, []).append(image)
        for image in [i for same in sizes.values() for i in same[:2]][:most]:
            path = root / 'images' / split / image['file_name']
            masks = []
            for annotation in coco.imgToAnns[image['id']]:
                mask = np.zeros((image['height'], image['width']), np.uint8)
                # These polygons go through the centres of pixels.
                contours = [
                    np.reshape(polygon, (-1, 2))
                    for polygon in annotation['segmentation']
                ]
                cv2.fillPoly(mask, contours, 1)
                masks.append(mask > 0)
            yield np.asarray(Image.open(path)), masks


@pytest.fixture(scope='module', params=['drawn', 'real'])
def images(request):
    """dict: id -> picture (RGB), masks"""
    if request.param == 'drawn':
        pairs = map(draw_image, range(6))
    else:
        real_data = request.getfixturevalue('real_data')
        pairs = real_images(real_data / 'nuclei')
    return {image_id(n): pair for n, pair in enumerate(pairs)}


@pytest.fixture(scope='module')
def src(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('kaggle') / 'stage1_train'
    for name, (picture, masks) in images.items():
        write(folder, name, picture, masks)
    return folder


@pytest.fixture(scope='module')
def dst(src, tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'nuclei'
    nuclei.convert(src, folder, val_share=0.5)
    return folder


@pytest.fixture
def small(tmp_path):
    """Two images, one for each split: 3 and 2 nuclei of 48 pixels."""
    folder = tmp_path / 'stage1_train'
    for name, count in ((TRAIN, 3), (VAL, 2)):
        picture = np.full((40, 60, 3), 50 * count, np.uint8)
        masks = [
            box(40, 60, (10, 18), (x, x + 6)) for x in range(0, 8 * count, 8)
        ]
        write(folder, name, picture, masks)
    return folder


def read(path):
    return np.asarray(Image.open(path))


def each_image(dst):
    """Yield split, COCO, image, and its annotations."""
    for split in nuclei.SPLITS:
        coco = COCO(str(dst / 'annotations' / f'{split}.json'))
        assert coco.getImgIds()
        for image in coco.loadImgs(coco.getImgIds()):
            yield split, coco, image, coco.imgToAnns[image['id']]


# What is written


def test_layout(images, dst):
    """The folders that configs/nuclei name, and nothing else."""
    names = set()
    for split, _, image, _ in each_image(dst):
        for kind in ('images', 'semantic'):
            names.add(f'{kind}/{split}/{image["file_name"]}')
    assert len(names) == 2 * len(images)
    names |= {f'annotations/{split}.json' for split in nuclei.SPLITS}
    assert set(contents(dst)) == names
    for split in nuclei.SPLITS:
        coco = COCO(str(dst / 'annotations' / f'{split}.json'))
        (category,) = coco.loadCats(coco.getCatIds())
        assert category['name'] == 'nucleus'
        ids = [a['id'] for a in coco.dataset['annotations']]
        assert ids == list(range(1, len(ids) + 1))


def test_pictures_are_the_same_in_rgb(images, dst):
    for split, _, image, _ in each_image(dst):
        picture, _ = images[image['file_name'][:-4]]
        written = read(dst / 'images' / split / image['file_name'])
        assert (image['height'], image['width'], 3) == written.shape
        assert (written == picture).all()


def test_channels_and_transparent_pixels(tmp_path):
    """Red stays red, and alpha changes nothing."""
    src = tmp_path / 'src'
    for name in (TRAIN, VAL):
        write(src, name, np.zeros((40, 40, 3), np.uint8), [np.eye(40)])
        rgba = np.zeros((40, 40, 4), np.uint8)
        rgba[:20] = 200, 100, 50, 0
        Image.fromarray(rgba).save(src / name / 'images' / f'{name}.png')
    nuclei.convert(src, tmp_path / 'dst')
    written = read(tmp_path / 'dst' / 'images' / 'train' / f'{TRAIN}.png')
    assert written.shape == (40, 40, 3)
    assert (written[:20] == (200, 100, 50)).all()
    assert not written[20:].any()


def test_polygons_boxes_and_areas_are_those_of_the_masks(images, dst):
    total = 0
    for _, coco, image, annotations in each_image(dst):
        _, masks = images[image['file_name'][:-4]]
        assert len(annotations) == len(masks) > 0
        for annotation, mask in zip(annotations, masks):
            # Exact: none of these masks has holes.
            assert (coco.annToMask(annotation) == mask).all()
            y, x = np.nonzero(mask)
            assert annotation['bbox'] == [
                x.min(),
                y.min(),
                np.ptp(x) + 1,
                np.ptp(y) + 1,
            ]
            assert annotation['area'] == len(x)
            assert annotation['iscrowd'] == 0
            assert annotation['category_id'] == 1
            total += 1
    assert total > 50


def test_semantic_maps_are_the_unions(images, dst):
    for split, _, image, _ in each_image(dst):
        _, masks = images[image['file_name'][:-4]]
        semantic = read(dst / 'semantic' / split / image['file_name'])
        assert semantic.dtype == np.uint8
        assert (semantic == np.any(masks, axis=0)).all()


def test_outlines_of_any_mask():
    """One pixel, lines, diagonals, islands; holes are filled, and noticed."""
    rng = np.random.default_rng(0)
    with_holes = 0
    for _ in range(2000):
        height, width = rng.integers(1, 12, 2).tolist()
        mask = rng.random((height, width)) < rng.uniform(0.1, 0.95)
        mask.flat[rng.integers(mask.size)] = True  # not empty
        polygons, holes = nuclei.outline(mask)
        for polygon in polygons:  # one step across, one down, and so on
            steps = polygon - np.roll(polygon, 1, axis=0)
            assert len(steps) >= 4
            assert ((steps != 0).sum(axis=1) == 1).all()
        rle = coco_mask.frPyObjects(
            [p.ravel().tolist() for p in polygons], height, width
        )
        drawn = coco_mask.decode(coco_mask.merge(rle))
        # A hole is what a walk over background, not diagonally, from
        # outside cannot reach.
        padded = np.pad(mask, 1).astype(np.uint8)
        cv2.floodFill(padded, None, (0, 0), 2, flags=4)
        filled = padded[1:-1, 1:-1] != 2
        assert (drawn == filled).all()
        assert holes == (filled != mask).any()
        with_holes += holes
    assert 200 < with_holes < 1800


def test_equal_bytes(src, dst, tmp_path):
    nuclei.convert(src, tmp_path / 'other', val_share=0.5)
    assert contents(tmp_path / 'other') == contents(dst)


# Larger images


def test_boxes_are_scaled(tmp_path):
    """By half: 200x120 pixels with max_side 100."""
    src = tmp_path / 'src'
    mask = box(120, 200, (30, 50), (80, 112))
    picture = np.dstack([mask * np.uint8(200)] * 3)
    for name in (TRAIN, VAL):
        write(src, name, picture, [mask])
    _, remarks = nuclei.convert(src, tmp_path / 'dst', max_side=100)
    assert remarks['scaled'] == 2
    for split, coco, image, (annotation,) in each_image(tmp_path / 'dst'):
        assert (image['width'], image['height']) == (100, 60)
        assert annotation['bbox'] == [40, 15, 16, 10]
        assert annotation['area'] == 160
        expected = box(60, 100, (15, 25), (40, 56))
        assert (coco.annToMask(annotation) == expected).all()
        name = image['file_name']
        semantic = read(tmp_path / 'dst' / 'semantic' / split / name)
        assert (semantic == expected).all()
        picture = read(tmp_path / 'dst' / 'images' / split / name)
        assert (picture == expected[..., None] * 200).all()


def test_scaled_masks_fit_the_originals(images, src, tmp_path):
    """Upsampled again, they are where they were."""
    _, remarks = nuclei.convert(
        src, tmp_path / 'dst', max_side=64, val_share=0.5
    )
    assert remarks['scaled'] == len(images)
    for split, _, image, annotations in each_image(tmp_path / 'dst'):
        picture, masks = images[image['file_name'][:-4]]
        height, width = picture.shape[:2]
        assert max(image['width'], image['height']) == 64
        assert image['width'] == pytest.approx(
            width * 64 / max(height, width), abs=0.5
        )
        semantic = read(
            tmp_path / 'dst' / 'semantic' / split / image['file_name']
        )
        assert semantic.shape == (image['height'], image['width'])
        area = np.any(masks, axis=0).sum() * semantic.size / (height * width)
        assert semantic.sum() == pytest.approx(area, rel=0.25, abs=20)
        # the largest nucleus, whose place in the list scaling may change
        mask = max(masks, key=np.sum)
        factor = image['width'] / width
        best = max(annotations, key=lambda a: a['area'])
        assert best['area'] == pytest.approx(
            mask.sum() * factor**2, rel=0.3, abs=4
        )


def test_neighbours_that_share_no_pixel_still_share_none(tmp_path):
    """Their border is in the middle of a pixel of the smaller map."""
    src = tmp_path / 'src'
    masks = [box(64, 64, (0, 64), (0, 33)), box(64, 64, (0, 64), (33, 64))]
    for name in (TRAIN, VAL):
        write(src, name, np.zeros((64, 64, 3), np.uint8), masks)
    coco, remarks = nuclei.convert(src, tmp_path / 'dst', max_side=32)
    assert remarks['shared'] == 0
    areas = [a['area'] for a in coco['train']['annotations']]
    assert areas == [32 * 16, 32 * 15]


def test_larger_images_can_be_left_out(small, tmp_path):
    name = image_id(1)
    write(small, name, np.zeros((40, 61, 3), np.uint8), [np.eye(40, 61)])
    coco, remarks = nuclei.convert(
        small, tmp_path / 'dst', max_side=60, skip_larger=True
    )
    assert remarks == dict(larger=1, bare=0, shared=0, holes=0)
    assert {i['file_name'] for s in coco.values() for i in s['images']} == {
        f'{TRAIN}.png',
        f'{VAL}.png',
    }
    assert not list((tmp_path / 'dst').rglob(f'{name}.png'))


# The split


def test_split_is_by_sha256_of_the_id():
    """sha256('a') begins with ca97, and 0xca97 / 0x10000 is 0.7914."""
    assert not nuclei.in_val('a', 0.79)
    assert nuclei.in_val('a', 0.792)
    # sha256('b') begins with 3e23: 0.2427
    assert not nuclei.in_val('b', 0.24)
    assert nuclei.in_val('b', 0.243)


def test_share_for_validation():
    small, large = (
        {n for n in range(10000) if nuclei.in_val(image_id(n), share)}
        for share in (0.24, 0.3)
    )
    # the standard deviation is 43
    assert 2400 - 150 < len(small) < 2400 + 150
    assert small < large


def test_other_images_do_not_move_an_image(small, tmp_path):
    coco, _ = nuclei.convert(small, tmp_path / 'few')
    before = {
        image['file_name']: split
        for split in coco
        for image in coco[split]['images']
    }
    assert sorted(before.values()) == ['train', 'val']
    for n in range(28):
        picture = np.zeros((40, 40, 3), np.uint8)
        write(small, image_id(n), picture, [np.eye(40)])
    coco, _ = nuclei.convert(small, tmp_path / 'many')
    after = {
        image['file_name']: split
        for split in coco
        for image in coco[split]['images']
    }
    assert len(after) == 30
    assert {name: after[name] for name in before} == before


def test_a_split_without_images(small, tmp_path):
    with pytest.raises(ValueError, match='no image is for val, .* are 2 to'):
        nuclei.convert(small, tmp_path / 'dst', val_share=1e-6)
    assert list(tmp_path.iterdir()) == [small]


# What is counted


def test_remarks(small, tmp_path):
    masks = small / TRAIN / 'masks'
    ring = box(40, 60, (20, 30), (0, 10))
    ring[24:26, 4:6] = False
    for name, mask in dict(
        empty=np.zeros((40, 60), bool),
        ring=ring,
        overlap=box(40, 60, (17, 20), (0, 6)),  # 6 pixels of the first
    ).items():
        Image.fromarray(mask).save(masks / f'{name}.png')
    coco, remarks = nuclei.convert(small, tmp_path / 'dst')
    assert remarks == dict(empty=1, holes=1, shared=6, bare=0)
    annotations = coco['train']['annotations']
    assert len(annotations) == 5
    # The area is that of the mask; its polygon fills the hole.
    assert [
        a['area'] for a in annotations if a['bbox'] == [0, 20, 10, 10]
    ] == [96]
    semantic = read(tmp_path / 'dst' / 'semantic' / 'train' / f'{TRAIN}.png')
    assert semantic.sum() == 3 * 48 + 96 + 12


def test_nuclei_that_vanish_when_scaled(small, tmp_path):
    """A pixel of 60x40 is 0.28 of one of 32x21."""
    one = box(40, 60, (30, 31), (30, 31))
    Image.fromarray(one).save(small / TRAIN / 'masks' / 'one.png')
    coco, remarks = nuclei.convert(small, tmp_path / 'dst', max_side=32)
    assert remarks['vanished'] == 1
    assert remarks['empty'] == 0
    assert len(coco['train']['annotations']) == 3


def test_an_image_without_a_nucleus_is_kept(small, tmp_path):
    for path in (small / TRAIN / 'masks').iterdir():
        Image.fromarray(np.zeros((40, 60), bool)).save(path)
    coco, remarks = nuclei.convert(small, tmp_path / 'dst')
    assert remarks['empty'] == 3
    assert remarks['bare'] == 1
    assert len(coco['train']['images']) == 1
    assert coco['train']['annotations'] == []


@pytest.mark.parametrize('mode', ['1', 'P', 'RGB', 'RGBA', 'LA'])
def test_any_kind_of_mask(small, tmp_path, mode):
    """Nucleus is what is not black; opaque black is background."""
    expected, _ = nuclei.convert(small, tmp_path / 'expected')
    for path in (small / TRAIN / 'masks').iterdir():
        Image.open(path).convert(mode).save(path)
    assert nuclei.convert(small, tmp_path / 'dst')[0] == expected


def test_masks_of_small_values(small, tmp_path):
    expected, _ = nuclei.convert(small, tmp_path / 'expected')
    for path in (small / TRAIN / 'masks').iterdir():
        Image.fromarray(read(path) // 255).save(path)
    assert nuclei.convert(small, tmp_path / 'dst')[0] == expected


def test_what_a_mac_adds_is_passed_over(small, tmp_path):
    expected, _ = nuclei.convert(small, tmp_path / 'expected')
    (small / '__MACOSX').mkdir()
    (small / '.cache').mkdir()
    (small / 'labels.csv').write_text('')
    (small / TRAIN / 'masks' / '._0000.png').write_text('')
    (small / TRAIN / 'masks' / '.DS_Store').write_text('')
    assert nuclei.convert(small, tmp_path / 'dst')[0] == expected


# What is refused, leaving nothing


def shorten(path):
    path.write_bytes(path.read_bytes()[:-30])


def damage(path):
    """Change a byte of the pixels that can be decompressed all the same."""
    before = read(path)
    data = path.read_bytes()
    start = data.index(b'IDAT') + 4
    end = data.index(b'IEND') - 8
    for position in range(start, end):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(OSError):
            if (read(path) != before).any():
                return
    raise AssertionError('no such byte')


def deepen(path):
    Image.fromarray(np.full((40, 60), 999, np.uint16)).save(path)


def shrink(path):
    Image.fromarray(np.ones((40, 59), bool)).save(path)


IMAGE = f'{TRAIN}/images/{TRAIN}.png'
MASK = f'{TRAIN}/masks/0001.png'


def replace(path):
    path.write_text('<html>')


def remove(path):
    path.rename(path.with_name('_'))


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        (IMAGE, shorten, f'cannot read .*{IMAGE}: .'),
        (MASK, shorten, f'cannot read .*{MASK}: .'),
        (MASK, damage, f'cannot read .*{MASK}: .'),
        (MASK, replace, f'cannot read .*{MASK}: it is no image'),
        (IMAGE, deepen, f'{IMAGE}: it has more than 8 bits a channel'),
        (MASK, deepen, f'{MASK}: it has more than 8 bits a channel'),
        (MASK, shrink, f'{MASK} is 59x40 pixels, its image is 60x40'),
        (IMAGE, remove, f'{IMAGE} is missing'),
        (f'{TRAIN}/images', remove, f'{IMAGE} is missing'),
        (f'{TRAIN}/masks', remove, rf'{TRAIN}/masks holds no \*\.png'),
    ],
)
def test_mistakes_in_the_source(small, tmp_path, name, change, message):
    change(small / name)
    with pytest.raises(ValueError, match=message) as error:
        nuclei.convert(small, tmp_path / 'dst')
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == [small]


def test_a_source_that_is_none(tmp_path):
    dst = tmp_path / 'deeper' / 'dst'
    with pytest.raises(ValueError, match='typo is not a folder'):
        nuclei.convert(tmp_path / 'typo', dst)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty holds no folders of images'):
        nuclei.convert(tmp_path / 'empty', dst)
    assert [path.name for path in tmp_path.iterdir()] == ['empty']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(max_side=31), 'max_side must be an integer of at least 32'),
        (dict(max_side=64.0), 'max_side must be .*, got 64.0'),
        (dict(val_share=0), 'val_share must be between 0 and 1, got 0'),
        (dict(val_share=1.0), 'val_share must be between 0 and 1, got 1.0'),
        (dict(val_share=float('nan')), 'val_share must be .*, got nan'),
    ],
    ids=str,
)
def test_bad_numbers(small, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        nuclei.convert(small, tmp_path / 'dst', **change)
    assert list(tmp_path.iterdir()) == [small]


def test_a_folder_that_holds_something_is_left_alone(small, tmp_path):
    dst = tmp_path / 'dst'
    dst.mkdir()
    (dst / 'mine.txt').write_text('mine')
    for target in (dst, dst / 'mine.txt'):
        with pytest.raises(FileExistsError, match='is not an empty folder'):
            nuclei.convert(small, target)
    assert contents(dst) == {'mine.txt': b'mine'}
    assert sorted(tmp_path.iterdir()) == [dst, small]


def test_an_empty_folder_is_filled(small, tmp_path):
    (tmp_path / 'dst').mkdir()
    nuclei.convert(small, tmp_path / 'dst')
    assert len(contents(tmp_path / 'dst')) == 2 * 2 + 2


def test_a_folder_inside_the_source(small):
    before = contents(small)
    with pytest.raises(ValueError, match='out is inside .*stage1_train'):
        nuclei.convert(small, small / 'out')
    assert contents(small) == before


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(small, tmp_path, monkeypatch, error):
    write_image = nuclei.write_image
    written = []

    def fail(path, image):
        write_image(path, image)
        written.append(path)
        if len(written) == 3:
            raise error

    monkeypatch.setattr(nuclei, 'write_image', fail)
    with pytest.raises(error):
        nuclei.convert(small, tmp_path / 'dst')
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == [small]


def test_the_command(small, tmp_path):
    mask = small / MASK
    Image.fromarray(np.zeros((40, 60), bool)).save(mask)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(TOOL), 'stage1_train', *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = run('data/nuclei', '--max-side', '50')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'data/nuclei: 1 images for train, with 2 nuclei',
        'data/nuclei: 1 images for val, with 2 nuclei',
        '2 images scaled down, with their masks',
        '1 masks left out, because no pixel is set',
    ]
    # reading as text makes each return a new line
    assert done.stderr.split() == '0/2 images 1/2 images 2/2 images'.split()
    mask.write_text('')
    wrong = run('data/other')
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1] == (
        f'error: cannot read stage1_train/{MASK}: it is no image'
    )
    assert 'Traceback' not in wrong.stderr
    assert [p.name for p in (tmp_path / 'data').iterdir()] == ['nuclei']


# The configs


def load_sample(config, root, split, index):
    """The data set of a config, and one sample of it after its pipeline."""
    from mmengine.config import Config
    from mmengine.registry import DATASETS

    cfg = Config.fromfile(ROOT / 'configs' / 'nuclei' / config)
    settings = cfg[f'{split}_dataloader'].dataset
    settings.data_root = str(root)
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as datasets:
        dataset = datasets.build(settings)
        return dataset, dataset[index]


@pytest.mark.parametrize('split', nuclei.SPLITS)
def test_the_segmentors_config_reads_it(dst, split):
    pytest.importorskip('mmseg')
    names = sorted(p.name for p in (dst / 'images' / split).iterdir())
    dataset, sample = load_sample(
        'upernet-carafe_r18_nuclei.py', dst, split, len(names) - 1
    )
    assert len(dataset) == len(names)
    labels = sample['data_samples'].gt_sem_seg.data[0].numpy()
    assert labels.shape == tuple(sample['inputs'].shape[1:])
    if split == 'val':  # not cropped
        expected = read(dst / 'semantic' / split / names[-1])
        assert (labels == expected).all()
        picture = read(dst / 'images' / split / names[-1])
        given = sample['inputs'].numpy()[::-1].transpose(1, 2, 0)  # BGR
        assert (given == picture).all()
    assert set(np.unique(labels)) <= {0, 1}


@pytest.mark.parametrize('split', nuclei.SPLITS)
def test_the_detectors_config_reads_it(dst, split):
    pytest.importorskip('mmdet')
    dataset, sample = load_sample(
        'faster-rcnn_r18_fpn-carafe_nuclei.py', dst, split, 0
    )
    coco = json.loads((dst / 'annotations' / f'{split}.json').read_text())
    assert len(dataset) == len(coco['images'])
    assert dataset.metainfo['classes'] == ('nucleus',)
    boxes = sample['data_samples'].gt_instances.bboxes.tensor.numpy()
    assert len(boxes)
    if split == 'val':
        x, y, w, h = np.transpose(
            [a['bbox'] for a in coco['annotations'] if a['image_id'] == 1]
        )
        assert (boxes == np.transpose([x, y, x + w, y + h])).all()
