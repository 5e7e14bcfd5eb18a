"""What train.py and test.py share: options, and checks of what they name.

The checks come before anything is written or trained. What the user can mend
ends in one line that names it; only mistakes of the code show a traceback.
"""

import argparse
import copy
import difflib
import inspect
import os
import os.path as osp
from contextlib import contextmanager

import _cpu
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.utils import import_modules_from_strings

import mmcarafe.registry  # noqa: F401  (so that mmseg:: is found)
from mmcarafe import checkpoint

checkpoint.enable()

CFG_OPTIONS = dict(
    nargs='+',
    action=DictAction,
    metavar='KEY=VALUE',
    help='settings that replace those of the config, e.g. '
    'train_dataloader.batch_size=4 key="[(a,b),(c,d)]" (no blanks)',
)


def make_parser(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, of mmdet or of mmseg')
    parser.add_argument(
        '--work-dir',
        help='folder for logs, checkpoints and results '
        '(default: what the config says, else work_dirs/CONFIG)',
    )
    parser.add_argument('--cfg-options', **CFG_OPTIONS)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what has started the processes of a distributed run',
    )
    # torch.distributed.launch of torch < 2 and >= 2
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def fail(message):
    raise SystemExit(f'error: {message}')


@contextmanager
def mendable(what):
    """Say in one line what a wrong config made mmengine raise."""
    try:
        yield
    except (
        AssertionError,
        ImportError,
        KeyError,
        NameError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        # mmengine raises its own, which say only that custom_imports failed
        while error.__context__ and str(error).startswith('Failed to import'):
            error = error.__context__
        text = error.args[0] if isinstance(error, KeyError) else error
        text = ' '.join(str(text).split())
        fail(f'{what}: {type(error).__name__}: {text}')


def load_config(args, *needed):
    """The config, with what the command line says in it."""
    cfg = read_config(args, *needed)
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or osp.join('work_dirs', name)
    )
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def read_config(args, *needed):
    """The config file, with --cfg-options, and with the keys that it needs."""
    if not osp.isfile(args.config):
        fail(f'config: there is no file {args.config}')
    with mendable(f'config {args.config}'):
        cfg = Config.fromfile(args.config)
    options = args.cfg_options or {}
    _check_keys(options, cfg)
    with mendable('--cfg-options'):
        cfg.merge_from_dict(options)
        if 'custom_imports' in cfg:  # reading the file imported the file's
            import_modules_from_strings(**cfg.custom_imports)
    for key in needed:
        if not cfg.get(key):
            fail(f'config {args.config} has no {key}')
    return cfg


def _check_keys(options, cfg):
    """A misspelt key would be a new setting, which nothing ever reads.

    Below the first level it is an argument, and building finds it.
    """
    known = {
        *cfg,
        *inspect.signature(Runner).parameters,
        # what mmengine and these tools read besides
        *('custom_imports', 'compile', 'find_unused_parameters'),
        *('model_wrapper_cfg', 'runner_type', 'sync_bn'),
        *('tta_model', 'tta_pipeline'),
    }
    for key in options:
        name = key.split('.')[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f', did you mean {close[0]}?' if close else ''
            fail(f'--cfg-options {key}: the config has no {name}{hint}')


def check_model(cfg):
    """Build the model once, in vain, to find misspelt types and arguments."""
    cfg = copy.deepcopy(cfg)  # building writes into it
    scope = cfg.get('default_scope')
    with mendable('model'), MODELS.switch_scope_and_registry(scope) as models:
        models.build(cfg.model)


def as_list(value):
    return value if isinstance(value, (list, tuple)) else [value]


def check_checkpoint(path, resume=False):
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu', 'silent')
    except FileNotFoundError:
        fail(f'there is no checkpoint {path}')
    except RuntimeError as error:
        fail(error)
    if not isinstance(checkpoint, dict):
        fail(f'{path} holds a {type(checkpoint).__name__}, not a state dict')
    if resume and not {'meta', 'message_hub'} <= checkpoint.keys():
        fail(
            f'{path} holds only weights: no run can be resumed from it, but '
            f'one can start with --cfg-options load_from={path}'
        )


def build_runner(cfg):
    if cfg.launcher != 'none' and get_device() == 'cpu':
        if cfg.launcher != 'pytorch':
            fail(f'--launcher {cfg.launcher} needs GPUs; on CPUs use pytorch')
        _cpu.distribute(cfg)
    with mendable('config'):
        if 'runner_type' in cfg:
            return RUNNERS.build(cfg)
        return Runner.from_cfg(cfg)
