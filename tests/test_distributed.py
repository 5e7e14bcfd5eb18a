"""Training in two processes, and what long trainings add to a model.

Whole models of mmdet and mmseg take three steps in fp64, in which different
orders of summation leave nothing to see: parameters of about one differed by
at most 1e-15.
"""

import copy
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import (
    BaseModel,
    MMDistributedDataParallel,
    MMFullyShardedDataParallel,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.activation_checkpointing import (
    turn_on_activation_checkpointing,
)
from mmengine.structures import InstanceData, PixelData
from test_tools import (  # noqa: F401  (a fixture)
    SHAPES,
    environment,
    free_port,
    shapes,
    shapes_options,
)
from torch.utils.checkpoint import checkpoint

import mmcarafe

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    # mmseg's, whenever one of its heads is built
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
    # mmdet's, when FCOS computes its losses
    pytest.mark.filterwarnings('ignore:torch.meshgrid:UserWarning'),
]

SEGMENTOR = 'configs/shapes/upernet-carafe_r18_shapes.py'
DETECTOR = 'configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'
SIZE = 64


def segmentor():
    cfg = Config.fromfile(ROOT / SEGMENTOR)
    init_default_scope(cfg.default_scope)
    cfg.model.data_preprocessor.size = (SIZE, SIZE)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        # its pixels would depend on the whole batch
        head.pop('sampler', None)
        head.norm_cfg = dict(type='GN', num_groups=8)
        head.dropout_ratio = 0
    # BN of half a batch is not BN of all of it: test_tools.py compares SyncBN.
    cfg.model.backbone.norm_cfg = dict(type='BN')
    cfg.model.backbone.norm_eval = True
    return MODELS.build(cfg.model)


def detector():
    """The neck of a config, under a head without random samples.

    FCOS divides its losses by the positive points of all processes.
    """
    cfg = Config.fromfile(ROOT / DETECTOR).model
    init_default_scope('mmdet')
    channels = cfg.neck.out_channels
    return MODELS.build(
        dict(
            type='FCOS',
            data_preprocessor=cfg.data_preprocessor,
            backbone=dict(cfg.backbone, norm_eval=True),
            neck=cfg.neck,
            bbox_head=dict(
                type='FCOSHead',
                num_classes=6,
                in_channels=channels,
                feat_channels=channels,
                stacked_convs=1,
                norm_cfg=dict(type='GN', num_groups=8),
                strides=[4, 8, 16, 32, 64],
                regress_ranges=(
                    *((-1, 8), (8, 16), (16, 32), (32, 64), (64, 1e8)),
                ),
            ),
        )
    )


MODELS_OF = {'segmentor': segmentor, 'detector': detector}


@lru_cache(maxsize=None)
def samples(kind):
    """Four images, each with as many objects as its number."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    made = []
    for count in range(1, 5):
        image = draw(0, 256, 3, SIZE, SIZE).to(torch.uint8)
        info = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE))
        if kind == 'segmentor':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=info)
            sample.gt_sem_seg = PixelData(data=draw(0, 7, 1, SIZE, SIZE))
        else:
            from mmdet.structures import DetDataSample

            sample = DetDataSample(metainfo=info)
            corners = draw(0, SIZE // 2, count, 2)
            sizes = draw(8, SIZE // 2, count, 2)
            sample.gt_instances = InstanceData(
                bboxes=torch.cat([corners, corners + sizes], 1).double(),
                labels=draw(0, 6, count),
            )
        made.append((image, sample))
    return made


def train(kind, batches, change=None, **optim_wrapper):
    """Three steps; return the parameters before and after.

    Args:
        kind (str): of :data:`MODELS_OF`.
        batches (list[list[int]]): samples of each call of ``train_step``.
        change (Callable, optional): what to do to the model first.
        **optim_wrapper: arguments of mmengine's.
    """
    torch.manual_seed(0)
    model = MODELS_OF[kind]()
    model.double().train()
    model.data_preprocessor.double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = change(model) if change else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    wrapper = OptimWrapper(optimizer, **optim_wrapper)
    every = samples(kind)
    for batch in 3 * batches:
        inputs, data_samples = zip(*(every[i] for i in batch))
        data = dict(inputs=list(inputs), data_samples=list(data_samples))
        trained.train_step(data, wrapper)
    return before, dict(model.named_parameters())


@lru_cache(maxsize=None)
def whole(kind):
    """Parameters before and after steps of all samples in one process."""
    return train(kind, [[0, 1, 2, 3]])


def assert_same_steps(kind, after, tolerance):
    """To the tolerance, as a share of what each parameter has changed by."""
    before, expected = whole(kind)
    assert after.keys() == expected.keys()
    for name, parameter in expected.items():
        change = (parameter - before[name]).abs().max()
        # A bias before a normalisation, or one that shifts all scores of a
        # window alike, changes by what rounding leaves of its gradient.
        allowed = tolerance * change + 1e-13
        assert (after[name] - parameter).abs().max() <= allowed, name
    upsampling = [name for name in expected if 'upsample' in name]
    assert upsampling
    for name in upsampling:
        assert name.endswith('bias') or not torch.equal(
            expected[name], before[name]
        )


# Two processes


def connect(rank, port):
    os.environ.update(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        GLOO_SOCKET_IFNAME='lo',
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')


@pytest.fixture(scope='module')
def on_both_ranks():
    """Call a function in two connected processes; return what both return."""
    context, port = get_context('spawn'), free_port()
    pools = [
        ProcessPoolExecutor(1, context, connect, (rank, port))
        for rank in (0, 1)
    ]

    def call(function, *args):
        calls = [pool.submit(function, *args) for pool in pools]
        return [each.result(timeout=120) for each in calls]

    yield call
    for pool in pools:
        pool.shutdown()


def my_half():
    return [[0, 1], [2, 3]][torch.distributed.get_rank()]


def train_replica(kind):
    _, after = train(kind, [my_half()], MMDistributedDataParallel)
    return {name: p.detach() for name, p in after.items()}


# As FCOS computes its boxes in fp32, shares of up to 1.4e-7 differed there.
@pytest.mark.parametrize(
    'kind, tolerance', [('segmentor', 1e-10), ('detector', 1e-6)]
)
def test_two_processes_are_one_with_twice_the_batch(
    on_both_ranks, kind, tolerance
):
    one, two = on_both_ranks(train_replica, kind)
    assert all(map(torch.equal, one.values(), two.values()))
    assert_same_steps(kind, one, tolerance)


class Branches(torch.nn.Module):
    """A branch is chosen for each batch; the other has no gradient then."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen = chosen
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.branches = torch.nn.ModuleList(
            [mmcarafe.CARAFE(8), mmcarafe.CARAFE(8, up_group=2)]
        )

    def forward(self, x):
        x = self.first(x)
        return checkpoint(
            self.branches[self.chosen], x, use_reentrant=False
        ).square()


def branches_and_images(chosen):
    torch.manual_seed(0)
    model = Branches(chosen).double()
    return model, torch.randn(2, 3, 7, 9, dtype=torch.float64)


def gradients_of_replica():
    rank = torch.distributed.get_rank()
    model, images = branches_and_images(chosen=rank)
    replica = torch.nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=True
    )
    for _ in range(2):  # unused parameters stop the second iteration
        model.zero_grad()
        replica(images[rank : rank + 1]).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_branches_that_one_process_leaves_unused(on_both_ranks):
    model, images = branches_and_images(chosen=0)
    model(images[:1]).mean().div(2).backward()
    model.chosen = 1
    model(images[1:]).mean().div(2).backward()
    for gradients in on_both_ranks(gradients_of_replica):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-10, atol=1e-15
            )


def upsample_twice():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), mmcarafe.CARAFE(8), mmcarafe.CARAFE(8)
    )
    return model.double(), torch.randn(2, 3, 8, 9, dtype=torch.float64)


def descend(model, images):
    model(images).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1).step()


def train_shards(kind):
    rank = torch.distributed.get_rank()
    model, images = upsample_twice()
    mine = images[rank : rank + 1]
    if kind == 'fully_shard':
        mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (2,))
        for module in (*model[1:], model):
            torch.distributed.fsdp.fully_shard(module, mesh=mesh)
        descend(model, mine)
        return [p.full_tensor().detach() for p in model.parameters()]
    # the device that mmengine's FSDPStrategy takes by default is a GPU
    sharded = MMFullyShardedDataParallel(model, device_id='cpu')
    descend(sharded, mine)
    with sharded.summon_full_params(sharded):
        return [p.detach().clone() for p in sharded.parameters()]


@pytest.mark.parametrize(
    'kind',
    [
        'mmengine',
        pytest.param(
            'fully_shard',
            marks=pytest.mark.skipif(
                not hasattr(torch.distributed.fsdp, 'fully_shard'),
                reason='torch >= 2.6 has it here',
            ),
        ),
    ],
)
def test_shards_learn_what_the_whole_learns(on_both_ranks, kind):
    model, images = upsample_twice()
    before = [p.detach().clone() for p in model.parameters()]
    descend(model, images)
    for shards in on_both_ranks(train_shards, kind):
        for was, expected, actual in zip(before, model.parameters(), shards):
            assert not torch.equal(was, expected)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


KILL_HOOK = """
import os
import signal
import time
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, *args, **kwargs):
        if get_rank() == RANK and runner.iter == 1:
            Path(runner.work_dir, 'killed').write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_ends_the_job(shapes, tmp_path):  # noqa: F811
    """And its data workers: what they print into stays open until then."""
    (tmp_path / 'kill_hook.py').write_text(KILL_HOOK.replace('RANK', '1'))
    work_dir = tmp_path / 'work'
    done = subprocess.run(
        [
            *('tools/dist_train.sh', SHAPES, '2', '--work-dir', work_dir),
            *shapes_options(
                shapes,
                'custom_imports.imports=kill_hook',
                'default_hooks.kill.type=KillHook',
                'train_dataloader.num_workers=1',
                'train_dataloader.persistent_workers=True',
            ),
        ],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(tmp_path), PORT=str(free_port())),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    seconds = time.time() - float((work_dir / 'killed').read_text())
    assert done.returncode != 0
    assert 'Signal 9 (SIGKILL)' in done.stdout
    assert seconds < 60  # 30 of which torch's launcher may wait
    assert not (work_dir / 'epoch_1.pth').exists()


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh'])
def test_a_signal_to_the_script_reaches_the_launcher(script, tmp_path):
    launcher = tmp_path / 'python'
    launcher.write_text('#!/bin/sh\necho $$\n')
    launcher.chmod(0o755)
    process = subprocess.Popen(
        [f'tools/{script}', 'config.py', '2', '2'],
        cwd=ROOT,
        env={**os.environ, 'PATH': f'{tmp_path}{os.pathsep}/usr/bin:/bin'},
        stdout=subprocess.PIPE,
        text=True,
    )
    printed, _ = process.communicate(timeout=60)
    assert printed == f'{process.pid}\n'


# One process


@pytest.mark.parametrize('kind', MODELS_OF)
def test_recomputed_activations_change_no_bit(kind):
    """By the setting ``activation_checkpointing`` of mmengine's configs."""
    calls = []

    def change(model):
        names = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, mmcarafe.CARAFE)
        }
        for module in names.values():
            module.channel_compressor.register_forward_pre_hook(
                lambda *_: calls.append(1)
            )
        setting = 'neck' if kind == 'detector' else [*names]
        import_module('_cli').recompute_activations(
            Config(dict(activation_checkpointing=setting)), model
        )
        turn_on_activation_checkpointing(model, setting)
        calls.append(-6 * len(names))  # 3 steps, each forwards twice
        return model

    _, after = train(kind, [[0, 1, 2, 3]], change)
    assert sum(calls) == 0
    for name, parameter in whole(kind)[1].items():
        assert torch.equal(after[name], parameter), name


def test_accumulated_halves_are_the_whole_batch():
    # FCOS divides by the positive points, of which each half has its own
    halves = [[0, 1], [2, 3]]
    _, after = train('segmentor', halves, accumulative_counts=2)
    assert_same_steps('segmentor', after, 1e-10)


class Interpolating(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = torch.nn.functional.interpolate(self.first(x), scale_factor=2)
        return self.last(x)


class Upsampling(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = Interpolating()
        mmcarafe.swap_upsample(self.net, 'CARAFE', torch.zeros(1, 3, 4, 5))

    def forward(self, inputs, mode='tensor'):
        if mode == 'loss':
            return dict(loss=self.net(torch.stack(inputs)).square().mean())
        return self.net(inputs)


class Recorder(Hook):
    """The parameters before the training and after each iteration."""

    priority = 'VERY_HIGH'

    def before_train(self, runner):
        self.states = [copy.deepcopy(runner.model.state_dict())]

    def after_train_iter(self, runner, *args, **kwargs):
        self.states.append(copy.deepcopy(runner.model.state_dict()))


def test_moving_average_of_a_swapped_model(tmp_path):
    recorder, average = Recorder(), EMAHook(momentum=0.5)
    runner = Runner(
        Upsampling(),
        str(tmp_path),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.rand(3, 4, 5)) for _ in range(6)],
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=2,
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1)),
        custom_hooks=[recorder, average],
        experiment_name=tmp_path.name,
    )
    runner.train()
    assert len(recorder.states) == 4
    expected = recorder.states[1]  # the first copies
    for state in recorder.states[2:]:
        expected = {n: (x + state[n]) / 2 for n, x in expected.items()}
    averaged = average.ema_model.module
    assert 'net.upsample_modules.0.content_encoder.bias' in expected
    torch.testing.assert_close(dict(averaged.state_dict()), expected)

    # it computes with weights of its own
    fresh, x = Upsampling(), torch.rand(1, 3, 4, 5)
    fresh.load_state_dict(expected)
    torch.testing.assert_close(averaged(x), fresh(x))
    assert not torch.equal(averaged(x), runner.model(x))
