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
from mmengine.dataset import BaseDataset
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, RUNNERS
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


def check_data(cfg, split):
    """Look for each file and folder that the data of a split names."""
    loader, evaluator = f'{split}_dataloader', f'{split}_evaluator'
    scope = cfg.get('default_scope')
    with DATASETS.switch_scope_and_registry(scope) as datasets:
        _check_dataset(cfg[loader].dataset, f'{loader}.dataset', datasets)
    for each in as_list(cfg.get(evaluator)):
        if isinstance(each, dict) and each.get('ann_file'):
            _check_ann_file(each.ann_file, f'{evaluator}.ann_file')


def as_list(value):
    return value if isinstance(value, (list, tuple)) else [value]


def _check_dataset(cfg, key, datasets):
    for name in ('dataset', 'datasets'):  # RepeatDataset, ConcatDataset, ...
        if name in cfg:
            for inner in as_list(cfg[name]):
                _check_dataset(inner, f'{key}.{name}', datasets)
            return
    with mendable(key):
        cls = datasets.get(cfg.type)
        if inspect.isclass(cls) and not issubclass(cls, BaseDataset):
            return  # only it knows what it reads
        # lazy: joins the paths, builds the pipeline, reads no annotation
        dataset = datasets.build({**copy.deepcopy(cfg), 'lazy_init': True})
    _check_path(dataset.data_root, f'{key}.data_root')
    for name, path in dataset.data_prefix.items():
        _check_path(path, f'{key}.data_prefix.{name}')
    if dataset.ann_file:
        _check_ann_file(dataset.ann_file, f'{key}.ann_file')


def _check_path(path, key):
    if path and '://' not in path and not osp.exists(path):
        fail(f'{key}: there is no {path}')


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


def check_length(make_loader, key):
    """Load the data set; a sampler of an empty one might wait forever."""
    with mendable(key):
        try:
            length = len(make_loader().dataset)
        except ValueError as error:
            # how mmengine packs the records of no image
            if 'at least one array to concatenate' not in str(error):
                raise
            length = 0
    if not length:
        fail(
            f'{key}.dataset holds no image: look at its paths, at '
            'metainfo.classes and at filter_cfg'
        )
