"""How train.py and test.py check the data they are given.

Paths and classes are checked before anything is written, annotations while the
data set loads them, each image and label map when it is loaded. A data set may
be large, so nothing is read just to be checked.
"""

import copy
import difflib
import inspect
import logging
import math
import os.path as osp
import re
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from _cli import as_list, fail, user_errors
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile
from mmengine.dataset import BaseDataset, Compose
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS

SHAPES = osp.join('data', 'shapes')
CONVERTERS = Path(__file__).resolve().parent / 'dataset_converters'
IGNORED = 255  # the label that mmseg ignores unless a config says otherwise


class DataError(ValueError):
    """What is wrong with a file of the data, in one line that names it."""


# Before anything is written


def check_data(cfg, split):
    """Look for each file and folder of a split, and compare the classes."""
    loader, evaluator = f'{split}_dataloader', f'{split}_evaluator'
    heads = dict(_heads(cfg.model))
    scope = cfg.get('default_scope')
    with DATASETS.switch_scope_and_registry(scope) as datasets:
        _each_dataset(
            partial(_check_dataset, datasets=datasets, heads=heads),
            cfg[loader].dataset,
            f'{loader}.dataset',
        )
    for each in as_list(cfg.get(evaluator)):
        if not isinstance(each, dict) or _is_remote(each.get('backend_args')):
            continue
        if each.get('ann_file'):
            _check_ann_file(each.ann_file, f'{evaluator}.ann_file')


def _each_dataset(function, cfg, key):
    """Replace each data set, also inside wrappers such as RepeatDataset."""
    for name in ('dataset', 'datasets'):
        if name in cfg:
            inner = [
                _each_dataset(function, each, f'{key}.{name}')
                for each in as_list(cfg[name])
            ]
            is_list = isinstance(cfg[name], (list, tuple))
            return {**cfg, name: inner if is_list else inner[0]}
    return function(cfg, key)


def _check_dataset(cfg, key, datasets, heads):
    # RuntimeError: a transform's library is not installed
    with user_errors(key, RuntimeError):
        kind = cfg.type
        cls = datasets.get(kind) if isinstance(kind, str) else kind
        if inspect.isclass(cls) and not issubclass(cls, BaseDataset):
            return  # only it knows what it reads
        classes = (cfg.get('metainfo') or {}).get('classes')
        if isinstance(classes, str) and not osp.isfile(classes):
            fail(
                f'{key}.metainfo.classes: expected a tuple of names or a file '
                f'that lists them, got {classes!r} (one class is '
                f'({classes!r},))'
            )
        # lazy: joins the paths, builds the pipeline, reads no annotation
        dataset = _build_lazily(datasets, cls, cfg)
    if dataset is None:
        return
    if not _is_remote(getattr(dataset, 'backend_args', None)):
        _check_path(dataset.data_root, f'{key}.data_root')
        for name, path in dataset.data_prefix.items():
            _check_path(path, f'{key}.data_prefix.{name}')
        if dataset.ann_file:
            _check_ann_file(dataset.ann_file, f'{key}.ann_file')
    _check_heads(heads, dataset.metainfo, key)


def _build_lazily(datasets, cls, cfg):
    """Build a data set that reads no annotation yet; None if it cannot."""
    if cls is None or any(  # None: building names the type
        each.name == 'lazy_init' or each.kind is each.VAR_KEYWORD
        for each in inspect.signature(cls).parameters.values()
    ):
        try:
            return datasets.build({**copy.deepcopy(cfg), 'lazy_init': True})
        except TypeError as error:
            if 'lazy_init' not in str(error):
                raise
    return None


def _is_remote(backend_args):
    """Whether paths may mean something else than local files."""
    return (backend_args or {}).get('backend', 'local') != 'local'


def _heads(model, key='model'):
    """(key, config) of each head that predicts the data set's classes."""
    if isinstance(model, (list, tuple)):
        for index, each in enumerate(model):
            yield from _heads(each, f'{key}.{index}')
    # With these, classes are words, or only the data set's moving objects.
    free = {'language_model', 'text_encoder', 'tracker'}
    if not isinstance(model, dict) or free & model.keys():
        return
    is_head = 'num_classes' in model and re.search(r'_head(\.\d+)*$', key)
    if is_head and model.get('type') != 'STDCHead':  # which predicts edges
        yield key, model
    for name, value in model.items():
        # These predict whether there is an object, and kinds of background.
        if name not in ('rpn_head', 'semantic_head'):
            yield from _heads(value, f'{key}.{name}')


def _check_heads(heads, metainfo, key):
    # a panoptic data set: heads with num_classes predict things only
    classes = metainfo.get('thing_classes', metainfo.get('classes'))
    if classes is None:  # the annotation file may name them
        return
    for name, head in heads.items():
        count = head['num_classes']
        # One channel, thresholded, tells two classes apart.
        binary = count == 1 and re.search(r'\.(decode|auxiliary)_head', name)
        if count != len(classes) and not (binary and len(classes) == 2):
            fail(
                f'{name}.num_classes is {count}, but {key} has '
                f'{_list(classes, "class", "classes")}'
            )


def _list(names, one, many):
    """'2 classes: disk, ring', with no more than ten names."""
    names = [str(name) for name in names]
    shown = ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
    return f'{len(names)} {one if len(names) == 1 else many}: {shown}'


def _check_path(path, key):
    if path and '://' not in path and not osp.exists(path):
        hint = ''
        if osp.normpath(path).endswith(SHAPES):
            script = _from_here(CONVERTERS / 'shapes.py')
            hint = f', make it with: python {script} {osp.normpath(path)}'
        fail(f'{key}: there is no {path}{hint}')


def _from_here(path):
    """As one would type it: relative, unless it is outside of this folder.

    An installed package has the tools elsewhere, where `mim` runs them.
    """
    relative = osp.relpath(path)
    return path if relative.startswith(osp.pardir) else relative


def _check_ann_file(path, key):
    _check_path(path, key)
    if not osp.isfile(path):  # a folder, or remote
        return
    with open(path, 'rb') as file:
        head = file.read(20)
        file.seek(max(0, osp.getsize(path) - 20))
        tail = file.read()
    if not head.strip():
        fail(f'{key}: {path} is empty')
    ends = head.lstrip()[:1] + tail.rstrip()[-1:]
    if path.endswith('.json') and ends not in (b'{}', b'[]'):
        fail(
            f'{key}: {path} is not a whole JSON file, it begins with {head} '
            f'and ends with {tail}'
        )


# While the data set loads its annotations


@contextmanager
def guarded(runner, *splits):
    """Load the data of some splits; check them now and during the run.

    Args:
        runner (Runner): what will train or test inside the ``with``.
        splits (str): ``'train'``, ``'val'`` or ``'test'``.
    """
    ignored = {IGNORED}
    for _, head in _heads(runner.cfg.model):
        ignored.add(head.get('ignore_index', IGNORED))
    build = runner.build_dataloader

    def build_checked(dataloader, *args, **kwargs):
        if not isinstance(dataloader, dict):
            return build(dataloader, *args, **kwargs)

        # The registry calls a function that stands in place of a type, and the
        # config that the run keeps stays as it is.
        def load(cfg, key):
            return {**cfg, 'type': partial(_load, cfg['type'], key, ignored)}

        key = f'{split}_dataloader'  # of the loop being built below
        dataset = _each_dataset(load, dataloader['dataset'], f'{key}.dataset')
        with user_errors(key):
            try:
                loader = build(
                    {**dataloader, 'dataset': dataset}, *args, **kwargs
                )
                length = len(loader.dataset)
            except ValueError as error:
                # mmengine fails so when it packs no records
                if 'at least one array to concatenate' not in str(error):
                    raise
                length = 0
        # a sampler of an empty data set might wait forever
        if not length:
            fail(
                f'{key}.dataset holds no image: check its paths, '
                'metainfo.classes and filter_cfg'
            )
        return loader

    runner.build_dataloader = build_checked
    for split in splits:
        with user_errors(f'{split}_cfg'):
            getattr(runner, f'{split}_loop')  # builds it
    del runner.build_dataloader  # back to the class's own
    if 'train' in splits:
        runner.register_hook(StopAtInvalidLoss())
    try:
        yield
    except DataError as error:
        # a worker process's text is its traceback, which ends in our line
        fail(str(error).rpartition(f'{DataError.__name__}: ')[2].strip())


def _load(kind, key, ignored, **cfg):
    """Build a data set that checks what it reads, now and later."""
    with DATASETS.switch_scope_and_registry(None) as datasets:
        cls = datasets.get(kind) if isinstance(kind, str) else kind
        if inspect.isclass(cls) and not issubclass(cls, BaseDataset):
            return datasets.build(dict(cfg, type=kind))
        dataset = _build_lazily(datasets, cls, dict(cfg, type=kind))
        lazy = dataset is not None
        if not lazy:
            dataset = datasets.build(dict(cfg, type=kind))
    if lazy and _reads_coco(cls):

        class CheckedCOCO(dataset.COCOAPI):
            def __init__(self, *args, **kwargs):
                with user_errors(dataset.ann_file):
                    super().__init__(*args, **kwargs)

            def createIndex(self):
                _check_coco(self.dataset, dataset, key)
                super().createIndex()

        dataset.COCOAPI = CheckedCOCO
        dataset.full_init()
        del dataset.COCOAPI  # back to the class's, which can be pickled
    dataset.full_init()

    for step in _steps(dataset.pipeline, LoadImageFromFile):
        step.transform = partial(_load_image, step)
    for step in _steps(dataset.pipeline, LoadAnnotations):
        if step.with_seg:
            step.transform = partial(_load_label_map, step)
    classes = dataset.metainfo.get('classes')
    if classes and hasattr(dataset, 'reduce_zero_label'):
        from mmseg.datasets.transforms import PackSegInputs

        ignored = ignored | {getattr(dataset, 'ignore_index', IGNORED)}
        for step in _steps(dataset.pipeline, PackSegInputs):
            step.transform = partial(
                _pack, step, len(classes), sorted(ignored)
            )
    return dataset


def _reads_coco(cls):
    """Whether a data set reads its json as mmdet's CocoDataset does."""
    if not hasattr(cls, 'COCOAPI'):
        return False
    from mmdet.datasets import CocoDataset

    return (
        issubclass(cls, CocoDataset)
        and cls.parse_data_info is CocoDataset.parse_data_info
    )


COCO_KEYS = dict(
    images={'id', 'file_name', 'width', 'height'},
    categories={'id', 'name'},
    annotations={'id', 'image_id', 'category_id', 'bbox', 'area'},
)


def _check_coco(content, dataset, key):
    """Refuse invalid entries, and count the boxes that will be dropped.

    Args:
        content (dict): what the json holds.
        dataset (CocoDataset): one that has not loaded it yet.
        key (str): of the data set in the config.
    """
    path = dataset.ann_file
    for part, keys in COCO_KEYS.items():
        if part not in content:
            if part == 'annotations' and dataset.test_mode:
                continue  # COCO's list of test images has none
            fail(f'{path} has no {part!r}')
        for index, entry in enumerate(content[part]):
            if not isinstance(entry, dict):
                fail(f'{path}: {part}[{index}] is {entry!r}, not an object')
            missing = keys - entry.keys()
            if missing and entry.get('ignore'):  # mmdet skips its box
                missing -= {'bbox', 'area'}
            if missing:
                number = f' (id {entry["id"]})' if 'id' in entry else ''
                fail(
                    f'{path}: {part}[{index}]{number} has no {min(missing)!r}'
                )

    names = {each['id']: each['name'] for each in content['categories']}
    wanted = dataset.metainfo['classes']
    _check_names(wanted, list(names.values()), path, key)
    images = {each['id']: each for each in content['images']}
    count, dropped = 0, Counter()
    for each in content.get('annotations', ()):
        if each.get('ignore'):
            continue
        if each['category_id'] not in names:
            count += 1
            dropped['of a category that is not listed'] += 1
            continue
        if names[each['category_id']] not in wanted:
            continue
        box = each['bbox']
        if not (isinstance(box, list) and len(box) == 4 and _finite(*box)):
            fail(
                f'{path}: annotation {each["id"]} has the bbox {box}, '
                'expected four finite numbers: x, y, width, height'
            )
        if not _finite(each['area']):
            fail(
                f'{path}: annotation {each["id"]} has the area '
                f'{each["area"]}, expected a finite number'
            )
        count += 1
        image = images.get(each['image_id'])
        dropped[_why_dropped(box, each['area'], image)] += 1
    del dropped[None]
    if dropped:
        reasons = ', '.join(f'{n} {why}' for why, n in dropped.items())
        print_log(
            f'{path}: {sum(dropped.values()):,} of {count:,} boxes are '
            f'dropped: {reasons}',
            'current',
            logging.WARNING,
        )


def _check_names(wanted, names, path, key):
    """Refuse unknown ones: mmdet would number the rest as if without them."""
    missing = [name for name in wanted if name not in names]
    if missing:
        close = difflib.get_close_matches(missing[0], names, 1)
        hint = f', did you mean {close[0]!r}?' if close else '.'
        fail(
            f'{key}.metainfo.classes: {path} has no category '
            f'{missing[0]!r}{hint} It has '
            f'{_list(names, "category", "categories")}'
        )


def _finite(*values):
    return all(
        isinstance(value, (int, float)) and math.isfinite(value)
        for value in values
    )


def _why_dropped(box, area, image):
    """Why mmdet's CocoDataset leaves a box out; None if it does not."""
    if image is None:
        return 'on an image that is not listed'
    x, y, width, height = box
    if width < 0 or height < 0:
        return 'with negative size'
    if not width or not height or area <= 0:
        return 'with no area'
    if min(x + width, image['width']) <= max(x, 0) or min(
        y + height, image['height']
    ) <= max(y, 0):
        return 'outside its image'
    if width < 1 or height < 1:
        return 'thinner than a pixel'
    return None


# When an image or a label map is loaded


def _steps(step, kind):
    """The steps of one kind in a pipeline, also those inside of others."""
    if isinstance(step, kind):
        yield step
    elif isinstance(step, (Compose, BaseTransform)):
        yield from _steps(vars(step), kind)
    elif isinstance(step, dict):
        yield from _steps(list(step.values()), kind)
    elif isinstance(step, (list, tuple)):
        for each in step:
            yield from _steps(each, kind)


@contextmanager
def _reading(what):
    """Name the file in errors: decoders know only the bytes."""
    try:
        yield
    except Exception as error:
        text = ' '.join(str(error).split())
        raise DataError(
            f'cannot read {what}: {type(error).__name__}: {text}'
        ) from error


def _load_image(step, results):
    with _reading(f'the image {results["img_path"]}'):
        return type(step).transform(step, results)


def _load_label_map(step, results):
    """Load a label map, and compare its size with that of its image."""
    path = results.get('seg_map_path')
    if path is None:
        return type(step).transform(step, results)
    with _reading(f'the label map {path}'):
        results = type(step).transform(step, results)
    labels = results['gt_seg_map']
    if labels.ndim != 2:
        raise DataError(
            f'the label map {path} has {labels.shape[-1]} channels, expected '
            'one, of labels'
        )
    size = results.get('ori_shape', labels.shape)
    if labels.shape != tuple(size):
        raise DataError(
            f'the label map {path} has {_size(labels.shape)} pixels, but the '
            f'image {results["img_path"]} has {_size(size)}'
        )
    return results


def _pack(step, num_labels, ignored, results):
    """Compare labels with the classes when all steps have changed them.

    Args:
        step (PackSegInputs): what packs them.
        num_labels (int): labels are less than this.
        ignored (list[int]): labels that are allowed too.
        results (dict): what the pipeline knows of the image.
    """
    labels = results.get('gt_seg_map')
    if labels is None:
        return type(step).transform(step, results)
    wrong = labels >= num_labels
    for label in ignored:
        wrong &= labels != label
    if wrong.any():
        # in the file, labels may begin at one
        first = int(bool(results.get('reduce_zero_label')))
        raise DataError(
            f'the label map {results.get("seg_map_path")} holds the value '
            f'{int(labels[wrong].max()) + first}, but the labels of its '
            f'{num_labels} classes are {first} to {first + num_labels - 1}'
        )
    return type(step).transform(step, results)


def _size(shape):
    return f'{shape[1]} x {shape[0]}'


class StopAtInvalidLoss(Hook):
    """End the run at a loss that is NaN or infinite, before it is saved.

    This costs no extra wait for a GPU: mmengine's RuntimeInfoHook has just
    waited for the losses of the iteration, to log them.
    """

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        losses = {
            name: torch.as_tensor(value).item()
            for name, value in (outputs or {}).items()
            if 'loss' in name
        }
        wrong = [
            f'{name} is {value}'
            for name, value in losses.items()
            if not math.isfinite(value)
        ]
        if wrong:
            fail(
                f'training stopped at iteration {runner.iter + 1}: '
                f'{", ".join(wrong)}; check the learning rate and the data'
            )
