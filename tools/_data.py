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
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _cli import as_list, fail, user_errors
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile
from mmengine.dataset import BaseDataset, Compose
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from PIL import ExifTags, Image

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
    for each in _metrics(cfg.get(evaluator)):
        if not isinstance(each, dict) or _is_remote(each.get('backend_args')):
            continue
        if each.get('ann_file'):
            _check_ann_file(each.ann_file, f'{evaluator}.ann_file')


def _metrics(cfg):
    """The metrics in the config of an evaluator, as mmengine builds them."""
    return as_list(cfg.get('metrics', cfg) if isinstance(cfg, dict) else cfg)


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
    build, build_evaluator = runner.build_dataloader, runner.build_evaluator
    datasets = {}  # of the splits

    def build_checked(dataloader, *args, **kwargs):
        if not isinstance(dataloader, dict):
            return build(dataloader, *args, **kwargs)
        key = f'{split}_dataloader'  # of the loop being built below
        dataset = _checked(
            dataloader['dataset'], f'{key}.dataset', runner.cfg.model
        )
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
            _fail_for_no_image(f'{key}.dataset')
        datasets[split] = loader.dataset
        return loader

    def build_evaluator_checked(cfg):
        if isinstance(cfg, Evaluator):
            return build_evaluator(cfg)
        return _build_evaluator(
            build_evaluator, cfg, datasets.get(split), f'{split}_evaluator'
        )

    runner.build_dataloader = build_checked
    runner.build_evaluator = build_evaluator_checked
    for split in splits:
        with user_errors(f'{split}_cfg'):
            getattr(runner, f'{split}_loop')  # builds it
    del runner.build_dataloader, runner.build_evaluator  # the class's own
    if 'train' in splits:
        runner.register_hook(StopAtInvalidLoss())
    with data_errors():
        yield


def _fail_for_no_image(key):
    fail(
        f'{key} holds no image: check its paths, metainfo.classes and '
        'filter_cfg'
    )


@contextmanager
def data_errors():
    """End in one line where a file of the data is wrong."""
    try:
        yield
    except DataError as error:
        # a worker process's text is its traceback, which ends in our line
        fail(str(error).rpartition(f'{DataError.__name__}: ')[2].strip())


def build_dataset(cfg, split):
    """Build the data set of a split, checked as those of a run.

    What is wrong with its images shows where they are read: read them inside
    :func:`data_errors`.
    """
    key = f'{split}_dataloader.dataset'
    dataset = _checked(cfg[f'{split}_dataloader'].dataset, key, cfg.model)
    with user_errors(key):
        dataset = DATASETS.build(dataset)
    if not len(dataset):
        _fail_for_no_image(key)
    return dataset


def _checked(cfg, key, model):
    """The config of a data set that checks what it reads.

    The registry calls a function that stands in place of a type, and the
    config that the run keeps stays as it is.
    """
    ignored = {IGNORED}
    for _, head in _heads(model):
        ignored.add(head.get('ignore_index', IGNORED))

    def replace(cfg, key):
        return {**cfg, 'type': partial(_load, cfg['type'], key, ignored)}

    return _each_dataset(replace, cfg, key)


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
    lists_sizes = lazy and _reads_coco(cls)
    if lists_sizes:

        class CheckedCOCO(dataset.COCOAPI):
            def __init__(self, *args, **kwargs):
                with user_errors(dataset.ann_file, RecursionError):
                    super().__init__(*args, **kwargs)

            def createIndex(self):
                _check_coco(self.dataset, dataset, key)
                super().createIndex()

        dataset.COCOAPI = CheckedCOCO
        dataset.full_init()
        del dataset.COCOAPI  # back to the class's, which can be pickled
    dataset.full_init()

    for step in _steps(dataset.pipeline, LoadImageFromFile):
        step.transform = partial(
            _load_image, step, dataset.ann_file if lists_sizes else None
        )
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
    images=('id', 'file_name', 'width', 'height'),
    categories=('id', 'name'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
)
# Pixels: OpenCV reads no image of a longer side. A polygon from farther away
# would take all memory to draw, one with NaN too.
FAR = 2**20


def _check_coco(content, dataset, key):
    """Refuse invalid entries, and count the boxes that will be dropped.

    Args:
        content (dict): what the json holds.
        dataset (CocoDataset): one that has not loaded it yet.
        key (str): of the data set in the config.
    """
    from mmdet.datasets import CocoDataset

    path = dataset.ann_file
    # COCO's list of test images has none
    optional = ('annotations',) if dataset.test_mode else ()
    _check_entries(content, path, optional, dataset.ANN_ID_UNIQUE)
    classes = dataset.metainfo['classes']
    # Others may sort the categories before they number them.
    by_file = type(dataset).load_data_list is CocoDataset.load_data_list
    _check_names(classes, content['categories'], path, key, by_file)
    masks = any(
        step.with_mask
        for step in _steps(dataset.pipeline, LoadAnnotations)
        if hasattr(step, 'with_mask')  # mmdet's
    )
    count, dropped = _check_boxes(content, classes, path, masks)
    if dropped:
        reasons = ', '.join(f'{n} {why}' for why, n in dropped.items())
        _warn(
            f'{path}: {sum(dropped.values()):,} of {count:,} boxes are '
            f'dropped: {reasons}'
        )
    if not count and not dataset.test_mode:
        _warn(f'{path} has no box of the classes in {key}.metainfo.classes')


def _warn(text):
    print_log(text, 'current', logging.WARNING)


def _check_entries(content, path, optional=(), unique=True):
    """Refuse a json that lacks what mmdet and pycocotools read in COCO's.

    Args:
        content (dict): what the json holds.
        path (str): its file.
        optional (tuple[str]): keys that it need not have.
        unique (bool): whether no two annotations may have the same id.
    """
    for part, keys in COCO_KEYS.items():
        if part not in content:
            if part in optional:
                continue
            fail(f'{path} has no {part!r}')
        if not isinstance(content[part], list):
            kind = type(content[part]).__name__
            fail(f'{path}: {part} is a {kind}, expected a list')
        values = [(name, *VALUES[name]) for name in keys if name in VALUES]
        first = {}  # where each id is
        for index, entry in enumerate(content[part]):
            if not isinstance(entry, dict):
                fail(f'{path}: {part}[{index}] is {entry!r}, not an object')
            for name in ('iscrowd', 'ignore'):
                # the text '0' would mean yes
                if entry.get(name, 0) not in (0, 1):
                    fail(
                        f'{path}: {part}[{index}] has the {name} '
                        f'{entry[name]!r}, expected 0 or 1'
                    )
            for name in keys:
                if name not in entry:
                    if name in ('bbox', 'area') and entry.get('ignore'):
                        continue  # mmdet skips its box
                    number = f' (id {entry["id"]})' if 'id' in entry else ''
                    fail(f'{path}: {part}[{index}]{number} has no {name!r}')
            for name, good, expected in values:
                if not good(entry[name]):
                    fail(
                        f'{path}: {part}[{index}] has the {name} '
                        f'{entry[name]!r}, expected {expected}'
                    )
            other = first.setdefault(entry['id'], index)
            if other != index and (unique or part != 'annotations'):
                fail(
                    f'{path}: {part}[{other}] and {part}[{index}] have the '
                    f'same id, {entry["id"]}'
                )


def _is_id(value):
    return isinstance(value, str) or _finite(value)


def _is_length(value):
    return _finite(value, limit=FAR) and value >= 1


VALUES = dict(
    id=(_is_id, 'a number'),
    image_id=(_is_id, 'a number'),
    category_id=(_is_id, 'a number'),
    file_name=(lambda value: isinstance(value, str), 'text'),
    name=(lambda value: isinstance(value, str), 'text'),
    width=(_is_length, 'a number of pixels'),
    height=(_is_length, 'a number of pixels'),
)


def _check_boxes(content, classes, path, masks, measured=False):
    """Refuse boxes and masks that cannot be meant.

    Args:
        content (dict): what the json holds; its entries are complete.
        classes (Sequence[str]): boxes of other categories are not read.
        path (str): the json.
        masks (bool): whether masks are read, too.
        measured (bool): whether pycocotools reads them, which leaves out
            nothing that mmdet would.

    Returns:
        tuple[int, Counter]: the number of boxes that are read, and how many
        of them mmdet drops, for which reason.
    """
    names = {each['id']: each['name'] for each in content['categories']}
    images = {each['id']: each for each in content['images']}
    classes = set(classes)
    count, dropped = 0, Counter()
    for each in content.get('annotations', ()):
        if each.get('ignore'):
            continue
        if each['category_id'] not in names:
            count += 1
            dropped['of a category that is not listed'] += 1
            continue
        if names[each['category_id']] not in classes:
            continue
        box = each['bbox']
        if not (
            isinstance(box, list)
            and len(box) == 4
            and _finite(*box, limit=FAR)
        ):
            fail(
                f'{path}: annotation {each["id"]} has the bbox {box}, '
                'expected four numbers of pixels: x, y, width, height'
            )
        if not _finite(each['area']):
            fail(
                f'{path}: annotation {each["id"]} has the area '
                f'{each["area"]}, expected a finite number'
            )
        count += 1
        image = images.get(each['image_id'])
        why = _why_dropped(box, each['area'], image)
        dropped[why] += 1
        is_read = masks and image and (measured or not why)
        wrong = is_read and _wrong_mask(each, image, measured)
        if wrong:
            fail(f'{path}: annotation {each["id"]} has {wrong}')
    del dropped[None]
    return count, dropped


def _wrong_mask(annotation, image, measured=False):
    """What pycocotools would make nonsense of, or die of; None if nothing.

    mmdet itself ignores objects whose polygons have no three points, and RLEs
    that lack a part; what is measured goes to pycocotools as it is.
    """
    mask = annotation.get('segmentation')
    if not mask:
        return "no 'segmentation', which with_mask=True reads"
    if isinstance(mask, list):
        for polygon in mask:
            if not _is_polygon(polygon):
                text = repr(polygon)
                text = text if len(text) < 60 else f'{text[:57]}...'
                return (
                    f'the polygon {text}, expected a list of numbers x, y, '
                    f'x, y, ... between -{FAR} and {FAR}'
                )
            if _length_of_outline(polygon) > 4 * FAR:
                return (
                    f'a polygon whose outline is longer than {4 * FAR} '
                    'pixels, that of the largest image'
                )
        # by the first, pycocotools tells polygons from boxes
        if measured and len(mask[0]) < 6:
            return f'the polygon {mask[0]}, expected three points or more'
        return None
    if not isinstance(mask, dict):
        return f'the segmentation {mask!r}, expected polygons or an RLE'
    counts, size = mask.get('counts'), mask.get('size')
    if counts is None or size is None:
        if measured:
            return f'an RLE of the keys {list(mask)}, expected size and counts'
        return None  # mmdet ignores the object
    if size != [image['height'], image['width']]:
        return (
            f'an RLE of size {size}, expected that of its image, '
            f'{[image["height"], image["width"]]}'
        )
    if isinstance(counts, str):
        counts = _decompress(counts)
    elif not isinstance(counts, list):
        return f'an RLE with the counts {counts!r}, expected a list or text'
    good = _finite(*counts) and all(
        count >= 0 and count % 1 == 0 for count in counts
    )
    if not good or sum(counts) != size[0] * size[1]:
        return (
            'an RLE whose counts are no whole numbers that add up to the '
            f'{size[0] * size[1]} pixels of its image'
        )
    return None


def _decompress(text):
    """The counts in a compressed RLE; none if pycocotools cannot read it.

    Each is written by five bits a character, the lowest first, as what it
    differs from the last but one. pycocotools would read on behind the end.
    """
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - ord('0')
        if not 0 <= bits < 64 or shift > 60:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more follow
            continue
        if bits & 16:  # it is negative
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = shift = 0
    return [] if shift else counts


def _is_polygon(points):
    """Whether all are numbers of pixels. Fast: COCO has twenty million."""
    if not isinstance(points, list):
        return False
    try:
        total = sum(points)  # NaN if one is, which min and max may miss
        return not points or (
            total == total and -FAR < min(points) <= max(points) < FAR
        )
    except TypeError:
        return False


def _length_of_outline(points):
    """At most so many pixels, for which pycocotools takes memory.

    Only long ones, of which COCO has none, are worth measuring.
    """
    bound = len(points) * (max(points, default=0) - min(points, default=0))
    if bound < FAR:
        return bound
    x, y = np.array(points[: len(points) // 2 * 2]).reshape(-1, 2).T
    return np.maximum(abs(x - np.roll(x, 1)), abs(y - np.roll(y, 1))).sum()


def _build_evaluator(build, cfg, dataset, key):
    """Build an evaluator, and check the json that it takes for the truth.

    Args:
        build (callable): builds it.
        cfg (dict | list[dict]): of the evaluator, or of its metrics.
        dataset (Dataset): the images to evaluate; None if unknown.
        key (str): of the evaluator in the config.
    """
    each = [metric for metric in _metrics(cfg) if isinstance(metric, dict)]
    files = ', '.join(m['ann_file'] for m in each if m.get('ann_file'))
    what = f'{key}.ann_file: {files}' if files else key
    with user_errors(what, RecursionError):
        evaluator = build(cfg)
    metrics = evaluator.metrics
    if hasattr(evaluator, 'dataset_prefixes'):  # MultiDatasetsEvaluator
        # it measures each data set of a ConcatDataset by a metric of its own
        datasets = getattr(dataset, 'datasets', [None] * len(metrics))
    else:
        datasets = [dataset] * len(metrics)
    for settings, metric, each in zip(_metrics(cfg), metrics, datasets):
        coco = getattr(metric, '_coco_api', None)
        is_coco = coco and hasattr(metric, 'metrics')  # mmdet's CocoMetric
        if is_coco and isinstance(settings, dict):
            _check_truth(coco.dataset, metric.metrics, settings, each, key)
    return evaluator


def _check_truth(content, kinds, settings, dataset, key):
    """Refuse a json by which nothing, or something else, is measured.

    Args:
        content (dict): what the json holds.
        kinds (list[str]): what is measured, such as ``'segm'``.
        settings (dict): of the metric.
        dataset (Dataset): the images to evaluate; None if unknown.
        key (str): of the evaluator in the config.
    """
    path = settings['ann_file']
    _check_entries(content, path, optional=('annotations',))
    for index, each in enumerate(content.get('annotations', ())):
        if 'iscrowd' not in each:
            fail(
                f'{path}: annotations[{index}] (id {each["id"]}) has no '
                "'iscrowd', which COCO's evaluation reads"
            )
    metainfo = getattr(dataset, 'metainfo', None)
    # a ConcatDataset of several kinds has a list of them
    classes = metainfo.get('classes') if isinstance(metainfo, dict) else None
    if classes is None:
        return
    by_file = not settings.get('sort_categories')
    _check_names(classes, content['categories'], path, key, by_file)
    _check_boxes(content, classes, path, 'segm' in kinds, measured=True)
    if path == getattr(dataset, 'ann_file', path):
        return
    images = {each['id']: each['file_name'] for each in content['images']}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        number, image = info['img_id'], info['img_path']
        other = images.get(number)
        if other is None or osp.basename(other) != osp.basename(image):
            found = 'no image' if other is None else f'the image {other}'
            fail(
                f'{key}.ann_file: {path} has {found} of id {number}, which '
                f'is {image} in the data set'
            )


def _check_names(wanted, categories, path, key, by_file):
    """Refuse classes that mmdet would number otherwise than they are listed.

    Args:
        wanted (Sequence[str]): the classes.
        categories (list[dict]): those of the json.
        path (str): the json.
        key (str): what reads it, in the config.
        by_file (bool): whether classes are numbered in the json's order.
    """
    names = [each['name'] for each in categories]
    known = set(names)
    missing = [name for name in wanted if name not in known]
    if missing:
        close = difflib.get_close_matches(missing[0], names, 1)
        hint = f', did you mean {close[0]!r}?' if close else '.'
        fail(
            f'{key}.metainfo.classes: {path} has no category '
            f'{missing[0]!r}{hint} It has '
            f'{_list(names, "category", "categories")}'
        )
    asked = set(wanted)
    names = [name for name in names if name in asked]
    for name, count in Counter(names).items():
        if count > 1:
            fail(f'{path} has {count} categories of the name {name!r}')
    if by_file and names != list(wanted):
        fail(
            f'{key}.metainfo.classes: {", ".join(wanted)} must come in the '
            f'order of the categories of {path}, by which mmdet numbers '
            f'them: {", ".join(names)}'
        )


def _finite(*values, limit=math.inf):
    return all(
        isinstance(value, (int, float)) and -limit < value < limit
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


def _load_image(step, ann_file, results):
    """Load an image, and compare its size with what the json says, if any.

    Boxes are cut and dropped by the size in the json.
    """
    path = results['img_path']
    listed = results.get('height'), results.get('width')
    with _reading(f'the image {path}'):
        loaded = type(step).transform(step, results)
    if ann_file and loaded and tuple(loaded['ori_shape'][:2]) != listed:
        swapped = tuple(loaded['ori_shape'][1::-1]) == listed
        hint = ' after the rotation that its EXIF data asks for'
        raise DataError(
            f'{ann_file}: the image of id {results["img_id"]} has '
            f'{_size(listed)} pixels, but {path} has '
            f'{_size(loaded["ori_shape"])}'
            f'{hint if swapped and _is_turned(path) else ""}'
        )
    return loaded


def _is_turned(path):
    """Whether a photo says that it is to be shown with its sides swapped."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # elsewhere, or PIL cannot read it


def _load_label_map(step, results):
    """Load a label map, and compare its size with that of its image."""
    path = results.get('seg_map_path')
    if path is None:
        return type(step).transform(step, results)
    with _reading(f'the label map {path}'):
        results = type(step).transform(step, results)
        _check_png(path)
    labels = results['gt_seg_map']
    if labels.ndim > 2:
        raise DataError(
            f'the label map {path} has {labels.shape[-1]} channels, expected '
            'one, of labels'
        )
    if labels.ndim < 2:  # mmseg leaves out sides of length one
        raise DataError(
            f'the label map {path} is one pixel high or wide, expected more'
        )
    size = results.get('ori_shape', labels.shape)
    if labels.shape != tuple(size):
        raise DataError(
            f'the label map {path} has {_size(labels.shape)} pixels, but the '
            f'image {results["img_path"]} has {_size(size)}'
        )
    if labels.dtype == np.uint8 and not _is_remote(step.backend_args):
        _check_depth(path)
    return results


def _check_png(path):
    """Refuse a PNG with a flipped bit, which Pillow reads all the same."""
    if not osp.isfile(path):
        return  # elsewhere
    with open(path, 'rb') as file:
        if file.read(8) != b'\x89PNG\r\n\x1a\n':
            return
        kind = b''
        while kind != b'IEND':
            length = int.from_bytes(file.read(4), 'big')
            content = file.read(4 + length)
            kind = content[:4]
            crc = int.from_bytes(file.read(4), 'big')
            if not kind or crc != zlib.crc32(content):
                raise ValueError(f'the part {kind} does not have its CRC')


def _check_depth(path):
    """Refuse labels of more than eight bits, of which mmseg keeps the last.

    Those of -1 and of 65535 are meant to be ignored, and become 255.
    """
    try:
        with Image.open(path) as image:
            # 16 or 32 bits; this reads no pixels
            if image.mode[0] not in 'IF':
                return
            labels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # PIL reads less than OpenCV, which has read it
    # not >= 0 is NaN, too
    good = (labels >= 0) & (labels <= 255) | (labels % 256 == IGNORED)
    if not good.all():
        raise DataError(
            f'the label map {path} holds the value {labels[~good].max()}, but '
            'mmseg reads labels from 0 to 255'
        )


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
