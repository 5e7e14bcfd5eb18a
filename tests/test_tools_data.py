"""Which data the tools refuse, and when they say so."""

import copy
import json
import logging
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import transforms
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner
from PIL import ExifTags, Image
from test_tools import (
    SEGMENTOR,
    SHAPES,
    environment,
    execute,
    free_port,
    shapes_options,
)

UPERNET = 'configs/shapes/upernet-carafe_r18_shapes.py'
JSON = 'annotations/instances_training.json'
IMAGE = 'images/training/00003.jpg'
LABEL_MAP = 'annotations/training/00003.png'


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'drawn'
    size = ['--train', '8', '--val', '4', '--size', '96']
    execute('python', 'tools/dataset_converters/shapes.py', root, *size)
    return root


@pytest.fixture
def data(drawn, tmp_path):
    """A copy of the shapes for a test to damage."""
    return Path(shutil.copytree(drawn, tmp_path / 'shapes'))


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Run a tool that must refuse its config at once; return the message."""

    def call(tool, *words):
        work_dir = tmp_path / 'work'
        monkeypatch.chdir(ROOT)
        words = [
            str(w) for w in (words[0], '--work-dir', work_dir, *words[1:])
        ]
        monkeypatch.setattr(sys, 'argv', [tool, *words])
        with pytest.raises(SystemExit) as caught:
            import_module(tool).main()
        assert not work_dir.exists()  # nothing was written
        return message_of(caught)

    return call


def message_of(caught):
    message = caught.value.code
    assert isinstance(message, str)
    assert message.startswith('error: ') and '\n' not in message
    return message[len('error: ') :]


class Model(BaseModel):
    """Learns one number. The losses of its iterations may be given."""

    def __init__(self, losses=()):
        super().__init__()
        self.number = torch.nn.Parameter(torch.ones(()))
        self.losses = iter(losses)

    def forward(self, inputs, data_samples=None, mode='loss'):
        factor = next(self.losses, 1.0)
        return dict(loss_cls=self.number * factor, loss_bbox=self.number)


def make_runner(folder, dataset, scope, losses=(), iters=8, **loader):
    """A runner that has a data set of mmdet's or mmseg's, but that model."""
    train = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dataset,
    )
    return Runner(
        model=Model(losses),
        work_dir=str(folder / 'work'),
        train_dataloader={**train, **loader},
        train_cfg=dict(by_epoch=False, max_iters=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)
        ),
        default_scope=scope,
        experiment_name=str(folder).replace('/', '_'),
        cfg=Config(dict(model=dict(type='Model'))),
        log_level='WARNING',
    )


def read(folder, dataset, scope, **kwargs):
    """Train on a data set that must be refused; return the message."""
    runner = make_runner(folder, dataset, scope, **kwargs)
    with pytest.raises(SystemExit) as caught:
        with import_module('_data').guarded(runner, 'train'):
            runner.train()
    return message_of(caught)


def boxes(root, **kwargs):
    """The shapes as mmdet's data set."""
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs'),
    ]
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file=JSON,
        data_prefix=dict(img='images/training/'),
        metainfo=shape_classes(),
        pipeline=pipeline,
        **kwargs,
    )


def maps(root, background=('background',), **kwargs):
    """The shapes as mmseg's data set."""
    classes = shape_classes()['classes']
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ]
    return dict(
        type='BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        metainfo=dict(classes=(*background, *classes)),
        pipeline=kwargs.pop('pipeline', pipeline),
        **kwargs,
    )


def shape_classes():
    return Config.fromfile(ROOT / 'configs/_base_/datasets/shapes.py').shapes


# Classes


def test_classes_are_written_down_once():
    shapes = import_module('dataset_converters.shapes')
    detector = Config.fromfile(ROOT / SHAPES)
    segmentor = Config.fromfile(ROOT / UPERNET)
    names = detector.train_dataloader.dataset.metainfo.classes
    assert isinstance(names, tuple)
    assert names == shapes.CLASSES
    metainfo = segmentor.train_dataloader.dataset.metainfo
    assert metainfo.classes == ('background', *names)
    assert len(metainfo.palette) == 7
    nuclei = Config.fromfile(
        ROOT / 'configs/nuclei/upernet-carafe_r18_nuclei.py'
    )
    assert nuclei.val_dataloader.dataset.metainfo == dict(
        classes=('background', 'nucleus'), palette=[(0, 0, 0), (230, 25, 75)]
    )


SIX = '6 classes: disk, ring, triangle, square, star, stick'


@pytest.mark.parametrize(
    ('tool', 'split'), [('train', 'train'), ('test', 'test')]
)
def test_detector_of_another_number_of_classes(refused, data, tool, split):
    words = ['x.pth'] if tool == 'test' else []
    option = 'model.roi_head.bbox_head.num_classes=5'
    assert refused(tool, SHAPES, *words, *shapes_options(data, option)) == (
        'model.roi_head.bbox_head.num_classes is 5, but '
        f'{split}_dataloader.dataset has {SIX}'
    )


def test_validation_of_another_number_of_classes(refused, data):
    option = "val_dataloader.dataset.metainfo.classes=('disk',)"
    assert refused('train', SHAPES, *shapes_options(data, option)) == (
        'model.roi_head.bbox_head.num_classes is 6, but '
        'val_dataloader.dataset has 1 class: disk'
    )


@pytest.fixture
def segmentor(data, tmp_path):
    """A config with two auxiliary heads; more can be said at its end."""

    def write(more=''):
        config = tmp_path / 'segmentor.py'
        config.write_text(SEGMENTOR.format(root=str(data)) + more)
        return config

    return write


AUXILIARY = """
model['auxiliary_head'] = [
    dict(type='FCNHead', in_channels=256, in_index=2, num_classes=n)
    for n in (6, 7)]
"""
WRAPPED = """
model['decode_head']['num_classes'] = 7
train_dataloader['dataset'] = dict(
    type='RepeatDataset', times=2, dataset=train_dataloader['dataset'])
"""
BINARY = """
binary = dict(num_classes={count}, out_channels=1, threshold=0.3)
model['decode_head'].update(binary)
model['auxiliary_head'].update(binary)
shapes['metainfo'] = dict(classes=('no', 'yes'), palette=[[0] * 3] * 2)
train_dataloader['dataset']['metainfo'] = shapes['metainfo']
val_dataloader['dataset']['metainfo'] = shapes['metainfo']
load_from = 'none.pth'
"""


# mmseg's own warning, when one of its heads is built
@pytest.mark.filterwarnings('ignore::UserWarning:mmseg.models.*')
@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (
            AUXILIARY,
            'model.auxiliary_head.1.num_classes is 7, but '
            'train_dataloader.dataset has 6 classes: a, b, c, d, e, f',
        ),
        (
            WRAPPED,
            'model.decode_head.num_classes is 7, but '
            'train_dataloader.dataset.dataset has 6 classes: a, b, c, d, e, f',
        ),
        # One channel tells two classes apart: only the checkpoint is wrong.
        (BINARY.format(count=1), 'there is no checkpoint none.pth'),
        (BINARY.format(count=2), 'there is no checkpoint none.pth'),
        (
            BINARY.format(count=3),
            'model.decode_head.num_classes is 3, but '
            'train_dataloader.dataset has 2 classes: no, yes',
        ),
    ],
    ids=['list', 'wrapped', 'threshold', 'two-classes', 'three-classes'],
)
def test_segmentor_of_another_number_of_classes(
    refused, segmentor, more, message
):
    assert refused('train', segmentor(more)) == message


@pytest.mark.parametrize(
    'model',
    [
        dict(rpn_head=dict(num_classes=1)),
        dict(roi_head=dict(semantic_head=dict(num_classes=183))),
        dict(backbone=dict(num_classes=1000)),
        dict(language_model=dict(), bbox_head=dict(num_classes=256)),
        dict(tracker=dict(), detector=dict(bbox_head=dict(num_classes=1))),
        dict(auxiliary_head=[dict(type='STDCHead', num_classes=2)]),
    ],
    ids=str,
)
def test_heads_that_predict_something_else(model):
    assert not list(import_module('_data')._heads(model))


def test_panoptic_heads_predict_things():
    check = import_module('_data')._check_heads
    heads = {'model.roi_head.bbox_head': dict(num_classes=2)}
    classes = dict(classes=('cat', 'dog', 'sky'), thing_classes=('cat', 'dog'))
    check(heads, classes, 'data')
    with pytest.raises(SystemExit, match='num_classes is 2, but data has 3'):
        check(heads, dict(classes=classes['classes']), 'data')


def check(dataset, scope):
    """Check one data set as both tools do before they write."""
    cfg = dict(train_dataloader=dict(dataset=dataset), model={})
    cfg = Config(dict(default_scope=scope, **cfg))
    import_module('_data').check_data(cfg, 'train')


def test_a_transform_whose_library_is_missing(data, monkeypatch):
    monkeypatch.setattr(transforms, 'Compose', None)  # albumentations'
    dataset = boxes(data)
    dataset['pipeline'] = [dict(type='Albu', transforms=[])]
    with pytest.raises(SystemExit) as caught:
        check(dataset, 'mmdet')
    assert message_of(caught) == (
        'train_dataloader.dataset: RuntimeError: albumentations is not '
        'installed'
    )


def test_classes_as_a_string(refused, data):
    option = 'train_dataloader.dataset.metainfo.classes=disk'
    assert refused('train', SHAPES, *shapes_options(data, option)) == (
        'train_dataloader.dataset.metainfo.classes: expected a tuple of names '
        "or a file that lists them, got 'disk' (one class is ('disk',))"
    )


def test_classes_of_a_file(refused, data, tmp_path):
    (tmp_path / 'names.txt').write_text('disk\nring\n')
    option = f'train_dataloader.dataset.metainfo.classes={tmp_path}/names.txt'
    assert refused('train', SHAPES, *shapes_options(data, option)) == (
        'model.roi_head.bbox_head.num_classes is 6, but '
        'train_dataloader.dataset has 2 classes: disk, ring'
    )


@pytest.mark.parametrize(
    ('name', 'hint'),
    [('squares', ", did you mean 'square'?"), ('person', '.')],
)
def test_classes_that_the_json_does_not_have(data, tmp_path, name, hint):
    dataset = boxes(data)
    dataset['metainfo'] = dict(classes=('disk', name))
    assert read(tmp_path, dataset, 'mmdet') == (
        f'train_dataloader.dataset.metainfo.classes: {data}/{JSON} has no '
        f"category '{name}'{hint} It has 6 categories: disk, ring, triangle, "
        'square, star, stick'
    )


# Annotations


def edit(data, change):
    file = data / JSON
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def put(part, index, **values):
    return lambda content: content[part][index].update(values)


def drop(part, index, key):
    return lambda content: content[part][index].pop(key)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda content: content.pop('images'), " has no 'images'"),
        (lambda content: content.pop('annotations'), " has no 'annotations'"),
        (lambda content: content.pop('categories'), " has no 'categories'"),
        (
            drop('images', 3, 'file_name'),
            ": images[3] (id 3) has no 'file_name'",
        ),
        (drop('images', 3, 'id'), ": images[3] has no 'id'"),
        (
            drop('annotations', 2, 'bbox'),
            ": annotations[2] (id 3) has no 'bbox'",
        ),
        (
            drop('annotations', 2, 'area'),
            ": annotations[2] (id 3) has no 'area'",
        ),
        (
            drop('annotations', 2, 'image_id'),
            ": annotations[2] (id 3) has no 'image_id'",
        ),
        (
            drop('categories', 0, 'name'),
            ": categories[0] (id 1) has no 'name'",
        ),
        (
            lambda content: content['images'].insert(1, 'x.jpg'),
            ": images[1] is 'x.jpg', not an object",
        ),
        (
            put('annotations', 2, bbox=[1, float('nan'), 3, 4]),
            ': annotation 3 has the bbox [1, nan, 3, 4], expected four '
            'numbers of pixels: x, y, width, height',
        ),
        (
            put('annotations', 2, bbox=[1, 2, float('inf'), 4]),
            ': annotation 3 has the bbox [1, 2, inf, 4], expected four '
            'numbers of pixels: x, y, width, height',
        ),
        (
            put('annotations', 2, bbox=[1, 2, 3]),
            ': annotation 3 has the bbox [1, 2, 3], expected four '
            'numbers of pixels: x, y, width, height',
        ),
        (
            put('annotations', 2, area=float('nan')),
            ': annotation 3 has the area nan, expected a finite number',
        ),
    ],
)
def test_annotations_that_cannot_be_meant(data, tmp_path, change, message):
    edit(data, change)
    assert read(tmp_path, boxes(data), 'mmdet') == f'{data}/{JSON}{message}'


def test_damage_in_the_middle_of_a_json(data, tmp_path):
    file = data / JSON
    file.write_text(file.read_text().replace('"bbox":', '"bbox"', 1))
    message = read(tmp_path, boxes(data), 'mmdet')
    assert message.startswith(f'{file}: JSONDecodeError: Expecting')


@pytest.fixture
def warnings(monkeypatch):
    """What is written into the log as a warning."""
    lines = []
    monkeypatch.setattr(
        import_module('_data'),
        'print_log',
        lambda line, logger, level: lines.append((line, level)),
    )
    return lines


def load(folder, dataset, scope):
    """The data set, guarded."""
    runner = make_runner(folder, dataset, scope)
    with import_module('_data').guarded(runner, 'train'):
        return runner.train_loop.dataloader.dataset


def test_boxes_that_are_dropped_are_counted(data, tmp_path, warnings):
    changes = [
        put('annotations', 0, bbox=[10, 10, 0, 20]),
        put('annotations', 1, bbox=[10, 10, 20, 20], area=0),
        put('annotations', 2, bbox=[200, 10, 20, 20]),
        put('annotations', 3, bbox=[10, 10, -20, 20]),
        put('annotations', 4, bbox=[10, 10, 0.5, 20]),
        put('annotations', 5, image_id=99),
        put('annotations', 8, category_id=43),
        # ignored, so mmdet does not look at its box
        put('annotations', 6, ignore=True),
        drop('annotations', 6, 'bbox'),
        # partly inside: used
        put('annotations', 7, bbox=[-10, -10, 20, 20]),
    ]
    for change in changes:
        edit(data, change)
    total = len(json.loads((data / JSON).read_text())['annotations']) - 1
    dataset = load(tmp_path, boxes(data), 'mmdet')
    assert warnings == [
        (
            f'{data}/{JSON}: 7 of {total} boxes are dropped: 2 with no '
            'area, 1 outside its image, 1 with negative size, 1 thinner than '
            'a pixel, 1 on an image that is not listed, 1 of a category that '
            'is not listed',
            logging.WARNING,
        )
    ]
    # mmdet agrees
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert sum(len(info['instances']) for info in infos) == total - 7


def test_boxes_of_other_classes_are_not_counted(data, tmp_path, warnings):
    content = json.loads((data / JSON).read_text())
    disks = [a for a in content['annotations'] if a['category_id'] == 1]
    rings = [a for a in content['annotations'] if a['category_id'] == 2]
    for each in (disks[0], rings[0]):
        number = content['annotations'].index(each)
        edit(data, put('annotations', number, bbox=[1, 1, 5, -5]))
    dataset = boxes(data)
    dataset['metainfo'] = dict(classes=('disk',))
    load(tmp_path, dataset, 'mmdet')
    assert [line for line, _ in warnings] == [
        f'{data}/{JSON}: 1 of {len(disks)} boxes are dropped: 1 with '
        'negative size'
    ]


def test_sound_boxes_need_no_word(data, tmp_path, warnings):
    dataset = load(tmp_path, boxes(data), 'mmdet')
    assert len(dataset) == 8 and not warnings
    assert 'COCOAPI' not in vars(dataset)  # so that workers can be spawned


def test_compressed_masks(data):
    """Their counts are read as pycocotools reads them."""
    from pycocotools import mask

    rng = np.random.default_rng(0)
    image = dict(height=60, width=70)
    for share in (0, 0.01, 0.5, 0.99, 1):
        pixels = np.asfortranarray(rng.random((60, 70)) < share, np.uint8)
        rle = mask.encode(pixels)
        text = rle['counts'].decode()
        counts = import_module('_data')._decompress(text)
        again = mask.frPyObjects(dict(size=[60, 70], counts=counts), 60, 70)
        assert again == rle
        wrong = import_module('_data')._wrong_mask
        rle = dict(size=[60, 70], counts=text)
        assert wrong(dict(segmentation=rle), image) is None
        rle['counts'] += '1'
        found = wrong(dict(segmentation=rle), image)
        assert 'no whole numbers that add up to' in found


class Name(str):
    """Counts how often two are compared."""

    count = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Name.count += 1
        return str.__eq__(self, other)


def test_thousands_of_classes_are_compared_once_each(monkeypatch):
    """As LVIS and Objects365 have, with millions of boxes."""
    names = [f'class {index}' for index in range(1000)]
    content = dict(
        images=[dict(id=0, width=96, height=96)],
        categories=[dict(id=i, name=Name(n)) for i, n in enumerate(names)],
        annotations=[
            dict(id=i, image_id=0, category_id=i, bbox=[1, 1, 5, 5], area=25)
            for i in range(1000)
        ],
    )
    wanted = tuple(map(Name, names))
    monkeypatch.setattr(Name, 'count', 0)
    module = import_module('_data')
    module._check_names(wanted, content['categories'], 'x', 'y', True)
    assert module._check_boxes(content, wanted, 'x', False) == (1000, {})
    assert Name.count < 10_000  # not half a million


def test_list_of_test_images_without_annotations(data, tmp_path):
    edit(data, lambda content: content.pop('annotations'))
    assert len(load(tmp_path, boxes(data, test_mode=True), 'mmdet')) == 8


def test_data_sets_in_wrappers_are_checked(data, tmp_path):
    edit(data, put('annotations', 2, bbox=[1]))
    dataset = dict(
        type='mmdet.ConcatDataset',
        datasets=[
            dict(type='RepeatDataset', times=2, dataset=boxes(data)),
            boxes(data),
        ],
    )
    assert read(tmp_path, dataset, 'mmdet').startswith(
        f'{data}/{JSON}: annotation 3 has the bbox [1]'
    )


# Images and label maps


@pytest.mark.parametrize(
    'orientation, hint',
    [(6, ' after the rotation that its EXIF data asks for'), (1, '')],
)
def test_photo_that_was_turned(data, tmp_path, orientation, hint):
    """Where it is not, other sides than the json's are another image."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    size = (96, 48) if hint else (48, 96)
    Image.new('RGB', size).save(data / IMAGE, exif=exif)
    edit(data, put('images', 3, width=96, height=48))
    assert read(tmp_path, boxes(data), 'mmdet') == (
        f'{data}/{JSON}: the image of id 3 has 96 x 48 pixels, but '
        f'{data}/{IMAGE} has 48 x 96{hint}'
    )


def write_png(file, size, value=0):
    assert cv2.imwrite(str(file), np.full((size[1], size[0]), value, np.uint8))


def test_values_that_are_no_labels(data, tmp_path):
    write_png(data / LABEL_MAP, (96, 96), 44)
    assert read(tmp_path, maps(data), 'mmseg') == (
        f'the label map {data}/{LABEL_MAP} holds the value 44, but the labels '
        'of its 7 classes are 0 to 6'
    )


@pytest.mark.parametrize('value', [7, 254])
def test_values_that_are_no_labels_from_one_on(data, tmp_path, value):
    for file in (data / 'annotations/training').iterdir():
        write_png(file, (96, 96), 6)
    write_png(data / LABEL_MAP, (96, 96), value)
    dataset = maps(data, background=(), reduce_zero_label=True)
    assert read(tmp_path, dataset, 'mmseg') == (
        f'the label map {data}/{LABEL_MAP} holds the value {value}, but the '
        'labels of its 6 classes are 1 to 6'
    )


@pytest.mark.parametrize(
    ('ignored', 'kwargs'),
    [
        (255, dict()),
        (100, dict(ignore_index=100)),
        (0, dict(background=(), reduce_zero_label=True)),
    ],
    ids=['255', 'ignore_index', 'zero'],
)
def test_ignored_values_are_no_mistake(data, tmp_path, ignored, kwargs):
    for file in (data / 'annotations/training').iterdir():
        write_png(file, (96, 96), ignored)
    dataset = load(tmp_path, maps(data, **kwargs), 'mmseg')
    labels = dataset[3]['data_samples'].gt_sem_seg.data
    assert labels.unique().tolist() == [ignored or 255]


def test_label_map_of_another_size(data, tmp_path):
    write_png(data / LABEL_MAP, (48, 96))
    assert read(tmp_path, maps(data), 'mmseg') == (
        f'the label map {data}/{LABEL_MAP} has 48 x 96 pixels, but the image '
        f'{data}/{IMAGE} has 96 x 96'
    )


@pytest.mark.parametrize('why', ['large', 'float64'])
def test_label_map_that_only_opencv_reads(data, tmp_path, monkeypatch, why):
    if why == 'large':
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 96 * 96 // 3)
        write_png(data / LABEL_MAP, (96, 96), 3)
    else:
        tiff = cv2.imencode('.tiff', np.full((96, 96), 3, np.float64))[1]
        (data / LABEL_MAP).write_bytes(tiff.tobytes())
    dataset = maps(data)
    dataset['pipeline'][1]['imdecode_backend'] = 'cv2'
    sample = load(tmp_path, dataset, 'mmseg')[3]['data_samples']
    assert sample.gt_sem_seg.data.unique().tolist() == [3]


def test_label_map_in_colours(data, tmp_path):
    assert cv2.imwrite(str(data / LABEL_MAP), np.zeros((96, 96, 3), np.uint8))
    assert read(tmp_path, maps(data), 'mmseg') == (
        f'the label map {data}/{LABEL_MAP} has 3 channels, expected one, of '
        'labels'
    )


@TRANSFORMS.register_module()
class Halve(BaseTransform):
    def transform(self, results):
        results['gt_seg_map'] = results['gt_seg_map'] // 2
        return results


@pytest.mark.parametrize(('value', 'good'), [(12, True), (14, False)])
def test_labels_that_a_later_step_changes(data, tmp_path, value, good):
    write_png(data / LABEL_MAP, (96, 96), value)
    steps = ['LoadImageFromFile', 'LoadAnnotations', Halve, 'PackSegInputs']
    dataset = maps(data, pipeline=[dict(type=step) for step in steps])
    if good:
        sample = load(tmp_path, dataset, 'mmseg')[3]['data_samples']
        assert sample.gt_sem_seg.data.unique().tolist() == [6]
        return
    message = read(tmp_path, dataset, 'mmseg')
    assert f'{data}/{LABEL_MAP} holds the value 7, but' in message


class Eager(CocoDataset):
    def __init__(self, data_root, ann_file, data_prefix, metainfo, pipeline):
        super().__init__(
            data_root=data_root,
            ann_file=ann_file,
            data_prefix=data_prefix,
            metainfo=metainfo,
            pipeline=pipeline,
        )


class EagerKeywords(Eager):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize('kind', [Eager, EagerKeywords])
def test_data_set_that_cannot_be_lazy(data, tmp_path, kind):
    dataset = {**boxes(data), 'type': kind}
    check(dataset, 'mmdet')
    assert len(load(tmp_path, dataset, 'mmdet')) == 8
    (data / IMAGE).write_bytes(b'')
    message = read(tmp_path / 'again', dataset, 'mmdet')
    assert message.startswith(f'cannot read the image {data}/{IMAGE}')


@pytest.mark.parametrize('backend', ['petrel', 'local'])
def test_paths_of_another_backend(data, tmp_path, backend):
    """They may be mapped to somewhere else."""
    args = dict(backend=backend)
    shutil.rmtree(data)
    dataset = boxes(data, backend_args=args)
    dataset['pipeline'] = []
    evaluator = dict(ann_file=f'{data}/{JSON}', backend_args=args)
    cfg = Config(
        dict(
            default_scope='mmdet',
            model={},
            val_dataloader=dict(dataset=dataset),
            val_evaluator=evaluator,
        )
    )
    check_data = import_module('_data').check_data
    if backend == 'petrel':
        check_data(cfg, 'val')
        return
    with pytest.raises(SystemExit, match='data_root: there is no '):
        check_data(cfg, 'val')


@pytest.mark.parametrize('kind', [dict, list])
def test_missing_json_of_a_metric_inside_of_an_evaluator(data, kind):
    metric = dict(type='CocoMetric', ann_file=f'{data}/none.json')
    metrics = metric if kind is dict else [dict(type='Other'), metric]
    cfg = Config(
        dict(
            default_scope='mmdet',
            model={},
            val_dataloader=dict(dataset=boxes(data)),
            val_evaluator=dict(metrics=metrics),
        )
    )
    with pytest.raises(SystemExit) as caught:
        import_module('_data').check_data(cfg, 'val')
    assert message_of(caught) == (
        f'val_evaluator.ann_file: there is no {data}/none.json'
    )


def test_labels_inside_of_another_step(data, tmp_path):
    """As test-time augmentation loads them."""
    write_png(data / LABEL_MAP, (96, 96), 44)
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(
            type='RandomChoice',
            transforms=[[dict(type='LoadAnnotations')]],
        ),
        dict(type='PackSegInputs'),
    ]
    message = read(tmp_path, maps(data, pipeline=pipeline), 'mmseg')
    assert 'holds the value 44' in message


def missing(file):
    file.unlink()


def empty(file):
    file.write_bytes(b'')


def corrupt(file):
    file.write_bytes(b'<html>not found</html>')


@pytest.mark.parametrize('damage', [missing, empty, corrupt])
@pytest.mark.parametrize(
    ('scope', 'name', 'what'),
    [
        ('mmdet', IMAGE, 'image'),
        ('mmseg', IMAGE, 'image'),
        ('mmseg', LABEL_MAP, 'label map'),
    ],
)
def test_unreadable_files(data, tmp_path, scope, name, what, damage):
    dataset = boxes(data) if scope == 'mmdet' else maps(data)
    if (scope, damage, name) == ('mmseg', missing, IMAGE):
        # mmseg lists the folder, unless a file lists the names
        names = [path.stem for path in (data / 'images/training').iterdir()]
        (data / 'names.txt').write_text('\n'.join(sorted(names)))
        dataset['ann_file'] = 'names.txt'
    damage(data / name)
    message = read(tmp_path, dataset, scope)
    assert message.startswith(f'cannot read the {what} {data}/{name}: ')


def test_unreadable_file_in_a_worker_process(data, tmp_path):
    corrupt(data / LABEL_MAP)
    message = read(tmp_path, maps(data), 'mmseg', num_workers=1)
    assert message.startswith(
        f'cannot read the label map {data}/{LABEL_MAP}: '
    )


# Losses


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_training_stops_at_an_invalid_loss(data, tmp_path, value):
    losses = [1.0, 1.0, float(value), 1.0]
    message = read(tmp_path, maps(data), 'mmseg', losses=losses)
    assert message == (
        f'training stopped at iteration 3: loss is {value}, loss_cls is '
        f'{value}; check the learning rate and the data'
    )
    # a checkpoint saved after it would be useless
    saved = sorted(path.name for path in (tmp_path / 'work').glob('*.pth'))
    assert saved == ['iter_1.pth', 'iter_2.pth']


# As users see them


@pytest.mark.parametrize('here', [True, False], ids=['checkout', 'elsewhere'])
def test_shapes_that_are_not_drawn_yet(here, monkeypatch, tmp_path):
    converters = Path('tools/dataset_converters')
    if here:  # as if the checkout, which may hold the shapes, were this folder
        data = import_module('_data')
        monkeypatch.setattr(data, 'CONVERTERS', tmp_path / converters)
    monkeypatch.setattr(
        sys, 'argv', ['train.py', str(ROOT / SHAPES), '--work-dir', 'work']
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        import_module('train').main()
    script = (converters if here else ROOT / converters) / 'shapes.py'
    assert message_of(caught) == (
        'train_dataloader.dataset.data_root: there is no data/shapes/, make '
        f'it with: python {script} data/shapes'
    )


def stderr_of(*command, **env):
    """What a training prints on stderr, which must fail."""
    process = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1, process.stdout
    return process.stderr


def test_one_line_ends_the_run(data, tmp_path):
    stderr = stderr_of(
        *('python', 'tools/train.py', SHAPES, '--work-dir', tmp_path / 'work'),
        *shapes_options(data, 'optim_wrapper.optimizer.lr=1e30'),
    )
    last = stderr.splitlines()[-1]
    assert last.startswith('error: training stopped at iteration 2: loss is ')
    assert 'Traceback' not in stderr


def test_two_processes_with_workers_end_at_one_wrong_label_map(
    segmentor, data, tmp_path
):
    write_png(data / LABEL_MAP, (96, 96), 44)
    stderr = stderr_of(
        *('tools/dist_train.sh', segmentor(), 2),
        *('--work-dir', tmp_path / 'work', '--cfg-options'),
        'train_dataloader.num_workers=1',
        PORT=str(free_port()),
    )
    assert (
        f'error: the label map {data}/{LABEL_MAP} holds the value 44, but the '
        'labels of its 6 classes are 1 to 6'
    ) in stderr.splitlines()


MASK_RCNN = 'configs/mask_rcnn/mask-rcnn_r50_fpn-carafe_1x_coco.py'


@pytest.mark.parametrize(
    'config, files',
    [
        (MASK_RCNN, 'annotations/instances_val2017.json'),
        (UPERNET, None),
        ('configs/nuclei/upernet_r18_nuclei.py', None),
        (SHAPES, 'annotations/instances_validation.json'),
    ],
)
def test_data_elsewhere(config, files):
    """--data-root reaches all loaders and evaluators, and nothing else."""
    cfg = Config.fromfile(ROOT / config)
    before = copy.deepcopy(cfg.to_dict())
    import_module('_cli').move_data_root(cfg, '/elsewhere')
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert Path(dataset.data_root) == Path('/elsewhere')
        before[f'{split}_dataloader']['dataset']['data_root'] = '/elsewhere/'
        if files and split != 'train':
            key = f'{split}_evaluator'
            assert cfg[key].ann_file == f'/elsewhere/{files}'
            before[key]['ann_file'] = cfg[key].ann_file
    assert cfg.to_dict() == before


def test_data_elsewhere_inside_a_wrapper(refused, tmp_path):
    config = tmp_path / 'repeated.py'
    config.write_text(
        f'_base_ = {str(ROOT / SHAPES)!r}\n'
        'train_dataloader = dict(dataset=dict(\n'
        "    _delete_=True, type='RepeatDataset', times=2, dataset=dict(\n"
        "        type='CocoDataset', data_root='data/shapes/')))\n"
    )
    assert refused('train', config, '--data-root', 'no/where') == (
        'train_dataloader.dataset.dataset.data_root: there is no no/where/'
    )


@pytest.mark.parametrize(
    'line, roots',
    [
        (
            "train_dataloader = dict(dataset=dict(data_root='a'))",
            'a, data/s.*',
        ),
        (
            'train_dataloader = val_dataloader = test_dataloader = dict('
            'dataset=dict(data_root=None))',
            'none',
        ),
    ],
)
def test_no_single_folder_of_data(refused, tmp_path, line, roots):
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = {str(ROOT / SHAPES)!r}\n{line}\n')
    assert re.fullmatch(
        f'--data-root: expected a config with one data_root, got {roots}; '
        'set each by --cfg-options',
        refused('train', config, '--data-root', 'x'),
    )
