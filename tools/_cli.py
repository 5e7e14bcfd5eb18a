"""What train.py and test.py share: options, and checks of what they name.

The checks come before anything is written or trained. A user's mistake ends in
one line that names it; only a bug shows a traceback.
"""

import argparse
import copy
import difflib
import inspect
import logging
import os
import os.path as osp
import re
import tempfile
import traceback
from contextlib import contextmanager
from functools import partial

import _cpu
import mmengine.registry
import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    LOOPS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    RUNNERS,
)
from mmengine.runner import Runner, activation_checkpointing
from mmengine.utils import apply_to, import_modules_from_strings
from torch.utils.checkpoint import checkpoint as recompute

import mmcarafe.registry  # so that mmseg:: is found
from mmcarafe import checkpoint
from mmcarafe.models.fpn import TopDown
from mmcarafe.registry import HOOKS

checkpoint.enable()


class Options(DictAction):
    """mmengine's, but blanks stay in values, and a missing "=" is named."""

    def __call__(self, parser, namespace, values, option_string=None):
        options = dict(getattr(namespace, self.dest, None) or {})
        for word in values:
            key, equals, value = word.partition('=')
            if not key or not equals:
                fail(f'{option_string}: expected KEY=VALUE, got {word}')
            with user_errors(f'{option_string} {key}'):
                options[key] = self.parse(value)
        setattr(namespace, self.dest, options)

    @classmethod
    def parse(cls, value):
        value = value.strip()
        quoted = re.fullmatch(r"""'([^']*)'|"([^"]*)\"""", value)
        if quoted:
            return quoted[1] or quoted[2] or ''  # commas and all
        # hides blanks inside words from mmengine, not those beside commas
        value = re.sub(
            r'(?<![,(\[]) +(?![ ,)\]])', lambda m: BLANK * len(m[0]), value
        )
        return apply_to(
            cls._parse_iterable(value),
            lambda each: isinstance(each, str),
            lambda each: each.replace(BLANK, ' '),
        )


BLANK = '\0'  # no argument of a program can hold it
CFG_OPTIONS = dict(
    nargs='+',
    action=Options,
    metavar='KEY=VALUE',
    help='settings that replace those of the config, e.g. '
    'train_dataloader.batch_size=4 key="[(a,b),(c,d)]" key="a b"',
)
DATA_ROOT = dict(
    metavar='DIR', help="folder of the data, instead of the config's"
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
    parser.add_argument('--data-root', **DATA_ROOT)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    # torch.distributed.launch of torch < 2 and >= 2
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def fail(message):
    raise SystemExit(f'error: {message}')


USER_ERRORS = (
    AssertionError,
    ImportError,
    KeyError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)


@contextmanager
def user_errors(what, *more):
    """Report in one line what a wrong config made mmengine raise.

    Args:
        what (str): the setting or file that is wrong then.
        more (type): exceptions that are no bugs here either.
    """
    try:
        yield
    except (*USER_ERRORS, *more) as error:
        # mmengine's own errors say only that custom_imports failed
        while error.__context__ and str(error).startswith('Failed to import'):
            error = error.__context__
        if isinstance(error, KeyError):
            _fail_for_unknown_type(what, str(error.args[0]))
        text = error.args[0] if isinstance(error, KeyError) else error
        text = ' '.join(str(text).split())
        if not text:  # of a bare assert: the line says what was expected
            text = traceback.extract_tb(error.__traceback__)[-1].line
        fail(f'{what}: {type(error).__name__}: {text}')


def _fail_for_unknown_type(what, text):
    """Suggest the type that was meant; mmengine only cites its manual."""
    found = re.match(r'(\S+) is not in the (\w+)(::\w+)? registry', text)
    if not found:
        return
    wrong, scope, kind = found.groups()
    kind = (kind or f'::{scope}')[2:]
    mmcarafe.registry.MODELS.import_from_location()
    full_names = {}
    for root in vars(mmengine.registry).values():
        if not isinstance(root, mmengine.registry.Registry):
            continue
        if root.name != kind:
            continue
        children = sorted(
            root.children.values(), key=lambda c: c.scope == scope
        )
        for registry in [root, *children]:  # the nearest comes last
            near = registry is root or registry.scope == scope
            prefix = '' if near else f'{registry.scope}.'
            for name in registry.module_dict:
                full_names[name] = prefix + name
    close = difflib.get_close_matches(wrong.split('.')[-1], full_names, 1)
    hint = f', did you mean {full_names[close[0]]}?' if close else ''
    fail(f'{what}: there is no {kind} of type {wrong}{hint}')


def load_config(args, *needed):
    """The config, with the command line's settings in it."""
    cfg = read_config(args, *needed)
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or osp.join('work_dirs', name)
    )
    if args.data_root is not None:
        move_data_root(cfg, args.data_root)
    cfg.launcher = args.launcher
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        fail(
            '--launcher pytorch: the variable RANK is not set, start the '
            'processes with torchrun or with tools/dist_*.sh'
        )
    for key, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, dict) and 'type' not in hook:
            fail(f'default_hooks.{key} has no type')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def read_config(args, *needed):
    """The config file with --cfg-options, checked for the needed keys."""
    if not osp.isfile(args.config):
        fail(f'config: there is no file {args.config}')
    # whatever the file raises is its author's mistake
    with user_errors(f'config {args.config}', Exception):
        cfg = Config.fromfile(args.config)
    options = args.cfg_options or {}
    _check_keys(options, cfg)
    with user_errors('--cfg-options'):
        cfg.merge_from_dict(options)
        if 'custom_imports' in cfg:  # reading it imported its own
            import_modules_from_strings(**cfg.custom_imports)
    for key in needed:
        if not cfg.get(key):
            fail(f'config {args.config} has no {key}')
    return cfg


def move_data_root(cfg, root):
    """Let each path of the data begin with this folder."""
    parts = [
        f'{split}_{part}'
        for split in ('train', 'val', 'test')
        for part in ('dataloader', 'evaluator')
    ]
    paths = dict(walk({part: cfg.get(part) for part in parts}))
    old = {
        path
        for key, path in paths.items()
        if key.endswith('.data_root') and path
    }
    if len(old) != 1:
        fail(
            '--data-root: expected a config with one data_root, got '
            f'{some(sorted(old)) or "none"}; set each by --cfg-options'
        )
    old = old.pop()
    prefix = old.rstrip('/') + '/'
    for part in parts:
        if cfg.get(part):
            cfg[part] = apply_to(
                cfg[part],
                lambda x: isinstance(x, str) and f'{x}/'.startswith(prefix),
                lambda x: osp.join(root, x[len(prefix) :]),
            )


def _check_keys(options, cfg):
    """Refuse settings that nothing would ever read.

    Below the first level, settings are arguments, which building checks.
    """
    read = {
        *inspect.signature(Runner).parameters,
        # what else mmengine and these tools read
        *('activation_checkpointing', 'compile', 'custom_imports'),
        *('efficient_conv_bn_eval', 'find_unused_parameters'),
        *('model_wrapper_cfg', 'runner_type', 'sync_bn'),
        *('tta_model', 'tta_pipeline'),
    }
    kind = options.get('runner_type', cfg.get('runner_type'))
    if kind:
        runner = RUNNERS.get(kind) if isinstance(kind, str) else kind
        if runner:  # else building names the type
            read.update(inspect.signature(runner).parameters)
    if 'data_preprocessor' in cfg.get('model', {}):
        read.remove('data_preprocessor')  # the default for models without one
    for key in options:
        name, *rest = key.split('.')
        if name in read:
            continue
        if name not in cfg:
            close = difflib.get_close_matches(name, {*cfg, *read}, 1)
            hint = f', did you mean {close[0]}?' if close else ''
            fail(f'--cfg-options {key}: the config has no {name}{hint}')
        copies = ['.'.join([each, *rest]) for each in _copies(cfg, name, read)]
        if copies:
            shorter = ' --data-root, or' if key == 'data_root' else ''
            fail(
                f'--cfg-options {key}: {name} counts only while the config '
                f'file is read; set instead:{shorter} {some(copies, 6)}'
            )
        if not cfg.get('custom_imports'):  # whose modules may read anything
            fail(
                f'--cfg-options {key}: nothing reads {name} but the config '
                'file itself'
            )


def _copies(cfg, name, read):
    """Keys that got their value from a top-level name of a config file.

    Keys of the same name come first. Others count if their value, unless None
    or a bool, equals the name's or is a string or dict that contains it. Where
    none does, the file has replaced the value, and only keys of that name
    are left.
    """
    value = _unscoped(cfg[name])
    named, equal, replaced = [], [], []
    for key, other in walk({k: _unscoped(cfg[k]) for k in cfg if k in read}):
        same = type(other) is type(value) and (
            other == value
            or (isinstance(value, str) and len(value) > 2 and value in other)
            or (
                isinstance(value, dict)
                and all(k in other and other[k] == value[k] for k in value)
            )
        )
        if key.split('.')[-1] == name:
            (named if same else replaced).append(key)
        elif same and value is not None and not isinstance(value, bool):
            equal.append(key)
    return named + equal or replaced


def _unscoped(value):
    """Without the `_scope_` that mmengine writes into some copies only."""
    if isinstance(value, dict):
        return {k: _unscoped(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unscoped, value))
    return value


def walk(value, prefix=''):
    """Each (key, value) in a config, with keys as in --cfg-options."""
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield f'{prefix}{key}', inner
        yield from walk(inner, f'{prefix}{key}.')


def some(names, most=3):
    """The first few names, and how many more there are."""
    names = [str(name) for name in names]
    more = len(names) - most
    return ', '.join(names[:most]) + (f' and {more} more' if more > 0 else '')


def is_first():
    """Whether this is the first process, even before they are connected."""
    return os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0'


def say(text):
    """Print a line, from the first process only."""
    if is_first():
        print(text, flush=True)


def build_model(cfg):
    """Build and return the model, before anything is written.

    Misspelt types and arguments show here, and a checkpoint is compared with
    the names and shapes of its weights.
    """
    cfg = copy.deepcopy(cfg)  # building writes into it
    scope = cfg.get('default_scope')
    with user_errors('model'), MODELS.switch_scope_and_registry(
        scope
    ) as models:
        model = models.build(cfg.model)
    _check_width(model)
    return model


def _check_width(model):
    """Compare the channels that a neck of ours gives with what heads take."""
    neck = getattr(model, 'neck', None)
    if not isinstance(neck, TopDown):
        return
    for name in ('rpn_head', 'bbox_head', 'decode_head', 'auxiliary_head'):
        for head in as_list(getattr(model, name, None)):
            if getattr(head, 'input_transform', None) == 'resize_concat':
                continue  # mmseg stores the sum over the levels
            for channels in as_list(getattr(head, 'in_channels', None)):
                if channels not in (None, neck.out_channels):
                    fail(
                        f'model.{name}.in_channels is {channels}, expected '
                        f'{neck.out_channels}, the out_channels of model.neck'
                    )
    roi_head = getattr(model, 'roi_head', None)
    if getattr(roi_head, 'with_shared_head', False):
        return  # which changes the channels
    for kind in ('bbox', 'mask'):
        extractor = getattr(roi_head, f'{kind}_roi_extractor', None)
        head = getattr(roi_head, f'{kind}_head', None)
        given = getattr(extractor, 'out_channels', None)
        taken = getattr(head, 'in_channels', given)
        if None not in (given, taken) and given != taken:
            fail(
                f'model.roi_head.{kind}_head.in_channels is {taken}, expected '
                f'{given}, the out_channels of model.roi_head.{kind}_roi_'
                'extractor'
            )


@contextmanager
def channel_errors():
    """End in one line where the maps do not fit a neck or head of ours."""
    try:
        yield
    except ValueError as error:
        if not re.match(
            r'inputs(\[\d+\])? has \d+ (levels|channels)', str(error)
        ):
            raise
        modules = [
            frame.f_locals['self']
            for frame, _ in traceback.walk_tb(error.__traceback__)
            if isinstance(frame.f_locals.get('self'), torch.nn.Module)
        ]
        fail(f'model: {type(modules[-1]).__name__}: {error}')


def recompute_activations(cfg, model):
    """Check mmengine's setting for it, and let every module learn with it.

    mmengine's default is torch's older way, which finds no gradient through
    tuples: behind ``activation_checkpointing='neck'``, nothing would learn.
    """
    modules = dict(model.named_modules())
    for name in as_list(cfg.get('activation_checkpointing') or []):
        if str(name) not in modules:
            close = difflib.get_close_matches(str(name), modules, 1)
            hint = f', did you mean {close[0]}?' if close else ''
            fail(f'activation_checkpointing: the model has no {name}{hint}')
    activation_checkpointing.checkpoint = partial(
        recompute, use_reentrant=False
    )


def check_hooks(cfg, model):
    """Build our own hooks, which say what is wrong with their arguments."""
    for i, hook in enumerate(cfg.get('custom_hooks') or []):
        if str(hook.get('type')).startswith('mmcarafe.'):
            with user_errors(f'custom_hooks.{i}'):
                HOOKS.build(copy.deepcopy(hook)).check(cfg, model)


def build_optimizer(cfg, model):
    """Build the optimizer to find mistakes in it; return its wrapper.

    None for several optimizers, which only their runner knows how to build,
    and for one whose state is distributed.
    """
    wrapper = copy.deepcopy(cfg.optim_wrapper)
    if 'optimizer' not in wrapper:
        return None
    kind = wrapper.optimizer.get('type')
    name = str(getattr(kind, '__name__', kind))
    if cfg.launcher != 'none' and name.endswith('ZeroRedundancyOptimizer'):
        return None  # needs the processes, which do not know each other yet
    lr = wrapper.optimizer.get('lr', 0)
    if isinstance(lr, str):
        fail(f'optim_wrapper.optimizer.lr: expected a number, got {lr}')
    switch = OPTIM_WRAPPER_CONSTRUCTORS.switch_scope_and_registry
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)  # the run will list the parameters' rates
    try:
        with user_errors('optim_wrapper'), switch(cfg.get('default_scope')):
            return build_optim_wrapper(model, wrapper)
    finally:
        logger.setLevel(level)


def check_train_cfg(cfg):
    """Compare train_cfg with the arguments of the loop that it describes."""
    settings = dict(cfg.train_cfg)
    settings.pop('_scope_', None)  # mmengine adds it to configs from mmdet::
    by_epoch = settings.pop('by_epoch', None)
    name = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
    scope = cfg.get('default_scope')
    with user_errors('train_cfg'), LOOPS.switch_scope_and_registry(
        scope
    ) as loops:
        loop = settings.pop('type', name)
        loop = loops.get(loop) if isinstance(loop, str) else loop
        if loop is None:
            fail(f'train_cfg.type: there is no {cfg.train_cfg.type}')
        inspect.signature(loop).bind(None, None, **settings)
    for key in ('max_epochs', 'max_iters', 'val_begin', 'val_interval'):
        value = settings.get(key, 1)
        number = isinstance(value, (int, float)) and type(value) is not bool
        if not (number and float(value).is_integer()):
            fail(f'train_cfg.{key}: expected a whole number, got {value}')


def _make_work_dir(cfg):
    """The last check, and the first that writes: can the folder be used?"""
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir) as stream:
            stream.write(b'1')  # a full disk still takes empty files
    except OSError as error:
        fail(f'--work-dir: cannot write into {cfg.work_dir}: {error.strerror}')


def as_list(value):
    return value if isinstance(value, (list, tuple)) else [value]


def build_runner(cfg):
    if cfg.launcher != 'none' and get_device() == 'cpu':
        if cfg.launcher != 'pytorch':
            fail(f'--launcher {cfg.launcher} needs GPUs; on CPUs use pytorch')
        _cpu.distribute(cfg)
    _make_work_dir(cfg)
    with user_errors('config'):
        if 'runner_type' in cfg:
            return RUNNERS.build(cfg)
        return Runner.from_cfg(cfg)
