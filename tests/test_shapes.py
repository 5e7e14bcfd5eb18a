"""The shapes data set, read back as the host projects read it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

TOOLS = Path(__file__).parents[1] / 'tools'
SHAPES = TOOLS / 'dataset_converters' / 'shapes.py'
SUMMARIZE = TOOLS / 'analysis' / 'summarize.py'
SMALL = dict(train=3, val=2, size=96, seed=7)


def load(path):
    """Import a script that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shapes = load(SHAPES)
summarize = load(SUMMARIZE).summarize


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The default size, with fewer images."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    assert shapes.make_shapes(root, train=60, val=5)
    return root


@pytest.fixture(scope='module')
def coco(data):
    return COCO(str(data / 'annotations' / 'instances_training.json'))


@pytest.fixture(scope='module')
def semantic_maps(data):
    """ndarray[images, size, size]"""
    paths = sorted((data / 'annotations' / 'training').iterdir())
    return np.stack(
        [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths]
    )


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file()
    }


# Drawing


def test_draw_covers_the_pixels_inside():
    corners = np.array([[2, 2], [6, 2], [6, 5], [2, 5]], float)
    inside = np.zeros((8, 8), bool)
    inside[2:5, 2:6] = True
    cover = shapes.draw([corners], 8)[..., 0]
    assert (cover[inside] == 1).all()
    # The outline itself is one pixel wide on the oversampled canvas.
    assert cover[~inside].max() < 1.01 / shapes.OVERSAMPLING


def test_a_ring_has_a_hole():
    outer, inner = shapes.outline('ring', np.random.default_rng(0))
    cover = shapes.draw([outer * 16 + 20, inner * 16 + 20], 40)[..., 0]
    assert cover[20, 20] == 0
    assert cover[20, 5] == 1


def test_objects_stand_out():
    """None has the colour of the background beside it."""
    contrasts = []
    for seed in range(40):
        picture, labels, objects = shapes.make_image(
            160, np.random.default_rng(seed)
        )
        for n in range(1, len(labels) + 1):
            whole = (objects == n).astype(np.uint8)
            beside = cv2.dilate(whole, np.ones((9, 9))) > 0
            beside &= objects == 0
            if beside.sum() > 20:
                inside = picture[objects == n].mean(axis=0)
                outside = picture[beside].mean(axis=0)
                contrasts.append(np.abs(inside - outside).max())
    assert len(contrasts) > 100
    assert min(contrasts) > shapes.MIN_CONTRAST - 25  # of the textures


# The same seed, the same files


def test_equal_seeds_give_equal_files(tmp_path):
    shapes.make_shapes(tmp_path / 'a', **SMALL)
    shapes.make_shapes(tmp_path / 'b', **SMALL)
    first = contents(tmp_path / 'a')
    assert len(first) == 2 * (3 + 2) + 2
    assert first == contents(tmp_path / 'b')


def test_another_seed_gives_other_pictures(tmp_path):
    shapes.make_shapes(tmp_path / 'a', **SMALL)
    shapes.make_shapes(tmp_path / 'b', **dict(SMALL, seed=8))
    name = 'images/training/00000.jpg'
    assert (tmp_path / 'a' / name).read_bytes() != (
        tmp_path / 'b' / name
    ).read_bytes()


def test_more_images_leave_the_first_as_they_are(tmp_path):
    shapes.make_shapes(tmp_path / 'a', **SMALL)
    shapes.make_shapes(tmp_path / 'b', **dict(SMALL, train=5))
    few, many = contents(tmp_path / 'a'), contents(tmp_path / 'b')
    assert all(
        many[name] == few[name] for name in few if not name.endswith('.json')
    )


def test_splits_share_no_picture(data):
    assert not set(contents(data / 'images' / 'training').values()) & set(
        contents(data / 'images' / 'validation').values()
    )


# The annotations


def test_every_class_and_size_occurs(coco):
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(
        shapes.CLASSES
    )
    annotations = coco.loadAnns(coco.getAnnIds())
    counts = np.bincount([a['category_id'] for a in annotations])[1:]
    assert counts.min() > 0.5 * counts.mean()
    areas = np.array([a['area'] for a in annotations])
    # COCO's limits of small, medium and large
    for low, high in ((0, 32**2), (32**2, 96**2), (96**2, np.inf)):
        assert ((low <= areas) & (areas < high)).sum() > 10
    # A box hides how thin some are: sticks and rings fill little of it.
    share = [a['area'] / (a['bbox'][2] * a['bbox'][3]) for a in annotations]
    assert min(share) < 0.2


def test_boxes_masks_and_areas_agree(data, coco):
    ids = coco.getImgIds()
    assert len(ids) == 60
    for image in coco.loadImgs(ids):
        picture = cv2.imread(
            str(data / 'images' / 'training' / image['file_name'])
        )
        assert picture.shape == (image['height'], image['width'], 3)
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert annotations
        masks = [coco.annToMask(a) for a in annotations]
        assert np.max(np.sum(masks, axis=0)) == 1  # only what is visible
        for annotation, mask in zip(annotations, masks):
            y, x = np.nonzero(mask)
            assert annotation['bbox'] == [
                x.min(),
                y.min(),
                np.ptp(x) + 1,
                np.ptp(y) + 1,
            ]
            assert annotation['area'] == len(x) > 0
            assert annotation['iscrowd'] == 0


def test_semantic_maps_agree_with_the_masks(coco, semantic_maps):
    for image_id, semantic_map in zip(coco.getImgIds(), semantic_maps):
        expected = np.zeros_like(semantic_map)
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            mask = coco.annToMask(annotation).astype(bool)
            expected[mask] = annotation['category_id']
        assert (semantic_map == expected).all()


def test_mostly_hidden_objects_are_left_out():
    """Whatever is labelled shows at least its promised share."""
    whole = {}
    draw = shapes.draw

    def remember(contours, size):
        cover = draw(contours, size)
        whole.setdefault('areas', []).append((cover >= 0.5).sum())
        return cover

    shapes.draw = remember
    try:
        for seed in range(20):
            whole.clear()
            _, labels, objects = shapes.make_image(
                320, np.random.default_rng(seed)
            )
            visible = np.bincount(objects.ravel())[1:].tolist()
            assert len(visible) == len(labels)
            # In drawing order, each labelled one fits one that was drawn.
            drawn = iter(whole['areas'])
            for area in visible:
                assert any(shapes.MIN_VISIBLE * a <= area <= a for a in drawn)
    finally:
        shapes.draw = draw


# The host projects' own readers


def test_coco_dataset_reads_it(data):
    datasets = pytest.importorskip('mmdet.datasets')
    dataset = datasets.CocoDataset(
        data_root=str(data),
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training/'),
        metainfo=dict(classes=shapes.CLASSES),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
    )
    assert len(dataset) == 60
    assert os.path.isfile(dataset[0]['img_path'])
    assert dataset[0]['instances'][0]['mask']['size'] == [320, 320]


def test_segmentation_dataset_reads_it(data, semantic_maps):
    datasets = pytest.importorskip('mmseg.datasets')
    dataset = datasets.BaseSegDataset(
        data_root=str(data),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        metainfo=dict(classes=('background', *shapes.CLASSES)),
        pipeline=[datasets.transforms.LoadAnnotations()],
    )
    assert len(dataset) == 60
    for index in (0, 59):
        assert (dataset[index]['gt_seg_map'] == semantic_maps[index]).all()


# What is refused, and what is left alone


@pytest.mark.parametrize(
    'name, value, least',
    [
        ('train', 0, 1),
        ('val', -1, 1),
        ('size', 63, 64),
        ('seed', -1, 0),
        ('train', 1.5, 1),
        ('seed', '0', 0),
    ],
)
def test_bad_numbers_are_refused(tmp_path, name, value, least):
    message = f'{name} must be an integer of at least {least}, got {value!r}'
    with pytest.raises(ValueError, match=message):
        shapes.make_shapes(tmp_path / 'a', **{**SMALL, name: value})
    assert not list(tmp_path.iterdir())


def test_a_complete_data_set_is_kept(tmp_path):
    root = tmp_path / 'shapes'
    assert shapes.make_shapes(root, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert not shapes.make_shapes(root, **SMALL)
    assert before == {
        path: path.stat().st_mtime_ns for path in root.rglob('*')
    }


@pytest.mark.parametrize(
    'lost',
    [
        'images/training/00002.jpg',
        'annotations/validation/00000.png',
        'annotations/instances_validation.json',
    ],
)
def test_a_half_data_set_is_not_complete(tmp_path, lost):
    root = tmp_path / 'shapes'
    shapes.make_shapes(root, **SMALL)
    (root / lost).unlink()
    before = contents(root)
    with pytest.raises(FileExistsError, match='is not the complete data set'):
        shapes.make_shapes(root, **SMALL)
    assert contents(root) == before


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"info": 1}'])
def test_a_broken_json_is_not_complete(tmp_path, text):
    root = tmp_path / 'shapes'
    shapes.make_shapes(root, **SMALL)
    (root / 'annotations' / 'instances_training.json').write_text(text)
    with pytest.raises(FileExistsError, match='is not the complete data set'):
        shapes.make_shapes(root, **SMALL)


@pytest.mark.parametrize(
    'change', [dict(seed=8), dict(train=2), dict(size=64)], ids=str
)
def test_other_numbers_are_another_data_set(tmp_path, change):
    root = tmp_path / 'shapes'
    shapes.make_shapes(root, **SMALL)
    with pytest.raises(FileExistsError, match='name another folder'):
        shapes.make_shapes(root, **{**SMALL, **change})


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    write_image = shapes.write_image

    def fail(path, image):
        if path.parts[-3:-1] == ('images', 'validation'):
            raise error
        write_image(path, image)

    monkeypatch.setattr(shapes, 'write_image', fail)
    with pytest.raises(error):
        shapes.make_shapes(tmp_path / 'shapes', **SMALL)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path):

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(SHAPES), 'shapes', '--val', '1', *arguments],
            cwd=str(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    few = ('--train', '2', '--size', '64')
    first, again, wrong = run(*few), run(*few), run('--train', '0')
    assert first.returncode == again.returncode == 0
    assert first.stdout.endswith('images, written\n')
    assert again.stdout.endswith('images, there already\n')
    assert wrong.returncode == 1
    assert (
        'error: train must be an integer of at least 1, got 0' in wrong.stdout
    )
    assert 'Traceback' not in wrong.stdout


# The line at the end of a run


@pytest.fixture
def work_dir(tmp_path):
    """What tools/train.py and tools/test.py leave."""
    files = {
        '20260101_000000/20260101_000000.log': '',
        '20260101_000000/vis_data/scalars.json': '{"loss": 1.0}',
        'epoch_3.pth': '',
        '20260101_000600/20260101_000600.log': '',
        '20260101_000600/20260101_000600.json': '{"coco/bbox_mAP": 0.5312}',
        '20260101_000600/pictures/00000.jpg': '',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_summary(work_dir):
    assert summarize(work_dir) == (
        f'box AP 0.531 · log {work_dir}/20260101_000000/20260101_000000.log · '
        f'checkpoint {work_dir}/epoch_3.pth · '
        f'pictures {work_dir}/20260101_000600/pictures'
    )


def test_summary_of_a_segmentor(work_dir):
    """mmseg counts in percent."""
    result = work_dir / '20260101_000600' / '20260101_000600.json'
    result.write_text(json.dumps({'aAcc': 93.1, 'mIoU': 71.25}))
    assert summarize(work_dir).startswith('mIoU 0.713 ·')


@pytest.mark.parametrize(
    'lost, message',
    [
        ('20260101_000000/vis_data/scalars.json', 'no training log'),
        ('20260101_000000/20260101_000000.log', 'no training log'),
        ('epoch_3.pth', 'no checkpoint'),
        ('20260101_000600/20260101_000600.json', 'no test result'),
        ('20260101_000600/pictures/00000.jpg', 'no pictures'),
    ],
)
def test_summary_says_what_is_missing(work_dir, lost, message):
    (work_dir / lost).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        summarize(work_dir)


def test_summary_without_a_known_score(work_dir):
    result = work_dir / '20260101_000600' / '20260101_000600.json'
    result.write_text('{"loss": 1.0}')
    with pytest.raises(ValueError, match='holds none of'):
        summarize(work_dir)


def test_summary_without_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        summarize(tmp_path / 'typo')
