"""Files that attack, and files that are broken, through every way in.

No payload of a checkpoint runs; and whatever is wrong with a checkpoint or
with the data ends in one line that names the file, or is left out as mmdet and
mmseg say, never in a number that is silently wrong. More cases are in
test_checkpoint.py, test_tools_checkpoints.py and test_tools_data.py.
"""

import copy
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, save_untrained
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.registry import METRICS
from mmengine.runner import Runner, load_checkpoint
from test_checkpoint import Call, dumps
from test_checkpoint import make_runner as make_small_runner
from test_tools import SEGMENTOR, SHAPES, environment, shapes_options
from test_tools_data import (
    IMAGE,
    JSON,
    LABEL_MAP,
    boxes,
    check,
    data,  # noqa: F401  (a fixture)
    drawn,  # noqa: F401
    drop,
    edit,
    make_runner,
    maps,
    message_of,
    put,
)

pytestmark = pytest.mark.usefixtures('one_thread')

# Payloads: where in a checkpoint they are, how it is stored, what loads it

RUN = dict(
    meta=dict(epoch=1, iter=4),
    message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
    optimizer=dict(state={}, param_groups=[]),
    param_schedulers=[],
    state_dict=OrderedDict(),
)


def inside(*keys):
    """A checkpoint of a run that holds the payload under these keys."""

    def place(payload):
        for key in reversed(keys):
            payload = {key: payload}
        (key, value), *_ = payload.items()
        if isinstance(value, dict):
            value = {**RUN.get(key, {}), **value}
        return {**RUN, key: value}

    return place


def history(payload):
    buffer = HistoryBuffer([1.0], [1])
    buffer.more = payload
    return buffer


def attribute(payload):
    state = OrderedDict()
    state._metadata = payload
    return state


def objects(payload):
    array = np.empty(1, object)
    array[0] = payload
    return array


PLACES = {
    'top level': lambda payload: payload,
    'key': lambda payload: {**RUN, 'x': {payload: 1}},
    'state_dict': inside('state_dict'),
    'weight': inside('state_dict', 'neck.weight'),
    'attribute of state_dict': lambda p: {**RUN, 'state_dict': attribute(p)},
    'meta': inside('meta'),
    'meta.cfg': inside('meta', 'cfg'),
    'meta.dataset_meta': inside('meta', 'dataset_meta', 'classes'),
    'message_hub': inside('message_hub'),
    'history of losses': lambda p: inside('message_hub', 'log_scalars', 'x')(
        history(p)
    ),
    'runtime_info': inside('message_hub', 'runtime_info', 'best_score'),
    'optimizer': inside('optimizer'),
    'state of optimizer': inside('optimizer', 'state', 0),
    'param_schedulers': lambda p: {**RUN, 'param_schedulers': [p]},
    'ema_state_dict': inside('ema_state_dict'),
    'key of a hook': inside('my_hook'),
    'array of objects': lambda p: {**RUN, 'x': objects(p)},
}


def as_zip(value, file):
    torch.save(value, file)


def as_legacy(value, file):
    file.write_bytes(dumps(value))


def as_pickle(value, file):
    file.write_bytes(pickle.dumps(value))


def as_first_pickle(value, file):
    """In the place of the magic number that begins torch's old format."""
    file.write_bytes(pickle.dumps(value, 2) + dumps({}))


def as_tar(value, file):
    """As the oldest torch saved."""
    with tarfile.open(file, 'w') as tar:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            content = pickle.dumps(value, 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_torchscript(value, file):
    """A zip with the member that makes torch take it for a program."""
    torch.save(value, file)
    with zipfile.ZipFile(file, 'a') as archive:
        top = archive.namelist()[0].split('/')[0]
        archive.writestr(f'{top}/constants.pkl', pickle.dumps(value))


def as_odd_zip(value, file):
    """A zip of other members, among them one that wants to leave its folder"""
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('x/data.pkl', pickle.dumps(value, 2))
        archive.writestr('x/version', '3')
        archive.writestr('x/../../marker', 'x')


FORMATS = [
    as_zip,
    as_legacy,
    as_pickle,
    as_first_pickle,
    as_tar,
    as_torchscript,
    as_odd_zip,
]


class World:
    """What a case may damage, and the ways in."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.file = folder / 'hostile.pth'
        self.data = folder / 'shapes'
        self.marker = folder / 'marker'
        self.segmentor = folder / 'segmentor.py'
        self.patch = monkeypatch

    def tool(self, name, *words):
        """Run a tool here, which must fail; return the message."""
        self.patch.syspath_prepend(ROOT / 'tools/analysis')
        self.patch.chdir(ROOT)
        self.patch.setattr(sys, 'argv', [name, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            import_module(name).main()
        return message_of(caught)

    def train(self, *options, config=SHAPES, resume=()):
        words = ['--work-dir', self.folder / 'work', *resume]
        options = shapes_options(self.data, *options)
        message = self.tool('train', config, *words, *options)
        assert not (self.folder / 'work').exists()  # nothing was written
        return message

    def write_segmentor(self):
        text = SEGMENTOR.format(root=str(self.data))
        self.segmentor.write_text(text)
        return self.segmentor


@pytest.fixture
def world(data, monkeypatch):  # noqa: F811
    return World(data.parent, monkeypatch)


def python_error(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmdet's, about defaults
        with pytest.raises(RuntimeError) as caught:
            function(*args, **kwargs)
    return str(caught.value)


def from_work_dir(world):
    folder = world.folder / 'earlier'
    folder.mkdir()
    world.file = world.file.rename(folder / 'epoch_1.pth')
    (folder / 'last_checkpoint').write_text(str(world.file))
    words = [SHAPES, '--work-dir', folder, '--resume']
    return world.tool('train', *words, *shapes_options(world.data))


def pretrained(world):
    config = world.folder / 'config.py'
    init_cfg = dict(type='Pretrained', checkpoint=str(world.file))
    config.write_text(
        f'_base_ = {str(ROOT / SHAPES)!r}\n'
        f'model = dict(neck=dict(init_cfg={init_cfg}))\n'
    )
    message = world.train(config=config)
    assert message.endswith('--cfg-options model.neck.init_cfg=None')
    return message


def infer(kind, package, world):
    cls = getattr(import_module(f'{package}.apis'), kind)
    config = ROOT / SHAPES if package == 'mmdet' else world.write_segmentor()
    return python_error(cls, str(config), str(world.file), device='cpu')


WAYS_IN = {
    'load_checkpoint': lambda w: python_error(
        load_checkpoint, torch.nn.Linear(1, 1), str(w.file)
    ),
    'train --resume FILE': lambda w: w.train(resume=['--resume', w.file]),
    'train --resume': from_work_dir,
    'train load_from': lambda w: w.train(f'load_from={w.file}'),
    'train init_cfg': pretrained,
    'test': lambda w: w.tool('test', SHAPES, w.file, *shapes_options(w.data)),
    'export_onnx': lambda w: w.tool(
        'export_onnx', w.write_segmentor(), w.file
    ),
    'visualize_kernels': lambda w: w.tool(
        'visualize_kernels', SHAPES, w.file, w.data / IMAGE
    ),
    'contact_sheet': lambda w: w.tool(
        'contact_sheet', SHAPES, w.file, '--data-root', w.data
    ),
    'DetInferencer': lambda w: infer('DetInferencer', 'mmdet', w),
    'MMSegInferencer': lambda w: infer('MMSegInferencer', 'mmseg', w),
    'init_detector': lambda w: infer('init_detector', 'mmdet', w),
    'init_model': lambda w: infer('init_model', 'mmseg', w),
}


@pytest.mark.parametrize(
    ('place', 'store', 'way_in'),
    [
        *((place, as_zip, 'load_checkpoint') for place in PLACES),
        *((place, as_legacy, 'load_checkpoint') for place in PLACES),
        *(('meta', store, 'load_checkpoint') for store in FORMATS[2:]),
        *(('key of a hook', as_zip, way) for way in [*WAYS_IN][1:]),
    ],
    ids=lambda value: getattr(value, '__name__', value),
)
@pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated')
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False')
def test_no_payload_runs(world, place, store, way_in):
    payload = Call(os.mkdir, str(world.marker))
    store(PLACES[place](payload), world.file)
    message = WAYS_IN[way_in](world)
    reason = r'it would run \w+\.mkdir, and it may only hold data'
    if store not in (as_zip, as_legacy) or place == 'array of objects':
        reason = ''  # torch refuses the file, or numpy objects, as such
    assert re.match(
        f'cannot load the checkpoint {world.file}: {reason}', message
    )
    assert not world.marker.exists()
    if store in (as_zip, as_legacy):
        torch.load(world.file, weights_only=False)
    elif store is as_odd_zip:
        with zipfile.ZipFile(world.file) as archive:
            pickle.loads(archive.read('x/data.pkl'))
    elif store in (as_pickle, as_first_pickle):
        pickle.loads(world.file.read_bytes())
    else:
        return  # what could run it is no longer a function of torch
    assert world.marker.exists()  # the payload was a real one


# Payloads of another kind than pickled calls


def text_of(marker):
    """Python's, in the place of a config."""
    return f'import os\nos.mkdir({str(marker)!r})\n'


def test_config_in_a_checkpoint_is_not_run_by_resuming(tmp_path):
    """Runner.resume would run it to learn the number of GPUs."""
    marker = tmp_path / 'marker'
    make_small_runner(tmp_path, max_epochs=1).train()
    file = tmp_path / 'epoch_1.pth'
    saved = torch.load(file, weights_only=False)
    saved['meta']['config'] = text_of(marker)
    torch.save(saved, file)
    runner = make_small_runner(
        tmp_path / 'again', load_from=str(file), resume=True
    )
    runner.train()
    assert runner.epoch == 2
    assert not marker.exists()


@pytest.mark.parametrize('place', ['meta', 'message_hub.runtime_info'])
def test_config_in_a_checkpoint_is_not_run_by_inferencers(world, place):
    text = text_of(world.marker)
    torch.save(inside(*place.split('.'), 'cfg')(text), world.file)

    class Inferencer(BaseInferencer):
        _init_pipeline = visualize = postprocess = None

    message = python_error(
        Inferencer, weights=str(world.file), device='cpu', scope='mmdet'
    )
    assert message == (
        f'the config in the checkpoint {world.file} is not run: name a '
        'config, model=CONFIG'
    )
    assert not world.marker.exists()


def test_statistics_of_losses_are_not_replaced(world):
    """Unpickling a history would change those of the class, for all."""
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    buffer._statistics_methods = dict(mean=HistoryBuffer.max, min=None)
    torch.save({'state_dict': {}, 'x': buffer}, world.file)
    load_checkpoint(torch.nn.Linear(1, 1), str(world.file))
    other = HistoryBuffer([1.0, 3.0], [1, 1])
    assert other.statistics('mean') == 2
    assert other.statistics('min') == 1


@METRICS.register_module()
class Growing(BaseMetric):
    score = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Growing.score += 1
        return dict(score=Growing.score)


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_resuming_removes_no_foreign_file(tmp_path, kind):
    """The best checkpoint so far has the name that a checkpoint says."""
    thesis = tmp_path / 'thesis'
    thesis.mkdir()
    (thesis / 'thesis.tex').touch()

    def run(folder, **kwargs):
        runner = make_small_runner(
            folder,
            val_dataloader=dict(
                dataset=[dict(inputs=torch.rand(2))] * 2,
                sampler=dict(type='DefaultSampler', shuffle=False),
                batch_size=2,
            ),
            val_cfg=dict(),
            val_evaluator=dict(type='Growing'),
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook', save_best='score', rule='greater'
                )
            ),
            **kwargs,
        )
        runner.model.val_step = lambda batch: [0]
        runner.train()

    import_module('_checkpoints')  # its hook is mmengine's from now on
    run(tmp_path / 'first', max_epochs=1)
    file = tmp_path / 'first/epoch_1.pth'
    saved = torch.load(file, weights_only=False)
    saved['message_hub']['runtime_info']['best_ckpt'] = str(
        thesis if kind == 'folder' else thesis / 'thesis.tex'
    )
    torch.save(saved, file)
    run(tmp_path / 'again', load_from=str(file), resume=True, max_epochs=3)
    assert (thesis / 'thesis.tex').exists()
    # its own it still replaces
    best = [path.name for path in (tmp_path / 'again').glob('best*')]
    assert best == ['best_score_epoch_3.pth']


# Checkpoints that hold only data, but the wrong ones


@pytest.fixture(scope='module')
def saved():
    """What a run of the shapes config saves."""
    cfg = Config.fromfile(ROOT / SHAPES)
    cli = import_module('_cli')
    cfg.launcher = 'none'
    model = cli.build_model(cfg)
    optimizer = cli.build_optimizer(cfg, model).state_dict()
    return {**RUN, 'state_dict': model.state_dict(), 'optimizer': optimizer}


CONV = 'neck.lateral_convs.0.conv.weight'
STEM = 'backbone.conv1.weight'
VARIANCE = 'backbone.bn1.running_var'
NANS = torch.full((32,), torch.nan)
HOLDS = '{file} holds '
NO_STEP = (
    '--resume: {file} holds a state of the optimizer with which it makes no '
    r'step \('
)


def informed(**runtime_info):
    return dict(
        message_hub=dict(
            log_scalars={}, resumed_keys={}, runtime_info=runtime_info
        )
    )


def weights(changed):
    return lambda content: content['state_dict'].update(changed)


def momentum(content, value):
    content['optimizer']['state'] = {
        0: dict(
            step=torch.tensor(1.0),
            exp_avg=value,
            exp_avg_sq=value,
            momentum_buffer=value,
        )
    }


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(meta=[1]), HOLDS + 'a list as its meta, expected a dict'),
        (dict(meta={}), HOLDS + 'a NoneType as its meta.epoch'),
        (dict(meta=dict(epoch='1', iter=4)), HOLDS + 'a str as its meta.epo'),
        (dict(meta=dict(epoch=1)), HOLDS + 'a NoneType as its meta.iter'),
        (dict(meta=dict(epoch=-5, iter=4)), HOLDS + '-5 as its meta.epoch, '),
        (dict(meta=dict(epoch=True, iter=4)), HOLDS + 'True as its meta.epo'),
        (
            dict(meta=dict(epoch=1, iter=4, seed='x')),
            HOLDS + 'a str as its meta.seed, expected a whole number',
        ),
        (
            dict(meta=dict(epoch=1, iter=4, time=5)),
            HOLDS + '5 as its meta.time, expected text',
        ),
        (dict(message_hub=3), HOLDS + '3 as its message_hub'),
        (
            dict(message_hub=dict(log_scalars={}, runtime_info={})),
            HOLDS + 'a NoneType as its message_hub.resumed_keys',
        ),
        (
            informed(best_score='x'),
            HOLDS + 'a str as its message_hub.runtime_info.best_score, exp',
        ),
        (
            informed(best_score=float('nan')),
            HOLDS + 'nan as its message_hub.runtime_info.best_score, exp',
        ),
        (
            informed(keep_ckpt_ids=3),
            HOLDS + '3 as its message_hub.runtime_info.keep_ckpt_ids, exp',
        ),
        (dict(optimizer=[1]), HOLDS + 'a list as its optimizer'),
        (
            dict(optimizer=dict(param_groups=[1])),
            '--resume: {file} holds no state of an optimizer',
        ),
        (
            dict(optimizer=dict(param_groups=[])),
            '--resume: {file} is from a run with another optim_wrapper',
        ),
        (
            lambda s: s['optimizer']['param_groups'][0].update(lr='x'),
            NO_STEP + r'\w+Error: ',
        ),
        (
            lambda s: momentum(s, torch.zeros(1, 2, 3)),
            NO_STEP + 'RuntimeError: .* size',
        ),
        (
            lambda s: momentum(s, s['state_dict'][STEM] * torch.nan),
            NO_STEP + 'the weights become NaN',
        ),
        (
            dict(param_schedulers='x'),
            HOLDS + 'a str as its param_schedulers, expected a list of their',
        ),
        (
            dict(param_schedulers=[dict(last_step='x')]),
            HOLDS + 'a list as its param_schedulers, expected a list of their',
        ),
        (dict(ema_state_dict=[1]), HOLDS + 'a list as its ema_state_dict'),
        (
            dict(ema_state_dict={f'module.{CONV}': torch.zeros(1)}),
            '--resume: {file} does not fit this config: ',
        ),
        (
            dict(ema_state_dict={f'module.{VARIANCE}': NANS}),
            HOLDS + 'NaN or infinite values in ' + VARIANCE,
        ),
        (dict(state_dict=7), HOLDS + 'a int as its state_dict'),
        (
            lambda s: setattr(s['state_dict'], '_metadata', 5),
            HOLDS + 'no dict as the _metadata of its state_dict',
        ),
        (weights({1: NANS}), HOLDS + 'the name 1 in its state_dict'),
        (
            weights({CONV: 'x'}),
            '--resume: {file} does not fit this config: .* ' + CONV,
        ),
        (weights({VARIANCE: NANS}), HOLDS + 'NaN or inf.* in ' + VARIANCE),
        (weights({VARIANCE: torch.ones(32) / 0}), HOLDS + 'NaN or inf'),
        (
            weights({VARIANCE: torch.ones(32).double() * 1e300}),
            HOLDS + 'NaN or inf',
        ),
        (
            weights({VARIANCE: torch.ones(32) * 1j}),
            HOLDS + VARIANCE + r' \(torch.complex64\), expected floating',
        ),
        (
            weights({VARIANCE: torch.ones(32) > 0}),
            HOLDS + VARIANCE + r' \(torch.bool\), expected floating point',
        ),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else '',
)
def test_nothing_is_resumed_from_nonsense(world, saved, change, message):
    content = copy.deepcopy(saved)
    content.update(change) if isinstance(change, dict) else change(content)
    torch.save(content, world.file)
    printed = world.train(resume=['--resume', world.file])
    assert re.match(message.format(file=world.file), printed)


def test_an_optimizer_for_gpus_alone_is_not_tried():
    class OnGPUs(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError('no CUDA')

    optimizer = OnGPUs(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    try_step = import_module('_checkpoints')._try_step
    assert try_step(optimizer.state_dict(), OptimWrapper(optimizer)) is None


def test_nan_is_not_tested(world, saved):
    state = {**saved['state_dict'], VARIANCE: NANS}
    torch.save(state, world.file)
    message = WAYS_IN['test'](world)
    assert message == (
        f'{world.file} holds NaN or infinite values in {VARIANCE}'
    )


# The data: what is read, how it is damaged, what is said


def train_on(scope, dataset, world, train=True):
    """Load a data set, train; return the error, or else the warnings."""
    lines = []
    module = import_module('_data')
    world.patch.setattr(
        module, 'print_log', lambda line, *a: lines.append(line)
    )
    try:
        check(dataset, scope)
        runner = make_runner(world.folder, dataset, scope)
        with module.guarded(runner, 'train'):
            if train:
                runner.train()
    except SystemExit as error:
        return error.code
    return '; '.join(lines) or 'nothing'


def detect(world):
    return train_on('mmdet', boxes(world.data), world)


def segment(world):
    return train_on('mmseg', maps(world.data), world)


def masks(world):
    dataset = boxes(world.data)
    dataset['pipeline'][1]['with_mask'] = True
    # Where no error is found now, training might take all memory.
    return train_on('mmdet', dataset, world, train=False)


def evaluate(world):
    """Measure boxes and masks, where the truth may be another file."""
    return evaluate_by(world, boxes(world.data, test_mode=True), coco(world))


def evaluate_metrics(world):
    """As evaluate, but the metrics are inside of an evaluator."""
    dataset = boxes(world.data, test_mode=True)
    return evaluate_by(world, dataset, dict(metrics=[coco(world)]))


def evaluate_two(world):
    """Measure two data sets of other classes; the truth is the second's."""
    first, second = (boxes(world.data, test_mode=True) for _ in range(2))
    first['metainfo'] = dict(classes=('disk',))
    json = dict(coco(world), ann_file=str(world.data / JSON))
    evaluator = dict(
        type='MultiDatasetsEvaluator',
        metrics=[json, coco(world)],
        dataset_prefixes=['first', 'second'],
    )
    dataset = dict(type='ConcatDataset', datasets=[first, second])
    return evaluate_by(world, dataset, evaluator)


def coco(world):
    truth = world.data / TRUTH
    return dict(
        type='CocoMetric',
        metric=['bbox', 'segm'],
        ann_file=str(truth if truth.exists() else world.data / JSON),
    )


def evaluate_by(world, dataset, evaluator):
    runner = Runner(
        model=torch.nn.Linear(1, 1),
        work_dir=str(world.folder / 'work'),
        test_dataloader=dict(
            dataset=dataset,
            sampler=dict(type='DefaultSampler', shuffle=False),
            num_workers=0,
        ),
        test_cfg=dict(),
        test_evaluator=evaluator,
        default_scope='mmdet',
        experiment_name=str(world.folder).replace('/', '_'),
        cfg=Config(dict(model=dict(type='Model'))),
        log_level='ERROR',
    )
    try:
        with import_module('_data').guarded(runner, 'test'):
            return 'nothing'
    except SystemExit as error:
        return error.code


def contact_sheet(world):
    save_untrained(SHAPES, world.folder)
    weights = world.folder / f'{Path(SHAPES).stem}.pth'
    words = [SHAPES, weights, '--data-root', world.data, '--images', 4]
    message = world.tool('contact_sheet', *words)
    return f'error: {message}'


def visualize_kernels(world):
    words = [SHAPES, 'none.pth', world.data / IMAGE]
    return f'error: {world.tool("visualize_kernels", *words)}'


TRUTH = 'annotations/truth.json'
TEST_IMAGE = 'images/validation/00000.jpg'


def write(name, content):
    def damage(root):
        (root / name).write_bytes(content)

    return damage


def cut(name, share):
    def damage(root):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: int(len(whole) * share)])

    return damage


def flip(name, at):
    """Flip a bit."""

    def damage(root):
        content = bytearray((root / name).read_bytes())
        content[at] ^= 1
        (root / name).write_bytes(content)

    return damage


def encoded(suffix, shape, dtype=np.uint8, value=0):
    return cv2.imencode(suffix, np.full(shape, value, dtype))[1].tobytes()


def cut_end(root):
    """A label map that ends where its last part would begin."""
    (root / LABEL_MAP).write_bytes((root / LABEL_MAP).read_bytes()[:-12])


def folder(name):
    def damage(root):
        path = root / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
        path.mkdir()

    return damage


def claim(width, height):
    """A PNG of a few bytes that says it is as large as that."""

    def chunk(kind, content):
        check = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + check

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        chunk(*each)
        for each in [
            (b'IHDR', header),
            (b'IDAT', zlib.compress(bytes(99))),
            (b'IEND', b''),
        ]
    )


def change(*changes):
    """Change the json of the boxes."""
    return lambda root: [edit(root, each) for each in changes]


def text(function):
    """Change the json's bytes."""
    return lambda root: (root / JSON).write_bytes(
        function((root / JSON).read_bytes())
    )


def again(part, index, **values):
    """Append an entry that differs from one in some values."""
    return lambda content: content[part].append(
        {**content[part][index], **values}
    )


def truth(*changes):
    """Measure against a changed copy of the json."""

    def damage(root):
        shutil.copy(root / JSON, root / TRUTH)
        content = json.loads((root / TRUTH).read_text())
        for each in changes:
            each(content)
        (root / TRUTH).write_text(json.dumps(content))

    return damage


def mask(value):
    return change(put('annotations', 3, segmentation=value))


def label_map(suffix='.png', shape=(96, 96), dtype=np.uint8, value=0):
    return write(LABEL_MAP, encoded(suffix, shape, dtype, value))


def image(shape, suffix='.jpg', dtype=np.uint8):
    return write(IMAGE, encoded(suffix, shape, dtype))


NOTHING = 'nothing$'
UNREADABLE = 'error: cannot read the image {data}/' + IMAGE + ': '
UNREADABLE_MAP = 'error: cannot read the label map {data}/' + LABEL_MAP + ': '
THE_MAP = 'error: the label map {data}/' + LABEL_MAP
IN_JSON = 'error: {data}/' + JSON
IN_TRUTH = 'error: {data}/' + TRUTH
CLASSES = 'error: (train|test)_dataloader.dataset.metainfo.classes: '
SIZE = IN_JSON + ': the image of id 3 has 96 x 96 pixels, but {data}/' + IMAGE
NO_IMAGE = 'error: train_dataloader.dataset holds no image: '
RLE = dict(size=[96, 96])
NAN, INF = float('nan'), float('inf')

PNG = write(IMAGE, encoded('.png', (96, 96, 3)))

# Images
IMAGES = [
    (detect, cut(IMAGE, 0.5), UNREADABLE),
    (detect, cut(IMAGE, 0.99), UNREADABLE),
    (segment, cut(IMAGE, 0.99), UNREADABLE),
    (segment, write(IMAGE, encoded('.png', (96, 96))[:-40]), UNREADABLE),
    (
        segment,
        lambda root: [damage(root) for damage in (PNG, flip(IMAGE, -14))],
        UNREADABLE,
    ),
    (segment, PNG, NOTHING),
    (detect, folder(IMAGE), UNREADABLE + 'IsADirectoryError'),
    (detect, write(IMAGE, claim(10**5, 10**5)), UNREADABLE),
    (detect, image((1, 1, 3)), SIZE + ' has 1 x 1'),
    (detect, image((48, 96, 3)), SIZE + ' has 96 x 48'),
    (
        segment,
        image((1, 1, 3)),
        THE_MAP + ' has 96 x 96 pixels, but the image',
    ),
    # mmcv reads them as colours
    (detect, image((96, 96)), NOTHING),
    (detect, image((96, 96, 4), '.png'), NOTHING),
    (segment, image((96, 96), '.png', np.uint16), NOTHING),
    (
        detect,
        folder('images/training'),
        'error: cannot read the image .*0.jpg',
    ),
    (segment, folder('images/training'), NO_IMAGE),
    (
        contact_sheet,
        cut(TEST_IMAGE, 0.5),
        UNREADABLE.replace(IMAGE, TEST_IMAGE),
    ),
    (
        contact_sheet,
        write('annotations/instances_validation.json', b'{"a"}'),
        'error: {data}/annotations/instances_validation.json: JSONDecodeError',
    ),
    (
        visualize_kernels,
        cut(IMAGE, 0.5),
        'error: image: expected an image, {data}/' + IMAGE,
    ),
]

# Label maps
MAPS = [
    (segment, cut(LABEL_MAP, 0.5), UNREADABLE_MAP),
    (segment, cut(LABEL_MAP, 0), UNREADABLE_MAP),
    (
        segment,  # of the sum of the labels, which Pillow does not read
        flip(LABEL_MAP, -14),
        UNREADABLE_MAP + "ValueError: the part b'IDAT' does not have its CRC",
    ),
    (segment, cut_end, UNREADABLE_MAP + "ValueError: the part b'' does not"),
    (segment, folder(LABEL_MAP), UNREADABLE_MAP),
    (
        segment,
        folder('annotations/training'),
        'error: .* label map .*/00000.p',
    ),
    (segment, write(LABEL_MAP, claim(10**5, 10**5)), UNREADABLE_MAP),
    (segment, label_map(shape=(1, 1)), THE_MAP + ' is one pixel high or wide'),
    (
        segment,
        label_map(shape=(96, 1)),
        THE_MAP + ' is one pixel high or wide',
    ),
    (segment, label_map(shape=(96, 48)), THE_MAP + ' has 48 x 96 pixels'),
    (segment, label_map(shape=(96, 96, 4)), THE_MAP + ' has 4 channels'),
    (segment, label_map(value=7), THE_MAP + ' holds the value 7'),
    (
        segment,  # mmseg would keep its last eight bits: label 1
        label_map(dtype=np.uint16, value=257),
        THE_MAP + ' holds the value 257, but mmseg reads labels from 0 to 255',
    ),
    (segment, label_map(dtype=np.uint16, value=3), NOTHING),
    # to be ignored: the last eight bits are 255
    (segment, label_map(dtype=np.uint16, value=65535), NOTHING),
    (segment, label_map('.tiff', dtype=np.int32, value=-1), NOTHING),
    (
        segment,  # of which they are label 1
        label_map('.tiff', dtype=np.int32, value=-255),
        THE_MAP + ' holds the value -255, but mmseg reads labels from 0',
    ),
    (
        segment,
        label_map('.tiff', dtype=np.float32, value=300),
        THE_MAP + ' holds the value 300.0, but mmseg reads labels from 0',
    ),
]

# Boxes in a json
BOXES = [
    (detect, write(JSON, b''), 'error: .*ann_file: {data}/.* is empty'),
    (detect, write(JSON, b'[]'), IN_JSON + ': AssertionError: .*format'),
    (detect, text(lambda b: b[: len(b) // 2]), 'error: .* not a whole JSON'),
    (detect, text(lambda b: b[: len(b) // 2] + b'}'), IN_JSON + ': JSONDec'),
    (
        detect,
        text(lambda b: b'\xef\xbb\xbf' + b),
        'error: .* not a whole JSON',
    ),
    (
        detect,
        text(lambda b: b.decode().encode('utf-16')),
        'error: .* whole JS',
    ),
    (
        detect,
        text(lambda b: b.replace(b'disk', b'd\xefsk')),
        IN_JSON + ': Uni',
    ),
    (
        detect,
        text(lambda b: b'{"a":' * 10**5 + b'1' + b'}' * 10**5),
        IN_JSON + ': RecursionError',
    ),
    (detect, folder(JSON), IN_JSON + ': IsADirectoryError'),
    (
        detect,
        change(lambda content: content.update(images=None)),
        IN_JSON + ': images is a NoneType, expected a list',
    ),
    (
        detect,
        change(put('images', 3, id=None)),
        IN_JSON + r': images\[3\] has the id None, expected a number',
    ),
    (
        detect,
        change(put('annotations', 3, image_id=[3])),
        IN_JSON + r': annotations\[3\] has the image_id \[3\], expected a n',
    ),
    (
        detect,
        change(put('annotations', 3, image_id=NAN)),
        IN_JSON + r': annotations\[3\] has the image_id nan, expected a numb',
    ),
    *(
        (
            detect,
            change(put('annotations', 3, **{name: '0'})),
            IN_JSON + rf": annotations\[3\] has the {name} '0', expected 0 or",
        )
        for name in ('iscrowd', 'ignore')
    ),
    (
        detect,
        change(put('images', 3, file_name=3)),
        IN_JSON + r': images\[3\] has the file_name 3, expected text',
    ),
    *(
        (
            detect,
            change(put('images', 3, width=width)),
            IN_JSON + rf': images\[3\] has the width {width!r}, expected a n',
        )
        for width in (0, -96, '96', None, NAN, 2**30)
    ),
    (
        detect,  # of which mmdet would keep one
        change(again('images', 3, file_name='00001.jpg')),
        IN_JSON + r': images\[3\] and images\[8\] have the same id, 3',
    ),
    (
        detect,
        change(again('annotations', 3, image_id=0)),
        IN_JSON + r': annotations\[3\] and annotations\[\d+\] have the same',
    ),
    (
        detect,
        change(again('categories', 0, name='x')),
        IN_JSON + r': categories\[0\] and categories\[6\] have the same id',
    ),
    (
        detect,  # mmdet would give them labels of their own, so 7 of 6
        change(again('categories', 0, id=99)),
        IN_JSON + " has 2 categories of the name 'disk'",
    ),
    (
        detect,  # mmdet would call a stick a disk
        change(lambda content: content['categories'].reverse()),
        CLASSES + 'disk, .*, stick must come in the order .*: stick, .*, disk',
    ),
    (
        detect,
        change(put('annotations', 3, bbox=[0, 0, 1e308, 5])),
        IN_JSON
        + r': annotation 4 has the bbox \[0, 0, 1e\+308, 5\], expected',
    ),
    (
        detect,
        change(put('annotations', 3, bbox=None)),
        IN_JSON + ': annotation 4 has the bbox None, expected four numbers',
    ),
    (
        detect,
        change(put('annotations', 3, category_id=99)),
        '{data}/' + JSON + r': 1 of \d+ boxes are dropped: 1 of a category',
    ),
    (
        detect,
        change(lambda content: content.update(annotations=[])),
        '{data}/' + JSON + ' has no box of the classes in train_dataloader',
    ),
    (detect, change(lambda content: content.update(images=[])), NO_IMAGE),
]

# Masks in a json; mmdet says that it ignores polygons without three points
POLYGON = IN_JSON + ': annotation 4 has the polygon '
MASKS = [
    (masks, mask([[1, 2, 3]]), NOTHING),
    (masks, mask([]), IN_JSON + ": annotation 4 has no 'segmentation'"),
    (masks, mask([1, 2, 3, 4, 5, 6]), POLYGON + '1, expected a list of numb'),
    (masks, mask([['a'] * 6]), POLYGON + r"\['a', "),
    # drawing these would take all memory
    (masks, mask([[1, 2, NAN, 5, 6, 7]]), POLYGON + r'\[1, 2, nan, 5, 6, 7\]'),
    (masks, mask([[1, 2, INF, 5, 6, 7]]), POLYGON + r'\[1, 2, inf, 5, 6, 7\]'),
    (masks, mask([[1, 2, 1e12, 5, 6, 7]]), POLYGON + r'\[1, 2, 1000000000000'),
    (
        masks,
        mask([[-1e6, -1e6, 1e6, 1e6] * 3]),
        IN_JSON + ': annotation 4 has a polygon whose outline is longer than',
    ),
    (masks, mask([[0, 0, 1e6, 0, 1e6, 2e5, 0, 2e5]]), NOTHING),
    (
        masks,
        mask(dict(size=[10, 10], counts=[50, 50])),
        IN_JSON + r': annotation 4 has an RLE of size \[10, 10\], expected',
    ),
    *(
        (
            masks,
            mask(dict(size=[96, 96], counts=counts)),
            IN_JSON + ': annotation 4 has an RLE whose counts are no whole n',
        )
        for counts in (
            *([50, 10**6], [5], [5, -3, 9214], [NAN, 1], [4000.5, 5215.5]),
            # compressed: letters that it does not use, one count of 5, one
            # that goes on behind the end, -1 and 9217, nothing
            *('zzzz~~~~', '5', 'P', 'OQP9', '', 'Q' * 99),
        )
    ),
]

MASKS += [
    (
        masks,
        mask(dict(size=[96, 96], counts=5)),
        IN_JSON + ': annotation 4 has an RLE with the counts 5, expected a',
    ),
    (masks, mask(dict(size=[96, 96], counts='PP9')), NOTHING),
]

# The json by which is measured: the data set's, or another one
EVALUATED = [
    (evaluate, truth(), NOTHING),
    (
        evaluate,
        change(drop('annotations', 2, 'iscrowd')),
        IN_JSON + r": annotations\[2\] \(id 3\) has no 'iscrowd'",
    ),
    (evaluate, mask([[1, 2, NAN, 5, 6, 7]]), POLYGON),
    (
        evaluate,
        write(TRUTH, b'{"images": [}'),
        'error: test_evaluator.ann_file: {data}/'
        + TRUTH
        + ': JSONDecodeError',
    ),
    (
        evaluate,
        truth(lambda content: content.pop('categories')),
        IN_TRUTH + " has no 'categories'",
    ),
    (
        evaluate,
        truth(drop('annotations', 2, 'bbox')),
        IN_TRUTH + r": annotations\[2\] \(id 3\) has no 'bbox'",
    ),
    (
        evaluate,
        truth(put('annotations', 2, bbox=[1, NAN, 3, 4])),
        IN_TRUTH + r': annotation 3 has the bbox \[1, nan, 3, 4\]',
    ),
    (
        evaluate,  # which would be counted twice
        truth(again('annotations', 3)),
        IN_TRUTH + r': annotations\[3\] and annotations\[\d+\] have the same',
    ),
    (
        evaluate,  # which would compare sticks with disks
        truth(lambda content: content['categories'].reverse()),
        'error: test_evaluator.* must come in the order of the categories of',
    ),
    (
        evaluate,
        truth(
            lambda content: [
                x.update(id=x['id'] + 9) for x in content['images']
            ]
        ),
        'error: test_evaluator.ann_file: {data}/'
        + TRUTH
        + ' has no image of id 0, which is {data}/images/training/00000.jpg',
    ),
    *(
        (
            evaluate,  # of which pycocotools would die after the first epoch
            truth(put('annotations', 3, **values, segmentation=[polygon])),
            IN_TRUTH
            + ': annotation 4 has the polygon '
            + re.escape(f'{polygon}, expected three points or more'),
        )
        for values in ({}, dict(bbox=[10, 10, 0, 5]))
        for polygon in ([1, 2, 3], [1, 2, 3, 4], [])
    ),
    (
        evaluate,  # which pycocotools draws as nothing
        truth(
            put(
                'annotations',
                3,
                segmentation=[[1, 2, 9, 2, 9, 9], [1, 2, 3, 4]],
            )
        ),
        NOTHING,
    ),
    (
        evaluate,
        truth(put('annotations', 3, segmentation=dict(size=[96, 96]))),
        IN_TRUTH
        + r": annotation 4 has an RLE of the keys \['size'\], expected",
    ),
    (evaluate_metrics, truth(), NOTHING),
    (
        evaluate_metrics,
        truth(drop('annotations', 2, 'bbox')),
        IN_TRUTH + r": annotations\[2\] \(id 3\) has no 'bbox'",
    ),
    (evaluate_two, truth(), NOTHING),
    (
        evaluate_two,
        truth(drop('annotations', 2, 'bbox')),
        IN_TRUTH + r": annotations\[2\] \(id 3\) has no 'bbox'",
    ),
    (
        evaluate_two,
        truth(lambda content: content['categories'].reverse()),
        'error: test_evaluator.* must come in the order of the categories of',
    ),
    (
        evaluate,  # as of another split
        truth(put('images', 3, file_name='9.jpg')),
        'error: test_evaluator.ann_file: {data}/'
        + TRUTH
        + ' has the image 9.jpg of id 3, which is {data}/'
        + IMAGE,
    ),
]

CASES = [*IMAGES, *MAPS, *BOXES, *MASKS, *EVALUATED]


def id_of(case):
    """What is read, and the end of what is said."""
    said = case[2].replace('{data}/', '').replace('\\', '')
    return f'{case[0].__name__}: {said[-40:]}'


@pytest.mark.parametrize(
    ('read', 'damage', 'message'), CASES, ids=map(id_of, CASES)
)
def test_broken_data(world, read, damage, message):
    damage(world.data)
    message = message.replace('{data}', re.escape(str(world.data)))
    assert re.match(message, read(world))


# As users see them


def test_attack_in_a_terminal(world):
    torch.save({**RUN, 'x': Call(os.mkdir, str(world.marker))}, world.file)
    process = subprocess.run(
        [
            *(sys.executable, 'tools/train.py', SHAPES),
            *('--work-dir', str(world.folder / 'work')),
            *('--resume', str(world.file), *shapes_options(world.data)),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1
    assert 'Traceback' not in process.stderr
    assert re.fullmatch(
        f'error: cannot load the checkpoint {world.file}: it would run '
        r'\w+\.mkdir, and it may only hold data',
        process.stderr.splitlines()[-1],
    )
    assert not world.marker.exists()
