"""What is left of a run that is killed, or whose disk is full or damaged.

A resumed run must end with the weights, to the bit, of one that was never
interrupted. MMCARAFE_KILLS=20 kills each kind of run 20 times, not once.
"""
# ruff: noqa: F811 (arguments of tests have the names of imported fixtures)

import errno
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config, config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from test_tools import (  # noqa: F401  (fixtures)
    SHAPES,
    WRAPPED_FILE,
    environment,
    error,
    segmentor,
    shapes,
    shapes_options,
)

KILLS = int(os.environ.get('MMCARAFE_KILLS', '1'))


class Images(torch.utils.data.Dataset):
    """Six numbers, each changed at random by all that transforms draw from."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return dict(inputs=torch.tensor(index + noise))


class Sum(BaseModel):
    """Adds to its weight what it is shown and what it draws itself."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs, data_samples=None, mode='loss'):
        value = sum(inputs) + np.random.rand() + torch.rand(())
        return dict(loss=self.weight * value) if mode == 'loss' else [value]


class NoMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=0)


def make_runner(folder, loop, **kwargs):
    """A runner for four epochs or twelve iterations of two images."""
    by_epoch = loop['by_epoch']
    workers = kwargs.pop('workers', 0)
    loader = dict(
        batch_size=kwargs.pop('batch_size', 2),
        num_workers=workers,
        persistent_workers=workers > 0,
        dataset=Images(),
    )
    kind = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    runner = Runner(
        model=Sum(),
        work_dir=str(folder),
        train_dataloader=dict(
            loader,
            sampler=dict(type=kind),
            batch_sampler=kwargs.pop('batches', None),
        ),
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler')),
        train_cfg=dict(loop, val_interval=1 if by_epoch else 3),
        val_cfg=dict(),
        val_evaluator=dict(type=NoMetric),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', **kwargs.pop('saving')),
            **kwargs.pop('hooks', {}),
        ),
        experiment_name=f'{folder}_{time.time_ns()}'.replace('/', '_'),
        cfg=Config(dict(model=dict(type='Sum'))),
        log_level='ERROR',
        **kwargs,
    )
    import_module('_resume').register(runner)
    return runner


EPOCHS = dict(by_epoch=True, max_epochs=4)
ITERATIONS = dict(by_epoch=False, max_iters=12)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize(
    ('loop', 'saving'),
    [
        (EPOCHS, dict(interval=1)),
        (EPOCHS, dict(interval=2, by_epoch=False)),
        (ITERATIONS, dict(interval=4, by_epoch=False)),
    ],
    ids=['epochs', 'within-epochs', 'iterations'],
)
def test_random_numbers_after_resuming(tmp_path, workers, loop, saving):
    """Of data and model, whatever drew in between: here the evaluation."""
    whole = make_runner(
        tmp_path / 'whole',
        loop,
        saving=saving,
        workers=workers,
        randomness=dict(seed=3),
    )
    whole.train()
    expected = whole.model.weight.item()
    assert whole.iter == 12
    files = sorted((tmp_path / 'whole').glob('*.pth'))
    assert len(files) >= 3
    for file in files[1:3]:
        rest = make_runner(
            tmp_path / file.stem,
            loop,
            saving=saving,
            workers=workers,
            randomness=dict(seed=3),
            load_from=str(file),
            resume=True,
        )
        rest.train()
        assert rest.iter == 12
        assert rest.model.weight.item() == expected, file.name


def test_epochs_of_another_length(tmp_path):
    """After larger batches, no batch of a new epoch is left out."""
    saving = dict(interval=2)
    make_runner(tmp_path / 'first', EPOCHS, saving=saving).train()
    rest = make_runner(
        tmp_path / 'rest',
        EPOCHS,
        saving=saving,
        batch_size=3,
        load_from=str(tmp_path / 'first' / 'epoch_2.pth'),
        resume=True,
    )
    rest.train()
    assert rest.iter == 10  # 2 epochs of 3, 2 of 2


def test_within_an_epoch_of_another_length(tmp_path):
    """With larger batches, as large a share of the epoch is left out."""
    saving = dict(interval=1, by_epoch=False)
    make_runner(tmp_path / 'first', EPOCHS, saving=saving).train()
    # After 3/3, 1/3 and 2/3 of an epoch: 2, 1 and 1 of its 2 larger batches
    for name, expected in [('iter_6', 10), ('iter_7', 10), ('iter_8', 11)]:
        rest = make_runner(
            tmp_path / name,
            EPOCHS,
            saving=saving,
            batch_size=3,
            load_from=str(tmp_path / 'first' / f'{name}.pth'),
            resume=True,
        )
        rest.train()
        assert rest.iter == expected, name


def trained_batches(length, share=None, **meta):
    """Of an epoch, by a checkpoint of epoch 2 that was saved within it."""
    if share is not None:
        meta['share_of_epoch'] = share
    return import_module('_resume').trained_batches(
        dict(
            meta=dict(epoch=2, **meta),
            message_hub=dict(runtime_info=dict(epoch=2)),
        ),
        length,
    )


@pytest.mark.parametrize('length', [1, 7, 49, 7330])
def test_place_in_an_epoch(length):
    """The counted batches, or as large a share of an epoch today."""
    for batch in {0, 1, length // 3, length - 1, length}:
        share = batch / length
        assert trained_batches(length, share, iter=1) == batch
        assert trained_batches(2 * length, share, iter=1) == 2 * batch
        # without a share, as older runs saved it
        assert trained_batches(length, iter=2 * length + batch) == batch
    for share, expected in [(-1, 0), (2, length), (float('nan'), 0)]:
        assert trained_batches(length, share, iter=1) == expected
    # more or fewer than two of today's epochs and one
    assert trained_batches(length, iter=4 * length) == length
    assert trained_batches(length, iter=length) == 0


class OneLess(torch.utils.data.BatchSampler):
    """Gives fewer batches than its length, as mmdet's by aspect ratio may."""

    def __iter__(self):
        return iter(list(super().__iter__())[:-1])


def test_fewer_batches_than_counted(tmp_path):
    """The epochs after the resumed one are trained from their beginning."""
    saving = dict(interval=1, by_epoch=False)
    one_less = dict(type=OneLess, drop_last=False)
    runners = [
        make_runner(tmp_path / name, EPOCHS, saving=saving, batches=one_less)
        for name in ('whole', 'rest')
    ]
    runners[0].train()
    assert runners[0].iter == 8
    runners[1]._load_from = str(tmp_path / 'whole' / 'iter_3.pth')
    runners[1]._resume = True
    runners[1].train()
    assert runners[1].iter == 8
    weights = [runner.model.weight.item() for runner in runners]
    assert weights[0] == weights[1]


@pytest.mark.parametrize('used', [False, True])
def test_seeding_of_gpus(monkeypatch, used):
    """Only of those in use: the others would take most of the time."""
    seeds = []
    monkeypatch.setattr('torch.cuda.is_initialized', lambda: used)
    monkeypatch.setattr('torch.cuda.manual_seed_all', seeds.append)
    import_module('_resume').seed_all(3, 5)
    seed = torch.initial_seed()
    assert seeds == [seed] * used
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())


def test_each_process_draws_other_numbers(monkeypatch):
    """In the model; the same again in the same iteration."""
    resume = import_module('_resume')
    drawn = []
    for rank, iteration in [(0, 1), (1, 1), (2, 1), (1, 2), (1, 1)]:
        monkeypatch.setattr(resume, 'get_rank', lambda rank=rank: rank)
        runner = Namespace(seed=3, iter=iteration)
        resume.PlaceInTheRun().before_train_iter(runner, iteration)
        drawn.append(
            (random.random(), np.random.rand(), torch.rand(()).item())
        )
    assert drawn[4] == drawn[1]
    assert all(len({*numbers}) == 4 for numbers in zip(*drawn))


class Constant(Images):
    """Always the same image; only what is drawn at random differs."""

    def __getitem__(self, index):
        return super().__getitem__(0)


def test_sampler_without_epochs():
    """Each epoch draws numbers of its own, whatever its order."""
    loader = torch.utils.data.DataLoader(
        Constant(), sampler=torch.utils.data.RandomSampler(range(6))
    )
    import_module('_resume').seed_images(loader, 3)
    drawn = [batch['inputs'].item() for _ in range(3) for batch in loader]
    assert len({*drawn}) == 18


def test_sampler_that_is_told_no_epoch(tmp_path):
    """The images of each epoch are changed in another way, also resumed."""
    made = []
    for name, load_from in [('whole', None), ('rest', 'whole/epoch_2.pth')]:
        runner = make_runner(
            tmp_path / name,
            EPOCHS,
            saving=dict(interval=2),
            load_from=load_from and str(tmp_path / load_from),
            resume=bool(load_from),
            hooks=dict(sampler_seed=None),
            randomness=dict(seed=3),
        )
        inputs = []
        step = runner.model.train_step

        def train_step(data, optim_wrapper, step=step, inputs=inputs):
            inputs.extend(value.item() for value in data['inputs'])
            return step(data, optim_wrapper)

        runner.model.train_step = train_step
        runner.train()
        made.append(inputs)
    assert len({*made[0]}) == len(made[0]) == 24
    assert made[1] == made[0][12:]


# Makes each checkpoint take a second, half of which it is half written.
SLOW_DISK = f"""
import builtins
import time

really_open = builtins.open

{WRAPPED_FILE}

class Slow(File):
    def write(self, data):
        half = len(data) // 2
        for piece in (data[:half], data[half:]):
            time.sleep(0.5)
            self.stream.write(piece)
            self.stream.flush()


def slow_open(file, mode='r', *args, **kwargs):
    stream = really_open(file, mode, *args, **kwargs)
    slow = 'w' in mode and str(file).endswith(('.pth.part', 'point.part'))
    return Slow(stream) if slow else stream


builtins.open = slow_open
"""


def train(words, log, path):
    """Do what ``python tools/train.py`` would, in this process."""
    with open(log, 'w') as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    os.chdir(ROOT)
    sys.path.insert(0, path)
    # It would take most of the time: the config is in each checkpoint.
    config.FormatCode = lambda text, **kwargs: (text, True)
    sys.argv = ['tools/train.py', *words]
    import_module('train').main()


def assert_equal(actual, expected, name):
    """Compare values of checkpoints, and tensors to the bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), name
    elif isinstance(expected, (dict, list)):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        assert len(actual) == len(expected), name
        for key in keys:
            assert_equal(actual[key], expected[key], f'{name}.{key}')
    else:
        assert actual == expected, name


class Run:
    """A kind of run, and the folder of one that was never interrupted.

    Args:
        context: of multiprocessing.
        folder (Path): for this kind.
        words (list[str]): arguments of tools/train.py.
        files (list[str]): the checkpoints that it saves.
    """

    def __init__(self, context, folder, words, files):
        self.context = context
        self.folder = folder
        self.words = [str(word) for word in words]
        self.files = files
        self.expected = folder / 'whole'
        begin = time.monotonic()
        assert self.finish(self.expected)[0] == 0
        self.seconds = time.monotonic() - begin
        assert {f.name for f in self.expected.glob('*.pth')} == {*files}

    def start(self, work_dir, *options):
        """Start or resume a run in a process that can be killed."""
        (config, *words), log = self.words, self.folder / 'log'
        words = [config, '--work-dir', str(work_dir), '--resume', *words]
        process = self.context.Process(
            target=train, args=([*words, *options], log, str(self.folder))
        )
        process.start()
        return process

    def finish(self, work_dir, *options):
        """Return its exit code and what it printed."""
        process = self.start(work_dir, *options)
        process.join(300)
        return process.exitcode, self.printed()

    def printed(self):
        return (self.folder / 'log').read_text()

    def compare(self, work_dir):
        """Compare with the run that was not interrupted, to the bit."""
        last = self.files[-1]
        named = (work_dir / 'last_checkpoint').read_text()
        assert named == str(work_dir / last)
        actual, expected = (
            torch.load(folder / last, weights_only=False)
            for folder in (work_dir, self.expected)
        )
        for name in ('epoch', 'iter'):
            assert actual['meta'][name] == expected['meta'][name]
        assert actual.keys() == expected.keys()
        for name in actual.keys() - {'meta', 'message_hub'}:
            assert_equal(actual[name], expected[name], name)


@pytest.fixture(scope='module')
def context():
    """Starts processes that have already imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        # the environment of all that it starts
        path = os.pathsep.join([str(ROOT / 'tools'), str(ROOT / 'tests')])
        patch.setenv('PYTHONPATH', path + os.pathsep + str(ROOT))
        patch.setenv('OMP_NUM_THREADS', '1')
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['train', 'mmseg.models', __name__])
        process = context.Process(target=int)
        process.start()
    process.join()
    assert process.exitcode == 0
    return context


@pytest.fixture(scope='module')
def detector_run(context, shapes, tmp_path_factory):
    """Three epochs of two iterations, with what has a state of its own."""
    folder = tmp_path_factory.mktemp('detector')
    (folder / 'slow_disk.py').write_text(SLOW_DISK)
    options = shapes_options(
        shapes,
        'train_cfg.max_epochs=3',
        'train_dataloader.dataset.indices=4',
        'val_dataloader.dataset.indices=1',
        # a third of the time
        'model.backbone.base_channels=8',
        'model.backbone.stem_channels=8',
        'model.neck.in_channels=[8,16,32,64]',
        'train_dataloader.num_workers=1',
        'train_dataloader.persistent_workers=True',
        'default_hooks.ema.type=EMAHook',
        'default_hooks.checkpoint.max_keep_ckpts=-1',
    )
    files = [f'epoch_{number}.pth' for number in (1, 2, 3)]
    return Run(context, folder, [SHAPES, *options], files)


@pytest.fixture(scope='module')
def segmentor_run(context, segmentor, tmp_path_factory):
    """Six iterations, with random crops and dropout."""
    folder = tmp_path_factory.mktemp('segmentor')
    (folder / 'slow_disk.py').write_text(SLOW_DISK)
    options = [
        '--cfg-options',
        'randomness.seed=3',
        'train_cfg.max_iters=6',
        'train_cfg.val_interval=3',
        'val_dataloader.dataset.indices=1',
    ]
    files = [f'iter_{number}.pth' for number in (2, 4, 6)]
    return Run(context, folder, [segmentor, *options], files)


@pytest.fixture(params=['detector', 'segmentor'])
def run(request):
    return request.getfixturevalue(f'{request.param}_run')


def finished(work_dir):
    """The last iteration that is saved; all that is saved can be read."""
    files = list(work_dir.glob('*.pth'))
    last = work_dir / 'last_checkpoint'
    assert not last.exists() or Path(last.read_text()) in files
    metas = [torch.load(file, weights_only=False)['meta'] for file in files]
    return max((meta['iter'] for meta in metas), default=None)


def test_killed_at_random_moments(run, tmp_path):
    """Most of them while a slow disk writes a checkpoint."""
    kills = while_writing = runs = 0
    work_dir, saved = tmp_path / '0', None
    seconds = run.seconds + 2 * len(run.files)  # two files for each, a second
    complete = False
    while kills < KILLS or not complete:
        before, saved = saved, finished(work_dir)
        assert (saved or 0) >= (before or 0)  # none is lost
        process = run.start(work_dir, 'custom_imports.imports=slow_disk')
        time_left = random.uniform(0, seconds) if kills < KILLS else 300
        process.join(time_left)
        complete = not process.is_alive()
        process.kill()
        process.join()
        printed = run.printed()
        begun = re.findall(r'resumed epoch: \d+, iter: (\d+)', printed)
        if complete:
            assert process.exitcode == 0, printed
            if saved and 'ends a run' not in printed:
                assert begun == [str(saved)]
            run.compare(work_dir)
            runs += 1
            work_dir, saved = tmp_path / str(runs), None
        else:
            assert kills < KILLS, printed
            assert begun in ([], [str(saved)])
            kills += 1
            while_writing += any(work_dir.glob('*.part'))
    print(f'{kills} kills, {while_writing} while writing, {runs} runs ended')


def test_full_disk(run, tmp_path):
    """/dev/full is one that takes no byte."""
    first, second, _ = run.files
    (tmp_path / f'{second}.part').symlink_to('/dev/full')
    code, printed = run.finish(tmp_path)
    assert code == 1
    assert 'Traceback' not in printed
    assert printed.splitlines()[-1] == (
        f'error: cannot write {tmp_path / second}: No space left on device; '
        f'continue from {tmp_path / first} with --resume'
    )
    assert not list(tmp_path.glob('*.part'))
    iteration = finished(tmp_path)

    code, printed = run.finish(tmp_path)
    assert code == 0
    assert f'iter: {iteration}' in printed
    run.compare(tmp_path)


def test_truncated_checkpoint(run, tmp_path):
    """The run goes on from the one before, with its seed, and says so."""
    for file in run.files[:2]:
        shutil.copy(run.expected / file, tmp_path)
    first, second = (tmp_path / file for file in run.files[:2])
    (tmp_path / 'last_checkpoint').write_text(str(second))
    os.truncate(second, second.stat().st_size // 2)
    code, printed = run.finish(tmp_path, 'randomness.seed=4')
    assert code == 0
    assert re.search('^--resume: the seed stays [03], not 4$', printed, re.M)
    assert re.search(
        f'^--resume: cannot load the checkpoint {second}: is it damaged.*\n'
        f'--resume: continuing from {first}, the last that can be read$',
        printed,
        re.M,
    )
    run.compare(tmp_path)


DAMAGED, WEIGHTS = 'damaged', 'weights'


def save(file, content):
    """A checkpoint that was saved at a time, in seconds, or a bad one."""
    if content == DAMAGED:
        file.write_bytes(b'PK')
    elif content == WEIGHTS:
        torch.save(dict(weight=torch.zeros(1)), file)
    else:
        meta = dict(epoch=1, iter=4, time=f'20250101_00000{content}')
        hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
        torch.save(dict(meta=meta, message_hub=hub), file)


@pytest.mark.parametrize(
    ('named', 'files', 'expected', 'told'),
    [
        ('epoch_2.pth', dict(epoch_1='1', epoch_2='2'), 'epoch_2', []),
        # killed before it could be named
        ('epoch_2.pth', dict(epoch_2='2', epoch_3='3'), 'epoch_3', []),
        ('epoch_9.pth', dict(epoch_9='2', epoch_10='2'), 'epoch_10', []),
        (
            'epoch_2.pth',
            dict(epoch_2='2', epoch_3='3', epoch_4=DAMAGED),
            'epoch_3',
            ['epoch_4'],
        ),
        (None, dict(epoch_1='1'), 'epoch_1', []),
        ('', dict(iter_5='1', iter_10='2'), 'iter_10', []),
        # of an earlier run
        ('epoch_2.pth', dict(epoch_2='2', epoch_3='1'), 'epoch_2', []),
        (None, dict(epoch_1='2', epoch_3='1', iter_7='1'), 'epoch_1', []),
        # not of the run
        ('epoch_1.pth', dict(epoch_1='1', iter_5='2'), 'epoch_1', []),
        (None, dict(best_mAP_epoch_2='2', epoch_1='1'), 'epoch_1', []),
        (None, dict(swin_window7_224='2', epoch_1='1'), 'epoch_1', []),
        (None, dict(resnet50_20210831=WEIGHTS, iter_1='1'), 'iter_1', []),
        ('model.pth', dict(model='1', epoch_2='2'), 'model', []),
        # what is half written has another name
        (None, {'epoch_1': '1', 'epoch_2.pth.part': '2'}, 'epoch_1', []),
        # bad ones
        ('epoch_2.pth', dict(epoch_1='1'), 'epoch_1', ['epoch_2']),
        (
            'epoch_2.pth',
            dict(epoch_1='1', epoch_2=DAMAGED),
            'epoch_1',
            ['epoch_2'],
        ),
        (
            'epoch_3.pth',
            dict(epoch_1='3', epoch_2=WEIGHTS, epoch_3=DAMAGED, epoch_4='2'),
            'epoch_1',
            ['epoch_3', 'epoch_2'],
        ),
        (None, dict(epoch_1='1', epoch_2=DAMAGED), 'epoch_1', ['epoch_2']),
        # none that can be read
        ('epoch_1.pth', dict(epoch_1=DAMAGED), None, ['epoch_1']),
        (None, dict(iter_1=WEIGHTS), None, ['iter_1']),
        ('old/epoch_1.pth', {}, None, ['old/epoch_1.pth']),
    ],
)
def test_newest_readable_checkpoint(
    tmp_path, capsys, named, files, expected, told
):
    for name, content in files.items():
        name = name if '.' in name else f'{name}.pth'
        save(tmp_path / name, content)
    last = tmp_path / 'last_checkpoint'
    if named is not None:
        last.write_text(named)
    newest_readable = import_module('_checkpoints').newest_readable
    if expected is None:
        with pytest.raises(SystemExit) as caught:
            newest_readable(str(tmp_path))
        assert all(name in caught.value.code for name in told)
        assert not capsys.readouterr().out
        return
    assert newest_readable(str(tmp_path)) == str(tmp_path / f'{expected}.pth')
    printed = capsys.readouterr().out.splitlines()
    lines = [*told, expected]
    if not told and (not named or named == f'{expected}.pth'):
        lines = []  # nothing unexpected
    assert len(printed) == len(lines)
    for line, name in zip(printed, lines):
        assert f'/{name}.pth' in line or f' {name}.pth' in line
        assert bool(told) != ('last_checkpoint names' in line)
    # mmengine's own tools read the name
    if not told:
        assert Path(last.read_text()).name == f'{expected}.pth'


def test_file_that_cannot_be_written(tmp_path):
    """The old one stays, and nothing of the new one."""
    checkpoints = import_module('_checkpoints')
    file = tmp_path / 'epoch_1.pth'
    checkpoints.write_whole(str(file), b'old')
    (tmp_path / 'epoch_1.pth.part').symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left') as caught:
        checkpoints.write_whole(str(file), b'new')
    assert caught.value.filename == str(file)
    assert file.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ('number', 'name', 'expected'),
    [
        ('ENOSPC', None, 'cannot write {}: No space left on device'),
        ('EROFS', '/x', 'cannot write /x: Read-only file system'),
        ('EACCES', '{}/epoch_1.pth', 'cannot write {}/epoch_1.pth: Permiss'),
        ('EACCES', '{}2/data.json', None),
        ('ENOENT', '/data.json', None),
        ('EIO', None, None),
    ],
)
def test_errors_of_the_disk(tmp_path, number, name, expected):
    """Those of reading the data are not taken for them."""
    code = getattr(errno, number)
    name = name and name.format(tmp_path)
    error = OSError(code, os.strerror(code), name)
    caught = SystemExit if expected else OSError
    message = expected and re.escape(expected.format(tmp_path))
    with pytest.raises(caught, match=message):
        with import_module('_checkpoints').writable_errors(str(tmp_path)):
            raise error


def test_errors_that_are_only_a_text(tmp_path):
    """As torch raises those of the processes that load the data."""
    with pytest.raises(OSError, match='Caught'):
        with import_module('_checkpoints').writable_errors(str(tmp_path)):
            raise OSError('Caught OSError in DataLoader worker process 0.')


@pytest.mark.parametrize('folder', ['/runs/a', 's3://runs/a', 's3://runs/a/'])
def test_only_the_checkpoints_folder_loses_files(folder):
    """Whether it is on a disk or elsewhere."""
    removed = []
    backend = Namespace(remove=removed.append, rmtree=removed.append)
    later = import_module('_checkpoints').RemovesLater(backend, folder)
    own = f'{folder.rstrip("/")}/best_mAP_epoch_1.pth'
    for path in (own, 's3://runs/b/1.pth', 'http://runs/a/1.pth', '/b/1.pth'):
        later.remove(path)
        later.rmtree(path)
    assert not removed
    for remove in later.removals:
        remove()
    assert removed == [own, own]


def test_full_work_dir(error, shapes, monkeypatch):
    """It takes empty files, but no byte."""
    monkeypatch.setattr(
        'tempfile.TemporaryFile', lambda dir: open('/dev/full', 'wb')
    )
    monkeypatch.setattr('os.makedirs', lambda *args, **kwargs: None)
    assert re.match(
        '--work-dir: cannot write into .*: No space left on device$',
        error('train', SHAPES, *shapes_options(shapes)),
    )


@pytest.mark.parametrize('given', [None, 3, 5])
def test_the_seed_of_a_run_is_kept(given, capsys):
    """Also by the samplers, whatever the config says now."""
    cfg = Config(dict(randomness=dict(seed=given, deterministic=True)))
    import_module('_resume').keep_seed(cfg, dict(meta=dict(seed=3)))
    assert cfg.randomness == dict(seed=3, deterministic=True)
    printed = capsys.readouterr().out
    assert printed == (
        '--resume: the seed stays 3, not 5\n' if given == 5 else ''
    )
