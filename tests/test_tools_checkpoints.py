"""How the tools treat checkpoints and --cfg-options."""
# ruff: noqa: F811 (arguments of tests have the names of imported fixtures)

import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from test_tools import (  # noqa: F401  (fixtures)
    COCO,
    ROOT,
    SHAPES,
    WRAPPED_FILE,
    environment,
    error,
    execute,
    segmentor,
    shapes,
    shapes_options,
)

NEAREST = 'configs/shapes/faster-rcnn_r18_fpn-nearest_shapes.py'


@pytest.fixture(scope='module')
def run(shapes, tmp_path_factory):
    """The work folder of a finished run of one epoch."""
    work_dir = tmp_path_factory.mktemp('runs') / 'first'
    execute(
        *('python', 'tools/train.py', SHAPES, '--work-dir', work_dir),
        *shapes_options(shapes),
    )
    return work_dir


# Writes half of a file and then waits to be killed.
SLOW = f"""
import builtins
import os
import signal
import time

from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS

really_open = builtins.open


{WRAPPED_FILE}

class Half(File):
    def write(self, data):
        self.stream.write(data[:len(data) // 2])
        self.stream.flush()
        really_open(os.environ['REACHED'], 'w').close()
        time.sleep(600)


def slow_open(file, mode='r', *args, **kwargs):
    stream = really_open(file, mode, *args, **kwargs)
    folder, name = os.path.split(str(file))
    second = 'epoch_2' in ' '.join([name, *os.listdir(folder or '.')])
    if 'w' in mode and second and name.startswith(os.environ['SLOW']):
        return Half(stream)
    return stream


@METRICS.register_module()
class Rising(BaseMetric):
    score = 0

    def __init__(self, **kwargs):
        super().__init__()

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Rising.score += 1
        return dict(score=Rising.score)


@HOOKS.register_module()
class CtrlC(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        if runner.iter == int(os.environ['STOP']):
            # a shell that runs the tests in the background ignores it
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)


if 'SLOW' in os.environ:
    builtins.open = slow_open
"""


def killable(shapes, folder, *more):
    """Arguments and environment for two epochs with the module above."""
    (folder / 'slow.py').write_text(SLOW)
    arguments = [
        *('tools/train.py', SHAPES, '--work-dir', folder / 'work'),
        *shapes_options(shapes, 'custom_imports.imports=slow'),
        *('train_cfg.max_epochs=2', *more),
    ]
    path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])
    return [str(word) for word in arguments], dict(PYTHONPATH=path)


@pytest.mark.parametrize('slow', ['epoch_2', 'last_checkpoint', 'best_score'])
def test_killed_while_saving(shapes, tmp_path, slow):
    """Even where no second checkpoint is kept, and the best is saved too."""
    train, env = killable(
        shapes,
        tmp_path,
        'default_hooks.checkpoint.max_keep_ckpts=1',
        'default_hooks.checkpoint.save_best=score',
        'default_hooks.checkpoint.rule=greater',
        'val_evaluator.type=Rising',
    )
    work_dir, reached = tmp_path / 'work', tmp_path / 'reached'
    process = subprocess.Popen(
        [sys.executable, *train],
        cwd=ROOT,
        env=environment(**env, SLOW=slow, REACHED=str(reached)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not reached.exists():
            assert process.poll() is None, 'it ended and had not saved twice'
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    last = (work_dir / 'last_checkpoint').read_text()
    assert last in {str(work_dir / f'epoch_{i}.pth') for i in (1, 2)}
    for file in work_dir.glob('*.pth'):
        assert torch.load(file, weights_only=False)['state_dict']
    assert list(work_dir.glob('best_score*.pth'))

    printed = execute('python', *train, '--resume', **env)
    if slow == 'epoch_2':
        assert 'resumed epoch: 1, iter: 4' in printed
    else:  # the last epoch was saved
        assert f'{work_dir}/epoch_2.pth ends a run' in printed
    last = (work_dir / 'last_checkpoint').read_text()
    assert last == str(work_dir / 'epoch_2.pth')


def test_one_checkpoint_is_kept_if_so_configured(shapes, tmp_path):
    train, env = killable(
        shapes,
        tmp_path,
        'default_hooks.checkpoint.max_keep_ckpts=1',
        'default_hooks.checkpoint.save_best=score',
        'default_hooks.checkpoint.rule=greater',
        'val_evaluator.type=Rising',
    )
    execute('python', *train, **env)
    assert {p.name for p in (tmp_path / 'work').glob('*.p*')} == {
        'epoch_2.pth',
        'best_score_epoch_2.pth',
    } | {Path(SHAPES).name}


@pytest.mark.parametrize('stop', [1, 5])
def test_ctrl_c(shapes, tmp_path, stop):
    """In the first epoch, and in the second."""
    train, env = killable(shapes, tmp_path, 'default_hooks.c.type=CtrlC')
    process = subprocess.run(
        [sys.executable, *train],
        cwd=ROOT,
        env=environment(**env, STOP=str(stop)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 130
    assert 'Traceback' not in process.stderr
    saved = tmp_path / 'work' / 'epoch_1.pth'
    expected = (
        'no checkpoint was saved yet'
        if stop == 1
        else f'continue from {saved} with --resume'
    )
    assert process.stderr.splitlines()[-1] == (
        f'stopped at iteration {stop}; {expected}'
    )


def state_dict(config):
    cfg = Config.fromfile(ROOT / config)
    with MODELS.switch_scope_and_registry(cfg.default_scope) as models:
        return models.build(cfg.model).state_dict()


def without(names, state):
    return {k: v for k, v in state.items() if not re.search(names, k)}


@pytest.fixture(scope='module')
def weights():
    return state_dict(SHAPES)


UPSAMPLERS = 'upsample_modules'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: {}, r'0 of \d+ weights fit; missing: [\w.]+, [\w.]+, '),
        (
            lambda w: dict(state_dict={}, meta={}),
            r'0 of \d+ weights fit; missing: ([\w.]+, ){2}[\w.]+ and \d+ more',
        ),
        (
            lambda w: dict(state_dict=without(UPSAMPLERS, w)),
            r'(\d\d+) of (?!\1)\d+ weights fit; missing: '
            r'neck.upsample_modules.[^;]*$',
        ),
        (
            lambda w: {**w, 'roi_head.bbox_head.fc_cls.bias': torch.zeros(81)},
            r'(\d\d+) of (?!\1)\d+ weights fit; of another shape: '
            r'roi_head.bbox_head.fc_cls.bias \[81\], not \[7\]$',
        ),
        (
            lambda w: {**w, 'more': torch.zeros(1)},
            r'(\d+) of \1 weights fit; unexpected: more$',
        ),
        (
            lambda w: dict(model=w, optimizer=[]),
            r'0 of \d+ .*; unexpected: model, optimizer$',
        ),
    ],
    ids=['empty', 'no-state', 'upsamplers', 'shape', 'more', 'wrapped'],
)
def test_weights_that_do_not_fit_are_not_tested(
    error, shapes, weights, tmp_path, change, message
):
    file = tmp_path / 'weights.pth'
    torch.save(change(weights), file)
    printed = error('test', SHAPES, file, *shapes_options(shapes))
    assert re.match(f'{file} does not fit this config: {message}', printed)


def test_weights_of_carafe_in_the_nearest_config(
    error, shapes, weights, tmp_path
):
    file = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=weights), file)
    printed = error('test', NEAREST, file, *shapes_options(shapes))
    assert re.match(
        rf'{file} does not fit this config: (\d+) of \1 weights fit; '
        r'unexpected: neck.upsample_modules.0.\S+, ',
        printed,
    )


def test_a_state_dict_that_is_none(error, shapes, tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=[1]), file)
    assert error('test', SHAPES, file, *shapes_options(shapes)) == (
        f'{file} holds a list as its state_dict'
    )


@pytest.mark.parametrize(
    'change',
    [
        lambda w: w,
        lambda w: {f'module.{k}': v for k, v in w.items()},
        lambda w: dict(meta={}, state_dict=without('num_batches_tracked', w)),
        lambda w: {**w, 'data_preprocessor.mean': torch.zeros(3)},
    ],
    ids=['bare', 'distributed', 'counters', 'preprocessor'],
)
def test_weights_that_fit(weights, tmp_path, change):
    checkpoints = import_module('_checkpoints')
    cfg = Config.fromfile(ROOT / SHAPES)
    torch.manual_seed(1)  # other weights than those that were saved
    model = import_module('_cli').build_model(cfg)
    name = 'neck.upsample_modules.0.channel_compressor.weight'
    assert not torch.equal(model.state_dict()[name], weights[name])
    checkpoints.check_weights(model, 'x.pth', change(weights))
    torch.testing.assert_close(model.state_dict()[name], weights[name])


@pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated')
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False')
def test_auxiliary_head_is_not_needed_to_test(segmentor):
    checkpoints = import_module('_checkpoints')
    cfg = Config.fromfile(segmentor)
    model = import_module('_cli').build_model(cfg)
    state = model.state_dict()
    checkpoints.check_weights(model, '', without('^auxiliary', state))
    cfg.model.auxiliary_head = None
    model = import_module('_cli').build_model(cfg)
    checkpoints.check_weights(model, '', state)
    with pytest.raises(SystemExit, match='does not fit this config'):
        checkpoints.check_weights(model, '', without('^decode', state))


@pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated')
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False')
def test_weights_of_a_detector_are_not_exported(
    monkeypatch, segmentor, weights, tmp_path
):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    file, out = tmp_path / 'weights.pth', tmp_path / 'out.onnx'
    torch.save(weights, file)
    words = ['export', str(segmentor), str(file), '--out', str(out)]
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit) as caught:
        import_module('export_onnx').main()
    assert re.match(
        rf'error: {file} does not fit this config: \d+ of \d+ weights fit; '
        r'missing: .* and \d+ more; unexpected: .* and \d+ more',
        caught.value.code,
    )
    assert not out.exists()


def test_training_says_what_it_starts_from(
    error, capsys, shapes, weights, tmp_path
):
    file = tmp_path / 'weights.pth'
    changed = without(UPSAMPLERS, weights)
    changed['roi_head.bbox_head.fc_cls.bias'] = torch.zeros(81)
    torch.save({**changed, 'more': torch.zeros(1)}, file)
    (tmp_path / 'file').touch()
    # stopped by the last check
    options = shapes_options(shapes, f'load_from={file}')
    error('train', SHAPES, *options, work_dir=tmp_path / 'file/work')
    assert re.search(
        rf'^load_from {file}: \d+ of \d+ weights are loaded; these start '
        r'fresh: neck.upsample_modules\S+, .* and \d+ more; these are not '
        r'used: more$',
        capsys.readouterr().out,
        re.MULTILINE,
    )


def test_training_from_nothing_that_fits(error, shapes, tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save(dict(more=torch.zeros(1)), file)
    printed = error(
        'train', SHAPES, *shapes_options(shapes, f'load_from={file}')
    )
    assert re.match(
        rf'load_from: {file} does not fit this config: 0 of \d+ weights fit; '
        'missing: .*; unexpected: more$',
        printed,
    )


def test_pretrained_without_torchvision(error, monkeypatch):
    """The first that a new user meets: earlier than the missing data."""
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    assert error('train', COCO) == (
        'model.backbone.init_cfg: torchvision://resnet50 needs torchvision, '
        'which names the file to download: install it, or start with random '
        'weights: --cfg-options model.backbone.init_cfg=None'
    )


@pytest.mark.parametrize('key', ['model.pretrained', 'model.neck.init_cfg'])
def test_pretrained_file_that_is_missing(error, tmp_path, key):
    value = 'no.pth'
    if key.endswith('init_cfg'):
        value = [
            dict(type='Normal'),
            dict(type='Pretrained', checkpoint=value),
        ]
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(ROOT / SHAPES)!r}\n'
        + (
            f'model = dict(pretrained={value!r})'
            if key == 'model.pretrained'
            else f'model = dict(neck=dict(init_cfg={value!r}))'
        )
    )
    assert error('train', config) == (
        f'{key}: there is no checkpoint no.pth; name one, or start with '
        f'random weights: --cfg-options {key}=None'
    )


def test_failed_download(shapes, tmp_path):
    """At an address where nothing answers, so it is found while training."""
    url = 'http://127.0.0.1:9/resnet18.pth'
    init_cfg = dict(_delete_=True, type='Pretrained', checkpoint=url)
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(ROOT / SHAPES)!r}\n'
        f'model = dict(backbone=dict(init_cfg={init_cfg}))'
    )
    process = subprocess.run(
        [
            *(sys.executable, 'tools/train.py', config),
            *('--work-dir', tmp_path / 'work', *shapes_options(shapes)),
        ],
        cwd=ROOT,
        env=environment(TORCH_HOME=str(tmp_path), no_proxy='127.0.0.1'),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1
    assert 'Traceback' not in process.stderr
    assert re.match(
        rf'error: cannot load the checkpoint {url}: URLError: .*; to do '
        r'without: --cfg-options model.backbone.init_cfg=None$',
        process.stderr.splitlines()[-1],
    )


CONSUMED = 'counts only while the config file is read; set instead:'


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'data_root=/x',
            f'--cfg-options data_root: data_root {CONSUMED} --data-root, or '
            'train_dataloader.dataset.data_root, '
            'val_dataloader.dataset.data_root, '
            'test_dataloader.dataset.data_root$',
        ),
        (
            'max_epochs=9',
            f'--cfg-options max_epochs: max_epochs {CONSUMED} '
            'train_cfg.max_epochs, ',
        ),
        (
            'test_pipeline.1.scale=(8,8)',
            '--cfg-options test_pipeline.1.scale: nothing reads '
            'test_pipeline but the config file itself$',
        ),
        (
            'dataset.data_root=/x',
            f'--cfg-options dataset.data_root: dataset {CONSUMED} '
            'train_dataloader.dataset.data_root, ',
        ),
        ('batch', '--cfg-options: expected KEY=VALUE, got batch$'),
        ('=3', '--cfg-options: expected KEY=VALUE, got =3$'),
        ('a=[(1,2]', r'--cfg-options a: AssertionError: Imbalanced brackets'),
        (
            'optim_wrapper.optimizer.learning_rate=1',
            'optim_wrapper: TypeError: .*learning_rate',
        ),
        (
            'optim_wrapper.optimizer.lr=high',
            'optim_wrapper.optimizer.lr: expected a number, got high$',
        ),
        (
            'train_cfg.max_epoch=1',
            "train_cfg: TypeError: got an unexpected .* 'max_epoch'$",
        ),
        (
            'train_cfg.max_epochs=many',
            'train_cfg.max_epochs: expected a whole number, got many$',
        ),
    ],
)
def test_options_that_nothing_reads(error, shapes, option, message):
    if option.split('.')[0] in ('data_root', 'dataset'):
        options = ['--cfg-options', option]  # the data are looked for later
    else:
        options = shapes_options(shapes)
        options.append(option)
    assert re.match(message, error('train', SHAPES, *options))


def test_name_that_nothing_reads(error, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = {str(ROOT / SHAPES)!r}\nhalf = 12345.5')
    assert error('train', config, '--cfg-options', 'half=2') == (
        '--cfg-options half: nothing reads half but the config file itself'
    )


@pytest.mark.parametrize(
    ('option', 'keys'),
    [
        (
            'data_root=/x',
            '--data-root, or train_dataloader.dataset.data_root, '
            'val_dataloader.dataset.data_root, '
            'test_dataloader.dataset.data_root, val_evaluator.ann_file, '
            'test_evaluator.ann_file',
        ),
        (
            'test_pipeline.1.scale=(8,8)',
            'val_dataloader.dataset.pipeline.1.scale, '
            'test_dataloader.dataset.pipeline.1.scale',
        ),
        (
            'backend_args.x=1',
            'train_dataloader.dataset.pipeline.0.backend_args.x, ',
        ),
    ],
)
def test_names_with_copies(error, option, keys):
    key = option.split('=')[0]
    printed = error('train', COCO, '--cfg-options', option)
    name = key.split('.')[0]
    assert printed.startswith(f'--cfg-options {key}: {name} {CONSUMED} {keys}')


def test_blanks_in_options(error, tmp_path):
    folder = tmp_path / 'my data'
    words = ['--cfg-options', f'train_dataloader.dataset.data_root={folder}']
    assert error('train', SHAPES, *words) == (
        f'train_dataloader.dataset.data_root: there is no {folder}'
    )
    parse = import_module('_cli').Options.parse
    assert parse('a (b)  c') == 'a (b)  c'
    assert parse("'a, b'") == 'a, b'
    assert parse('[ a b , (1, 2.5 ),None]') == ['a b', (1, 2.5), None]
    assert parse("'a','b'") == ['a', 'b']
    assert parse('3 ') == 3
    assert parse("''") == ''


def test_file_in_the_place_of_the_work_dir(error, shapes, tmp_path):
    (tmp_path / 'file').touch()
    work_dir = tmp_path / 'file/work'
    options = shapes_options(shapes)
    assert error('train', SHAPES, *options, work_dir=work_dir) == (
        f'--work-dir: cannot write into {work_dir}: Not a directory'
    )


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            ['model.roi_head.bbox_head.fc_out_channels=128'],
            r'does not fit this config: (\d+) of (?!\1)\d+ weights fit; of '
            r'another shape: roi_head.bbox_head.fc_cls.weight .*\[7, 256\], '
            r'not \[7, 128\]',
        ),
        (
            ['optim_wrapper.optimizer.type=RMSprop'],
            'is from a run with another optim_wrapper: it sets amsgrad, '
            'betas.*, RMSprop sets alpha, centered, momentum; ',
        ),
        (
            ['optim_wrapper.paramwise_cfg.norm_decay_mult=0'],
            'is from a run with another optim_wrapper: groups of .* '
            'parameters',
        ),
        (
            ['model.neck.type=FPN'],
            r'does not fit this config: (\d+) of \1 weights fit; unexpected: ',
        ),
    ],
    ids=['width', 'optimizer', 'groups', 'neck'],
)
def test_resuming_another_run(error, shapes, run, options, message):
    file = run / 'epoch_1.pth'
    printed = error(
        'train', SHAPES, '--resume', file, *shapes_options(shapes, *options)
    )
    assert re.match(f'--resume: {file} {message}', printed)
    assert printed.endswith(
        'resume with the config of its run, or begin with its weights: '
        f'--cfg-options load_from={file}'
    )


def test_finished_run_of_a_renamed_folder(shapes, run, tmp_path):
    moved = tmp_path / 'moved'
    moved.mkdir()
    (moved / 'epoch_1.pth').symlink_to(run / 'epoch_1.pth')
    (moved / 'last_checkpoint').write_text('work_dirs/old/epoch_1.pth')
    before = sorted(moved.iterdir())
    train = ['python', 'tools/train.py', SHAPES, '--work-dir', moved]
    options = shapes_options(shapes)
    printed = execute(*train, '--resume', *options)
    assert printed.splitlines()[-1] == (
        f'{moved}/epoch_1.pth ends a run with train_cfg.max_epochs=1: '
        'raise that to train longer, or start again in another --work-dir'
    )
    assert sorted(moved.iterdir()) == before
    printed = execute(*train, '--resume', *options, 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1, iter: 4' in printed
    assert (moved / 'epoch_2.pth').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('old/epoch_1.pth', 'there is no checkpoint old/epoch_1.pth'),
        (
            '',
            '{}/last_checkpoint is empty; name a file: --resume CHECKPOINT',
        ),
    ],
)
def test_last_checkpoint_that_names_no_file(
    monkeypatch, shapes, tmp_path, text, message
):
    (tmp_path / 'last_checkpoint').write_text(text)
    words = ['--work-dir', str(tmp_path), '--resume', *shapes_options(shapes)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['train', SHAPES, *words])
    with pytest.raises(SystemExit) as caught:
        import_module('train').main()
    assert caught.value.code == f'error: {message.format(tmp_path)}'


def test_resuming_without_knowing_the_newest(monkeypatch, shapes, tmp_path):
    """Training anew would write over the checkpoints that are there."""
    (tmp_path / 'latest.pth').touch()
    words = ['--work-dir', str(tmp_path), '--resume', *shapes_options(shapes)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['train', SHAPES, *words])
    with pytest.raises(SystemExit) as caught:
        import_module('train').main()
    assert caught.value.code == (
        f'error: --resume: {tmp_path} has latest.pth but no last_checkpoint, '
        'which names the newest; name the file: --resume CHECKPOINT'
    )
    assert [file.name for file in tmp_path.iterdir()] == ['latest.pth']


def test_what_a_scheduler_adds_is_no_difference():
    model = torch.nn.Linear(2, 1)
    own = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    saved = own.optimizer.state_dict()
    saved['param_groups'][0].update(initial_lr=0.1, initial_momentum=0.9)
    del saved['param_groups'][0]['maximize']  # as an older torch
    checkpoint = dict(
        meta=dict(epoch=1, iter=4),
        message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
        state_dict=model.state_dict(),
        optimizer=saved,
    )
    check = import_module('_checkpoints').check_resumed
    check('x.pth', checkpoint, model, own)
    saved['param_groups'][0]['betas'] = (0.9, 0.99)
    with pytest.raises(SystemExit, match='it sets betas, SGD sets maximize'):
        check('x.pth', checkpoint, model, own)


def test_resuming_before_the_first_checkpoint(
    error, capsys, shapes, tmp_path, weights
):
    """Starts, and from the config's load_from, as it would without."""
    file = tmp_path / 'weights.pth'
    torch.save(weights, file)
    (tmp_path / 'file').touch()
    work_dir = tmp_path / 'file/work'
    options = ['--resume', *shapes_options(shapes, f'load_from={file}')]
    # stopped by the last check
    error('train', SHAPES, *options, work_dir=work_dir)
    printed = capsys.readouterr().out
    assert (
        f'--resume: there is no checkpoint in {work_dir} yet, so training '
        'starts from the beginning'
    ) in printed
    assert re.search(rf'load_from {file}: (\d+) of \1 weights are', printed)
