"""The tools as users run them, on the embedded shapes and on real images."""

import gc
import json
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import nn

from mmcarafe.models.fpn import TopDown

ROOT = Path(__file__).parents[1]
SHAPES = 'configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'
COCO = 'configs/faster_rcnn/faster-rcnn_r50_fpn-carafe_1x_coco.py'


# For scripts that let builtins.open return a file that writes in another way.
WRAPPED_FILE = """
class File:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)
"""


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A folder of very few, very small drawn images."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    size = ['--train', '8', '--val', '4', '--size', '96']
    execute('python', 'tools/dataset_converters/shapes.py', root, *size)
    return root


def environment(**kwargs):
    # `python` in the shell scripts is the one that runs this
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return {**os.environ, 'PATH': path, **kwargs}


def execute(*command, **env):
    """Run a command as in a terminal; return what it printed."""
    process = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def loaders(data_root, splits=('train', 'val', 'test')):
    """Settings for a data set somewhere else, read without workers."""
    for split in splits:
        loader = f'{split}_dataloader'
        yield f'{loader}.num_workers=0'
        yield f'{loader}.persistent_workers=False'
        yield f'{loader}.dataset.data_root={data_root}/'


def shapes_options(shapes, *more):
    """One epoch of the shapes config: four batches of two images."""
    ann_file = shapes / 'annotations/instances_validation.json'
    return [
        '--cfg-options',
        *loaders(shapes),
        f'val_evaluator.ann_file={ann_file}',
        f'test_evaluator.ann_file={ann_file}',
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        'test_dataloader.dataset.pipeline.1.scale=(96,96)',
        'train_dataloader.batch_size=2',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'default_hooks.logger.interval=1',
        # a hardly trained model is sure of nothing
        'model.test_cfg.rcnn.score_thr=0',
        *more,
    ]


def coco_options(coco):
    """Two epochs of a COCO config: four iterations of one small image."""
    ann_file = coco / 'annotations/instances_val2017.json'
    return [
        '--cfg-options',
        *loaders(coco),
        *(
            f'{s}_dataloader.dataset.indices=4'
            for s in ('train', 'val', 'test')
        ),
        f'val_evaluator.ann_file={ann_file}',
        f'test_evaluator.ann_file={ann_file}',
        'train_dataloader.dataset.pipeline.2.scale=(160,160)',
        'val_dataloader.dataset.pipeline.1.scale=(160,160)',
        'test_dataloader.dataset.pipeline.1.scale=(160,160)',
        'train_dataloader.batch_size=1',
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=2',
        'default_hooks.logger.interval=1',
        'model.backbone.init_cfg=None',
        'model.train_cfg.rpn_proposal.max_per_img=50',
        'model.train_cfg.rcnn.sampler.num=32',
        'model.test_cfg.rpn.max_per_img=50',
        'model.test_cfg.rcnn.score_thr=0',
    ]


def scalars(work_dir):
    """What a run has logged, from training and from the evaluations."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    lines = files[-1].read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(work_dir):
    return [line['loss'] for line in scalars(work_dir) if 'loss' in line]


def coco_numbers(printed):
    """COCO's summary: its twelve lines end in numbers."""
    line = r'^ Average (?:Precision|Recall) .*\] = (-?\d\.\d{3})$'
    return re.findall(line, printed, re.MULTILINE)


@pytest.fixture(scope='session')
def trained(shapes, tmp_path_factory):
    """The work folder of a short run in mixed precision."""
    work_dir = tmp_path_factory.mktemp('runs') / 'shapes'
    execute(
        *('python', 'tools/train.py', SHAPES, '--work-dir', work_dir),
        *('--amp', '--auto-scale-lr'),
        *shapes_options(
            shapes,
            'auto_scale_lr.base_batch_size=8',
            'optim_wrapper.clip_grad.max_norm=7',
        ),
    )
    return work_dir


def test_amp_and_scaled_lr(trained):
    printed = next(trained.glob('*/*.log')).read_text()
    # 1 process * 2 images, for a learning rate that was meant for 8
    assert 'Scaling the original LR by 0.25.' in printed
    assert len(losses(trained)) == 4
    assert all(0 < loss < 10 for loss in losses(trained))

    config = Config.fromfile(trained / Path(SHAPES).name)
    assert config.optim_wrapper.type == 'CPUAmpOptimWrapper'
    assert config.optim_wrapper.clip_grad == dict(max_norm=7)
    saved = torch.load(trained / 'epoch_1.pth', weights_only=False)
    assert {v.dtype for v in saved['state_dict'].values()} <= {
        torch.float32,
        torch.int64,
    }


def test_predictions_are_kept_and_drawn(trained, shapes, tmp_path):
    printed = execute(
        *('python', 'tools/test.py', SHAPES, trained / 'epoch_1.pth'),
        *('--work-dir', tmp_path, '--out', tmp_path / 'out/boxes.pkl'),
        *('--show-dir', 'pictures'),
        *shapes_options(shapes),
    )
    assert len(coco_numbers(printed)) == 12
    with open(tmp_path / 'out/boxes.pkl', 'rb') as file:
        predictions = pickle.load(file)
    assert len(predictions) == 4
    assert predictions[0]['pred_instances']['bboxes'].shape[1] == 4
    assert_drawn(tmp_path, printed)


def assert_drawn(work_dir, printed, number=4):
    """Pictures are named like the images, and the log says how many."""
    files = sorted(path.name for path in work_dir.glob('*/pictures/*'))
    assert files == [f'{index:05d}.jpg' for index in range(number)]
    assert f'{number} of 4 images are drawn in ' in printed


def test_flipped_images_are_merged(trained, shapes, tmp_path):
    printed = execute(
        *('python', 'tools/test.py', SHAPES, trained / 'epoch_1.pth'),
        *('--work-dir', tmp_path, '--tta'),
        *shapes_options(shapes),
    )
    assert len(coco_numbers(printed)) == 12
    config = Config.fromfile(tmp_path / Path(SHAPES).name)
    assert config.model.type == 'DetTTAModel'


RANK_HOOK = """
import hashlib
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RankHook(Hook):
    '''Write down what each process saw, and what it learned.'''

    def before_run(self, runner):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.seen += [d.img_path for d in data_batch['data_samples']]

    def after_train(self, runner):
        weights = hashlib.sha256()
        for value in runner.model.module.parameters():
            weights.update(value.detach().numpy().tobytes())
        file = Path(runner.work_dir, f'rank{get_rank()}')
        file.write_text(' '.join([weights.hexdigest(), *self.seen]))
"""


def test_two_processes(shapes, tmp_path):
    (tmp_path / 'rank_hook.py').write_text(RANK_HOOK)
    options = shapes_options(
        shapes,
        'custom_imports.imports=rank_hook',
        'default_hooks.rank.type=RankHook',
    )
    work_dir = tmp_path / 'work'
    env = dict(PYTHONPATH=str(tmp_path), PORT=str(free_port()))
    execute(
        *('tools/dist_train.sh', SHAPES, 2, '--work-dir', work_dir, *options),
        **env,
    )
    one, two = (
        (work_dir / f'rank{rank}').read_text().split() for rank in (0, 1)
    )
    assert one[0] == two[0]  # equal weights
    # from different images: 8 = 2 processes * 2 iterations * 2 images
    assert len({*one[1:], *two[1:]}) == 8

    checkpoint = work_dir / 'epoch_1.pth'
    printed = execute(
        *('tools/dist_test.sh', SHAPES, checkpoint, 2),
        *('--work-dir', work_dir, '--show-dir', 'pictures', *options),
        **env,
    )
    assert len(coco_numbers(printed)) == 12
    assert_drawn(work_dir, printed)  # by both


def free_port():
    """Below those that Linux gives to connections before this one is used."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(('127.0.0.1', port))
            return port


def test_killed_run_on_coco_is_resumed(real_data, tmp_path):
    coco = real_data / 'tiny_coco'
    options = coco_options(coco)
    train = ['python', 'tools/train.py', COCO, '--work-dir', tmp_path]
    first = subprocess.Popen(
        [str(word) for word in [*train, *options]],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        last = tmp_path / 'last_checkpoint'  # written after the checkpoint
        while not last.exists() or not last.read_text():
            assert first.poll() is None, (
                'training ended before its first epoch'
            )
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    assert last.read_text() == str(tmp_path / 'epoch_1.pth')

    printed = execute(*train, '--resume', *options)
    assert 'resumed epoch: 1, iter: 4' in printed
    assert re.findall(r'Epoch\(train\) +\[(\d)\]\[(\d)/4\]', printed) == [
        ('2', '1'),
        ('2', '2'),
        ('2', '3'),
        ('2', '4'),
    ]
    printed = execute(
        *('python', 'tools/test.py', COCO, tmp_path / 'epoch_2.pth'),
        *('--work-dir', tmp_path, *options),
    )
    assert len(coco_numbers(printed)) == 12


def test_mmdets_carafe_config_trains_with_the_drop_in(real_data, tmp_path):
    """Its FPN_CARAFE, on the CPU; all that the config adds is the import."""
    config = tmp_path / 'config.py'
    config.write_text(
        "_base_ = 'mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py'\n"
        "custom_imports = dict(imports=['mmcarafe.drop_in'])\n"
    )
    printed = execute(
        *('python', 'tools/train.py', config, '--work-dir', tmp_path),
        *coco_options(real_data / 'tiny_coco'),
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
    )
    assert 'FPN_CARAFE' in printed
    assert printed.count("mmcv's CARAFE runs on mmcarafe's operator") == 1
    assert len(losses(tmp_path)) == 4
    assert len(coco_numbers(printed)) == 12


SEGMENTOR = """
_base_ = 'mmseg::upernet/upernet_r18_4xb4-80k_ade20k-512x512.py'
crop_size = (64, 64)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(channels=32, num_classes=6),
    auxiliary_head=dict(channels=16, num_classes=6))
shapes = dict(
    type='BaseSegDataset',
    data_root={root!r},
    metainfo=dict(
        classes=tuple('abcdef'), palette=[[i, i, i] for i in range(6)]),
    reduce_zero_label=True)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomCrop', crop_size=crop_size),
            dict(type='PackSegInputs'),
        ],
        **shapes),
    **loader)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **shapes), **loader)
test_dataloader = val_dataloader
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ]),
]
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


@pytest.fixture(scope='session')
def segmentor(shapes, tmp_path_factory):
    """A config of mmseg's on the semantic maps of the shapes."""
    config = tmp_path_factory.mktemp('configs') / 'segmentor.py'
    config.write_text(SEGMENTOR.format(root=str(shapes)))
    return config


def test_segmentor_in_two_processes(segmentor, tmp_path):
    """With mixed precision and its SyncBN, resumed, tested, drawn."""
    (tmp_path / 'rank_hook.py').write_text(RANK_HOOK)
    env = dict(PYTHONPATH=str(tmp_path), PORT=str(free_port()))
    work_dir = tmp_path / 'work'
    train = [
        *('tools/dist_train.sh', segmentor, 2, '--work-dir', work_dir),
        *('--amp', '--cfg-options', 'custom_imports.imports=rank_hook'),
        'default_hooks.rank.type=RankHook',
    ]
    execute(*train, 'train_cfg.max_iters=2', **env)
    printed = execute(*train, '--resume', **env)
    assert 'resumed epoch: 0, iter: 2' in printed
    assert re.findall(r'Iter\(train\) +\[(\d)/4\]', printed) == ['3', '4']
    assert 'mIoU: ' in printed
    one, two = (
        (work_dir / f'rank{rank}').read_text().split() for rank in (0, 1)
    )
    assert one[0] == two[0]

    printed = execute(
        *('python', 'tools/test.py', segmentor, work_dir / 'iter_4.pth'),
        *('--work-dir', work_dir, '--tta', '--out', tmp_path / 'maps'),
        *('--show-dir', 'pictures'),
    )
    assert 'mIoU: ' in printed
    names = ['00000', '00001', '00002', '00003']
    assert [p.stem for p in sorted((tmp_path / 'maps').iterdir())] == names
    assert_drawn(work_dir, printed)


def compare_sync_bn(rank, port):
    """One of two processes that share six images unevenly."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo')
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3) * 3 + 2
    grad = torch.randn(6, 5, 4, 3)
    whole = nn.BatchNorm2d(5)
    nn.init.uniform_(whole.weight)
    nn.init.uniform_(whole.bias)
    shared = import_module('_cpu').CPUSyncBatchNorm(5)
    shared.load_state_dict(whole.state_dict())

    x_whole = x.clone().requires_grad_()
    expected = whole(x_whole)
    expected.backward(grad)
    mine = slice(0, 2) if rank == 0 else slice(2, 6)
    x_mine = x[mine].clone().requires_grad_()
    actual = shared(x_mine)
    actual.backward(grad[mine])

    torch.testing.assert_close(actual, expected[mine])
    torch.testing.assert_close(x_mine.grad, x_whole.grad[mine])
    torch.testing.assert_close(
        dict(shared.state_dict()), dict(whole.state_dict())
    )
    for one, other in zip(shared.parameters(), whole.parameters()):
        torch.distributed.all_reduce(one.grad)
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(shared.eval()(x), whole.eval()(x))
    # A thread of gloo that still frees a tensor when the interpreter ends
    # would abort the process.
    torch.distributed.destroy_process_group()


def test_sync_bn_on_cpus_is_bn_of_the_whole_batch():
    torch.multiprocessing.spawn(compare_sync_bn, (free_port(),), nprocs=2)


@pytest.fixture
def error(monkeypatch, tmp_path, capsys):
    """Run a tool that must refuse its arguments; return the message."""

    def call(tool, *words, work_dir=tmp_path / 'work'):
        words = [str(w) for w in words]
        position = (
            words.index('--cfg-options')
            if '--cfg-options' in words
            else len(words)
        )
        words[position:position] = ['--work-dir', str(work_dir)]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [tool, *words])
        with pytest.raises(SystemExit) as caught:
            import_module(tool).main()
        message = caught.value.code
        assert isinstance(message, str)
        assert message.startswith('error: ') and '\n' not in message
        assert not work_dir.exists()  # nothing was written
        return message[len('error: ') :]

    return call


ANN_FILE = 'annotations/instances_training.json'


@pytest.fixture
def broken(shapes, tmp_path):
    """A copy of the shapes for a test to damage."""
    return Path(shutil.copytree(shapes, tmp_path / 'broken'))


def test_no_config(error):
    assert error('train', 'no.py') == 'config: there is no file no.py'
    # as a user sees it: one line, and no traceback
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', 'tools/train.py', 'no.py'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr == 'error: config: there is no file no.py\n'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = dict(', "SyntaxError: '(' was never closed"),
        ('_base_ = "none.py"', 'none.py'),
        ('_base_ = "mmdet::faster_rcnn/none.py"', 'none.py'),
        ('custom_imports = dict(imports="mmnone")', 'mmnone'),
        ('x = (1).none', "AttributeError: 'int' object has no attribute"),
        ('x = [][1]', 'IndexError: list index out of range'),
        ('x = 1 / 0', 'ZeroDivisionError: division by zero'),
        ('x = none', "NameError: name 'none' is not defined"),
        ('assert 2 < 1', 'AssertionError: assert 2 < 1'),
    ],
    ids=str.split('syntax base mmdet-base import attr index zero name assert'),
)
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_unreadable_config(error, tmp_path, text, message):
    config = tmp_path / 'config.py'
    config.write_text(text)
    assert re.match(
        f'config {config}: .*{re.escape(message)}', error('train', config)
    )
    gc.collect()  # mmengine leaves its copy of a broken config open


@pytest.mark.parametrize(
    ('value', 'good'),
    [(82512.0, True), (1e1, True), (3, True), (1.5, False), ('3', False)]
    + [(True, False), (float('inf'), False), (float('nan'), False)],
)
def test_whole_numbers(value, good):
    settings = dict(by_epoch=False, max_iters=10, val_interval=value)
    check = import_module('_cli').check_train_cfg
    if good:
        check(Config(dict(train_cfg=settings)))
        return
    with pytest.raises(SystemExit, match='expected a whole number, got'):
        check(Config(dict(train_cfg=settings)))


@pytest.mark.parametrize('transform', ['resize_concat', 'multiple_select'])
def test_heads_that_concatenate_levels(transform):
    class Neck(TopDown, nn.Module):
        out_channels = 8

    model = nn.Module()
    model.neck = Neck()
    model.decode_head = nn.Module()
    model.decode_head.in_channels = 16
    model.decode_head.input_transform = transform
    check = import_module('_cli')._check_width
    if transform == 'resize_concat':
        check(model)
        return
    with pytest.raises(SystemExit, match='in_channels is 16, expected 8'):
        check(model)


def test_distributed_state_is_not_built_before_its_processes():
    optimizer = dict(
        type='ZeroRedundancyOptimizer', optimizer_type='SGD', lr=0.1
    )
    cfg = Config(
        dict(optim_wrapper=dict(optimizer=optimizer), launcher='pytorch')
    )
    build = import_module('_cli').build_optimizer
    assert build(cfg, nn.Linear(1, 1)) is None
    cfg.launcher = 'none'
    with pytest.raises(SystemExit, match='optim_wrapper: .*process group'):
        build(cfg, nn.Linear(1, 1))


@pytest.mark.parametrize('head', ['bbox_head', 'mask_head'])
def test_channels_that_the_roi_extractor_does_not_give(head):
    model = Config.fromfile(ROOT / SHAPES).model
    roi_head = model.roi_head
    if head == 'mask_head':
        roi_head.mask_roi_extractor = roi_head.bbox_roi_extractor
        roi_head.mask_head = dict(
            type='FCNMaskHead', in_channels=64, num_classes=6
        )
        model.train_cfg.rcnn.mask_size = 28
        model.test_cfg.rcnn.mask_thr_binary = 0.5
    cfg = Config(dict(model=model, default_scope='mmdet'))
    build = import_module('_cli').build_model
    build(cfg)
    cfg.model.roi_head[head].in_channels = 32
    with pytest.raises(SystemExit) as caught:
        build(cfg)
    assert caught.value.code == (
        f'error: model.roi_head.{head}.in_channels is 32, expected 64, the '
        f'out_channels of model.roi_head.{head[:-5]}_roi_extractor'
    )


# onedl-mmdetection's, when it builds the metric
@pytest.mark.filterwarnings('ignore:faster_coco_eval is not installed')
@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'model.neck.in_channels=[32,64,128,99]',
            r'model: CARAFEFPN: inputs\[3\] has 256 channels, expected 99',
        ),
    ],
)
def test_channels_that_the_backbone_does_not_give(
    monkeypatch, shapes, tmp_path, option, message
):
    # A name of its own: mmengine warns of a second visualizer of one name in
    # one process, and another test may have built the first.
    options = shapes_options(shapes, option, 'visualizer.name=channels')
    words = ['--work-dir', str(tmp_path), *options]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['train', SHAPES, *words])
    with pytest.raises(SystemExit, match=f'error: {message}'):
        import_module('train').main()


def test_rates_are_listed_by_the_run_alone(capfd):
    optimizer = dict(type='SGD', lr=0.1)
    wrapper = dict(optimizer=optimizer, paramwise_cfg=dict(bias_lr_mult=2))
    cfg = Config(dict(optim_wrapper=wrapper, launcher='none'))
    level = MMLogger.get_current_instance().level
    built = import_module('_cli').build_optimizer(cfg, nn.Linear(1, 1))
    assert [g['lr'] for g in built.optimizer.param_groups] == [0.1, 0.2]
    assert 'paramwise' not in ''.join(capfd.readouterr())
    assert MMLogger.get_current_instance().level == level


def test_what_was_built_to_check_is_freed(monkeypatch, shapes, tmp_path):
    """A second model and a checkpoint would take memory while training."""
    train, cli = (
        import_module('train'),
        import_module('_cli'),
    )
    build, models = cli.build_model, []

    def build_model(cfg):
        model = build(cfg)
        models.append(weakref.ref(model))
        return model

    def build_runner(cfg):
        gc.collect()
        assert [model() for model in models] == [None]
        raise SystemExit('reached')

    monkeypatch.setattr(cli, 'build_model', build_model)
    monkeypatch.setattr(cli, 'build_runner', build_runner)
    monkeypatch.chdir(ROOT)
    words = ['--work-dir', str(tmp_path), *shapes_options(shapes)]
    monkeypatch.setattr(sys, 'argv', ['train', SHAPES, *words])
    with pytest.raises(SystemExit, match='reached'):
        train.main()


def test_half_of_a_validation(error, shapes):
    options = shapes_options(shapes)
    options = [o for o in options if not o.startswith('val_dataloader.')]
    assert error('train', SHAPES, *options, 'val_dataloader=None') == (
        'the config has val_cfg but no val_dataloader'
    )


def test_tta_of_several_data_sets(error, shapes, tmp_path):
    config = tmp_path / 'several.py'
    config.write_text(
        f"_base_ = '{ROOT / SHAPES}'\n"
        "both = dict(_delete_=True, type='ConcatDataset', datasets=[])\n"
        'test_dataloader = dict(dataset=both)\n'
    )
    assert error('test', config, 'x.pth', '--tta') == (
        '--tta: test_dataloader.dataset must have one pipeline, which '
        'ConcatDataset has not'
    )


def test_launcher_that_started_nothing(error, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    assert error('train', SHAPES, '--launcher', 'pytorch') == (
        '--launcher pytorch: the variable RANK is not set, start the '
        'processes with torchrun or with tools/dist_*.sh'
    )


def test_recomputed_module_that_is_not_there(error, shapes):
    options = shapes_options(shapes, 'activation_checkpointing=[neck,bakbone]')
    assert error('train', SHAPES, *options) == (
        'activation_checkpointing: the model has no bakbone, did you mean '
        'backbone?'
    )


def test_hook_without_a_type(error):
    option = 'default_hooks.mine.interval=1'
    assert error('train', SHAPES, '--cfg-options', option) == (
        'default_hooks.mine has no type'
    )


def test_settings_of_another_runner():
    options = {'strategy.type': 'DDPStrategy', 'runner_type': 'FlexibleRunner'}
    check = import_module('_cli')._check_keys
    check(options, Config(dict(model=dict())))
    del options['runner_type']
    with pytest.raises(SystemExit, match='strategy.type: the config has no'):
        check(options, Config(dict(model=dict())))


def test_an_import_error_without_a_cause_keeps_its_words(
    error, tmp_path, monkeypatch
):
    (tmp_path / 'broken.py').write_text(
        "raise ImportError('Failed to import what is behind it')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports='broken')")
    assert 'Failed to import what is behind it' in error('train', config)


def test_drop_in_without_mmcvs_ops(error, tmp_path, monkeypatch):
    """mmengine says only that an import failed; we say why."""
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports='mmcarafe.drop_in')")
    monkeypatch.delitem(sys.modules, 'mmcarafe.drop_in', raising=False)
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    message = error('train', config)
    assert 'this mmcv was built without its ops' in message


@pytest.mark.parametrize(
    ('tool', 'key'),
    [
        ('train', 'optim_wrapper'),
        ('train', 'train_dataloader'),
        ('test', 'model'),
        ('test', 'test_evaluator'),
    ],
)
def test_incomplete_config(error, tool, key):
    words = ['x.pth'] if tool == 'test' else []
    assert error(tool, SHAPES, *words, '--cfg-options', f'{key}=None') == (
        f'config {SHAPES} has no {key}'
    )


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'modle.neck.type=FPN',
            '--cfg-options modle.neck.type: the config has no modle, did you '
            'mean model?',
        ),
        ('xyzzy=1', '--cfg-options xyzzy: the config has no xyzzy'),
        (
            'custom_imports.imports=mmnone',
            "--cfg-options: ModuleNotFoundError: No module named 'mmnone'",
        ),
        (
            'model.neck.type=mmcarafe.CARAFFPN',
            'model: there is no model of type mmcarafe.CARAFFPN, did you mean '
            r'mmcarafe.CARAFEFPN\?$',
        ),
        (
            'model.neck.type=CARAFEFPN',
            'model: there is no model of type CARAFEFPN, did you mean '
            r'mmcarafe.CARAFEFPN\?$',
        ),
        (
            'model.neck.type=mmcaraf.CARAFEFPN',
            'model: there is no model of type mmcaraf.CARAFEFPN, did you mean '
            r'mmcarafe.CARAFEFPN\?$',
        ),
        (
            'model.neck.out_channels=32',
            'model.rpn_head.in_channels is 64, expected 32, the out_channels '
            'of model.neck',
        ),
        (
            'model.neck.upsample_cgf.type=nearest',
            "model: TypeError: .*unexpected keyword argument 'upsample_cgf'",
        ),
        (
            'model.neck.upsample_cfg.type=bicubics',
            'model: .*bicubics',
        ),
        (
            'model.neck.upsample_cfg.up_kernel=4',
            'model: ValueError: .*up_kernel.*4',
        ),
        (
            'train_dataloader.dataset.pipeline.2.type=Resise',
            'train_dataloader.dataset: there is no transform of type Resise, '
            r'did you mean Resize\?$',
        ),
        (
            'train_dataloader.dataset.data_rot=/x',
            'train_dataloader.dataset: TypeError: .*data_rot',
        ),
    ],
    ids=lambda value: value if '=' in value and ':' not in value else '',
)
def test_misspelt_options(error, shapes, option, message):
    options = shapes_options(
        shapes, 'model.neck.upsample_cfg.type=mmcarafe.CARAFE', option
    )
    assert re.match(message, error('train', SHAPES, *options))


def test_missing_data(error, broken):
    options = shapes_options(broken)
    (broken / 'annotations/instances_validation.json').unlink()
    assert error('train', SHAPES, *options) == (
        'val_dataloader.dataset.ann_file: there is no '
        f'{broken}/annotations/instances_validation.json'
    )
    (broken / ANN_FILE).unlink()
    assert error('train', SHAPES, *options) == (
        f'train_dataloader.dataset.ann_file: there is no {broken}/{ANN_FILE}'
    )
    shutil.rmtree(broken / 'images/training')
    assert error('train', SHAPES, *options) == (
        'train_dataloader.dataset.data_prefix.img: there is no '
        f'{broken}/images/training/'
    )
    shutil.rmtree(broken)
    assert error('train', SHAPES, *options) == (
        f'train_dataloader.dataset.data_root: there is no {broken}/'
    )


def test_missing_evaluator_file(error, shapes):
    options = shapes_options(shapes, 'val_evaluator.ann_file=no.json')
    assert error('train', SHAPES, *options) == (
        'val_evaluator.ann_file: there is no no.json'
    )


def test_data_inside_a_wrapper(error, tmp_path):
    config = tmp_path / 'repeated.py'
    config.write_text(
        f'_base_ = {str(ROOT / SHAPES)!r}\n'
        'train_dataloader = dict(dataset=dict(\n'
        "    _delete_=True, type='RepeatDataset', times=2, dataset=dict(\n"
        "        type='CocoDataset', data_root='nowhere/')))\n"
    )
    assert error('train', config) == (
        'train_dataloader.dataset.dataset.data_root: there is no nowhere/'
    )


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'is empty'),
        ('\n', 'is empty'),
        ('{"images": [{"id": 1', 'is not a whole JSON file'),
        ('<html></html>', 'is not a whole JSON file'),
    ],
    ids=['empty', 'blank', 'truncated', 'html'],
)
def test_damaged_annotations(error, broken, text, message):
    (broken / ANN_FILE).write_text(text)
    assert error('train', SHAPES, *shapes_options(broken)).startswith(
        f'train_dataloader.dataset.ann_file: {broken}/{ANN_FILE} {message}'
    )


def test_annotations_without_images(broken, tmp_path):
    """Found when the data set is loaded, so the log folder is there."""
    file = broken / ANN_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), 'images': []}))
    process = subprocess.run(
        [
            *(sys.executable, 'tools/train.py', SHAPES),
            *('--work-dir', tmp_path / 'work', *shapes_options(broken)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        'error: train_dataloader.dataset holds no image: check its '
        'paths, metainfo.classes and filter_cfg'
    )
    assert 'Traceback' not in process.stderr


def refused_checkpoints(folder):
    """(content of a file, what is said of it)."""

    class Call:
        def __reduce__(self):
            return os.system, ('exit',)

    torch.save({'state_dict': {}, 'meta': {}}, folder / 'weights.pth')
    torch.save(torch.zeros(3), folder / 'tensor.pth')
    torch.save({'state_dict': Call()}, folder / 'call.pth')
    data = (folder / 'weights.pth').read_bytes()
    (folder / 'half.pth').write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('none.pth', 'there is no checkpoint {path}'),
        ('tensor.pth', '{path} holds a Tensor, not a state dict'),
        (
            'call.pth',
            r'cannot load the checkpoint {path}: it would run \w+.system, and '
            'it may only hold data',
        ),
        (
            'half.pth',
            'cannot load the checkpoint {path}: is it damaged, or not a '
            'checkpoint?',
        ),
    ],
)
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_refused_checkpoints(error, shapes, tmp_path, tool, name, message):
    refused_checkpoints(tmp_path)
    path = tmp_path / name
    words = [path] if tool == 'test' else ['--resume', path]
    printed = error(tool, SHAPES, *words, *shapes_options(shapes))
    assert re.match(message.format(path=re.escape(str(path))), printed)


def test_resume_from_weights(error, shapes, tmp_path):
    refused_checkpoints(tmp_path)
    path = tmp_path / 'weights.pth'
    assert error(
        'train', SHAPES, '--resume', path, *shapes_options(shapes)
    ) == (
        f'{path} holds only weights: no run can be resumed from it, but one '
        f'can start with --cfg-options load_from={path}'
    )


def test_amp_with_another_wrapper(error, shapes):
    options = shapes_options(shapes, 'optim_wrapper.type=ApexOptimWrapper')
    assert error('train', SHAPES, '--amp', *options) == (
        '--amp: optim_wrapper.type must be OptimWrapper or AmpOptimWrapper, '
        'got ApexOptimWrapper'
    )


def test_auto_scale_lr_without_base(error, segmentor):
    assert error('train', segmentor, '--auto-scale-lr') == (
        '--auto-scale-lr: config has no auto_scale_lr.base_batch_size'
    )


def test_launcher_that_needs_gpus(error, shapes):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    options = ['--launcher', 'slurm', *shapes_options(shapes)]
    assert error('train', SHAPES, *options) == (
        '--launcher slurm needs GPUs; on CPUs use pytorch'
    )


def test_out_for_boxes_is_a_pickle(error, trained, shapes):
    words = [trained / 'epoch_1.pth', '--out', 'x.json']
    assert error('test', SHAPES, *words, *shapes_options(shapes)) == (
        '--out: expected a .pkl file for detections, got x.json'
    )


def test_out_for_label_maps_is_a_folder(tmp_path):
    pytest.importorskip('mmseg')
    cfg = Config.fromfile(ROOT / 'configs/shapes/upernet-carafe_r18_shapes.py')
    (tmp_path / 'file').touch()
    for out in ('seg.pkl', str(tmp_path / 'file')):
        with pytest.raises(SystemExit, match='^error: --out: .*a folder'):
            import_module('test').keep_predictions(cfg, out)


@pytest.mark.parametrize('key', ['tta_model', 'tta_pipeline'])
def test_tta_without_its_settings(error, segmentor, key):
    words = ['x.pth', '--tta', '--cfg-options', f'{key}=None']
    assert error('test', segmentor, *words) == f'--tta: config has no {key}'


@pytest.mark.parametrize('option', ['--show', '--show-dir=x'])
def test_drawing_without_its_hook(error, segmentor, option):
    words = [
        'x.pth',
        option,
        '--cfg-options',
        'default_hooks.visualization=None',
    ]
    assert error('test', segmentor, *words) == (
        f'{option[:10]}: config has no default_hooks.visualization'
    )


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', 'CONFIG GPUS'),
        ('dist_test.sh', 'CONFIG CHECKPOINT GPUS'),
        ('slurm_train.sh', 'PARTITION JOB_NAME CONFIG WORK_DIR'),
    ],
)
def test_scripts_say_how_to_call_them(script, arguments):
    process = subprocess.run(
        [f'tools/{script}', SHAPES], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.startswith(f'usage: tools/{script} {arguments} [')
