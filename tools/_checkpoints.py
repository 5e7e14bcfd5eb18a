"""Checkpoints: saved whole, and compared with the config before any is used.

Importing this makes mmengine save by `WholeFiles` and `SafeCheckpointHook`.
"""

import errno
import math
import os
import os.path as osp
import re
from collections import OrderedDict, deque
from contextlib import contextmanager, suppress
from functools import partial
from glob import escape, glob
from importlib.util import find_spec
from numbers import Real

import torch
from _cli import fail, is_first, say, some, walk
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseTTAModel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader
from mmengine.utils import mkdir_or_exist


class WholeFiles(LocalBackend):
    """mmengine's local files, but none is ever left half written."""

    def put(self, obj, filepath):
        write_whole(filepath, obj)


register_backend('local', WholeFiles, force=True, prefixes='')


def write_whole(file, data):
    """Write bytes so that a reader finds all of the old or all of the new."""
    part = f'{file}.part'
    try:
        mkdir_or_exist(osp.dirname(file))
        with open(part, 'wb') as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        with suppress(OSError):
            os.remove(part)  # it may fill the disk
        raise OSError(error.errno, error.strerror, file) from error


def _write_last(work_dir, path):
    write_whole(osp.join(work_dir, 'last_checkpoint'), path.encode())


@HOOKS.register_module(name='CheckpointHook', force=True)
class SafeCheckpointHook(CheckpointHook):
    """Writes the new checkpoint, then names it, then removes the old one.

    mmengine's own hook removes first, so a run that is killed while it writes
    may have nothing left.
    """

    def _save_checkpoint_with_step(self, runner, step, meta):
        outdated = []
        if self.max_keep_ckpts > 0:
            steps = [s for s in self.keep_ckpt_ids if s != step] + [step]
            outdated = steps[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(steps[len(outdated) :])
            runner.message_hub.update_info(
                'keep_ckpt_ids', list(self.keep_ckpt_ids)
            )
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        _write_last(runner.work_dir, self.last_ckpt)
        for old in outdated:
            path = self.file_backend.join_path(
                self.out_dir, self.filename_tmpl.format(old)
            )
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # deepspeed's
                self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner, metrics):
        backend = self.file_backend
        self.file_backend = RemovesLater(backend, self.out_dir)
        try:
            super()._save_best_checkpoint(runner, metrics)
            for remove in self.file_backend.removals:
                remove()
        finally:
            self.file_backend = backend


class RemovesLater:
    """A file backend whose removals wait for its owner to call them.

    Only what is in the folder of the checkpoints, or at its URL, is removed.
    After resuming, the name of the best so far comes from a file, and may be
    any path.
    """

    def __init__(self, backend, folder):
        self.backend = backend
        self.folder = osp.realpath(folder)
        self.removals = []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def remove(self, path):
        self._remove(self.backend.remove, path)

    def rmtree(self, path):
        self._remove(self.backend.rmtree, path)

    def _remove(self, remove, path):
        if osp.dirname(osp.realpath(path)) == self.folder:
            self.removals.append(partial(remove, path))


def load(path, model=None):
    """Load a checkpoint, a dict, into memory.

    With the config of a model that begins with it, an error names the setting
    to leave out.
    """
    try:
        with readable_errors(model):
            checkpoint = CheckpointLoader.load_checkpoint(
                path, 'cpu', 'silent'
            )
    except FileNotFoundError:
        fail(f'there is no checkpoint {path}')
    if not isinstance(checkpoint, dict):
        fail(f'{path} holds a {type(checkpoint).__name__}, not a state dict')
    return checkpoint


@contextmanager
def readable_errors(model=None):
    """End in one line if a checkpoint cannot be loaded inside.

    With the config of a model, the line names the setting to leave out.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not text.startswith('cannot load the checkpoint '):
            raise
        cause = error.__cause__
        if isinstance(cause, (ImportError, OSError)):  # torchvision, urllib
            text = text.split(': is it damaged')[0]
            text = f'{text}: {type(cause).__name__}: {cause}'
        for key, path in pretrained(model or {}):
            if path in text:
                text += f'; to do without: --cfg-options {key}=None'
        fail(' '.join(text.split()))


@contextmanager
def writable_errors(work_dir):
    """End in one line if the disk takes no more of what a run writes."""
    try:
        yield
    except OSError as error:
        path = str(error.filename or work_dir)
        # Errors of the processes that load the data come without a name.
        within = error.filename and f'{osp.abspath(path)}/'.startswith(
            f'{osp.abspath(work_dir)}/'
        )
        if not within and error.errno not in UNWRITABLE:
            raise
        fail(
            f'cannot write {path}: {error.strerror}; {how_to_go_on(work_dir)}'
        )


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Fit:
    """How the weights of a checkpoint fit a model; loads those that do.

    ``missing`` names the weights that only the model has, ``unexpected`` those
    that only the checkpoint has, and ``reshaped`` describes those of another
    shape; ``loaded`` of ``total`` weights are now as in the checkpoint. BN's
    counters of batches are not compared: mmengine does not require them.
    """

    def __init__(self, model, path, checkpoint, ignored=()):
        if isinstance(model, BaseTTAModel):
            model = model.module
        state = checkpoint.get('state_dict', checkpoint)
        if not isinstance(state, dict):
            fail(f'{path} holds a {type(state).__name__} as its state_dict')
        for name in state:
            if not isinstance(name, str):
                fail(f'{path} holds the name {name!r} in its state_dict')
        weights = OrderedDict(
            (re.sub(r'^module\.', '', name), value)  # as mmengine does
            for name, value in state.items()
        )
        weights._metadata = getattr(state, '_metadata', OrderedDict())
        if not isinstance(weights._metadata, dict):
            fail(f'{path} holds no dict as the _metadata of its state_dict')
        own = {
            name: value.clone() for name, value in model.state_dict().items()
        }
        other = [
            f'{name} ({value.dtype})'
            for name, value in weights.items()
            if name in own
            and isinstance(value, torch.Tensor)
            and own[name].is_floating_point()
            and not value.is_floating_point()
        ]
        if other:
            fail(f'{path} holds {some(other)}, expected floating point')
        reshaped = {}
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError:  # of another shape; all other names were loaded
            for name, value in own.items():
                expected = list(value.shape)
                value = weights.get(name, value)
                shape = list(getattr(value, 'shape', [type(value).__name__]))
                if shape != expected:
                    reshaped[name] = f'{name} {shape}, not {expected}'
                    del weights[name]
            try:
                missing, unexpected = model.load_state_dict(
                    weights, strict=False
                )
            except RuntimeError as error:
                text = ' '.join(str(error).split())
                fail(f'{path} does not fit this config: {text}')

        def counted(names):
            return [
                name
                for name in names
                if not name.startswith(tuple(ignored))
                and not name.endswith('num_batches_tracked')
            ]

        # A model may have infinities of its own, such as a mask.
        wrong = [
            name
            for name, value in model.state_dict().items()
            if name in weights
            and (own[name].isfinite() > value.isfinite()).any()
        ]
        if wrong:
            fail(f'{path} holds NaN or infinite values in {some(wrong)}')
        self.missing = counted(n for n in missing if n not in reshaped)
        self.unexpected = counted(unexpected)
        self.reshaped = [reshaped[name] for name in counted(reshaped)]
        self.total = len(counted(model.state_dict()))
        self.loaded = self.total - len(self.missing) - len(self.reshaped)

    def __bool__(self):
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self):
        kinds = {
            'missing': self.missing,
            'unexpected': self.unexpected,
            'of another shape': self.reshaped,
        }
        return '; '.join(
            [f'{self.loaded} of {self.total} weights fit']
            + [
                f'{kind}: {some(names)}'
                for kind, names in kinds.items()
                if names
            ]
        )


def check_weights(model, path, checkpoint):
    """Refuse weights of another model: mmengine would keep random ones."""
    # These are optional: no prediction depends on them.
    ignored = ('auxiliary_head.', 'data_preprocessor.')
    fit = Fit(model, path, checkpoint, ignored)
    if not fit:
        fail(f'{path} does not fit this config: {fit}')


def say_what_is_loaded(model, path, checkpoint):
    """Report what training starts from: maybe another model's weights."""
    fit = Fit(model, path, checkpoint)
    if not fit.loaded:
        fail(f'load_from: {path} does not fit this config: {fit}')
    text = f'load_from {path}: {fit.loaded} of {fit.total} weights are loaded'
    fresh = fit.missing + fit.reshaped
    if fresh:
        text += f'; these start fresh: {some(fresh)}'
    if fit.unexpected:
        text += f'; these are not used: {some(fit.unexpected)}'
    say(text)


def newest(work_dir):
    """The last checkpoint of the run in a folder, None without one."""
    file = osp.join(work_dir, 'last_checkpoint')
    if not osp.isfile(file):
        return None
    with open(file, errors='replace') as stream:
        path = stream.read().strip()
    # it holds the name that the folder had when it was saved
    here = osp.join(work_dir, osp.basename(path))
    return here if osp.isfile(here) else path or None


def how_to_go_on(work_dir):
    path = newest(work_dir)
    if path:
        return f'continue from {path} with --resume'
    return 'no checkpoint was saved yet'


def newest_readable(work_dir):
    """The last checkpoint of the run in a folder that can be resumed from.

    Says which later ones cannot, and why. A run that is killed right after it
    has written a checkpoint has not named it in ``last_checkpoint``. So higher
    numbers are looked at too, and named then; those of an earlier run in the
    same folder were saved earlier.

    Returns:
        str: its path, None where no checkpoint was saved.
    """
    named = newest(work_dir)
    paths = _of_the_run(work_dir, named)
    if not paths:
        _refuse_to_overwrite(work_dir)
    chosen, saved, unreadable = None, '', []
    for path in paths:
        try:
            checkpoint = load(path)
            _check_state(path, checkpoint)
        except SystemExit as error:
            unreadable.append(error.code[len('error: ') :])
            continue
        time = checkpoint['meta'].get('time', '')
        if not chosen or time > saved:
            chosen, saved = path, time
        if named and _number(path) <= _number(named):
            break  # all others were saved before
    if unreadable and not chosen:
        fail('; '.join(unreadable))
    for text in unreadable:
        say(f'--resume: {text}')
    if unreadable:
        say(f'--resume: continuing from {chosen}, the last that can be read')
    elif named and chosen != named:
        say(
            f'--resume: continuing from {chosen}, saved after {named}, which '
            'last_checkpoint names'
        )
    if chosen and _number(chosen) > _number(named or '') and is_first():
        with suppress(OSError):  # reported when the run needs the folder
            _write_last(work_dir, chosen)
    return chosen


def _of_the_run(work_dir, named):
    """The checkpoint that is named and those beside it, highest first."""
    folder = osp.dirname(named or '')
    if not osp.isdir(folder):
        folder = work_dir
    paths = {named} if named else set()
    for path in glob(osp.join(escape(folder), '*_*.pth')):
        kind = _kind(path)
        if _number(path) >= 0 and (
            kind == _kind(named) if named else kind in ('epoch', 'iter')
        ):
            paths.add(path)
    return sorted(paths, key=_number, reverse=True)


def _kind(path):
    return osp.basename(path).rpartition('_')[0]  # epoch, iter


def _number(path):
    found = re.search(r'_(\d+)\.pth$', path)
    return int(found[1]) if found else -1


def _refuse_to_overwrite(work_dir):
    """Fail where a run that cannot be resumed by itself left checkpoints."""
    file = osp.join(work_dir, 'last_checkpoint')
    if osp.isfile(file):
        fail(f'{file} is empty; name a file: --resume CHECKPOINT')
    found = sorted(glob(osp.join(escape(work_dir), '*.pth')))
    if found:
        names = some(osp.basename(path) for path in found)
        fail(
            f'--resume: {work_dir} has {names} but no last_checkpoint, which '
            'names the newest; name the file: --resume CHECKPOINT'
        )


def _check_state(path, checkpoint):
    """Refuse a checkpoint without what mmengine's runner resumes from."""
    if not {'meta', 'message_hub'} <= checkpoint.keys():
        fail(
            f'{path} holds only weights: no run can be resumed from it, but '
            f'one can start with --cfg-options load_from={path}'
        )
    for key, (expected, fits) in STATE.items():
        value = checkpoint
        for name in key.split('.'):
            value = value.get(name)
        if value is None and key in OPTIONAL:
            continue
        if not fits(value):
            is_number = isinstance(value, (int, float))
            text = value if is_number else f'a {type(value).__name__}'
            fail(f'{path} holds {text} as its {key}, expected {expected}')


def _is_count(value):
    return type(value) is int and value >= 0  # True is an int


def _are_counts(value):
    return isinstance(value, list) and all(map(_is_count, value))


def _is_finite(value):
    return isinstance(value, Real) and math.isfinite(value)


def _are_schedulers(value):
    if isinstance(value, dict):  # of several optimizers
        return all(map(_are_schedulers, value.values()))
    return isinstance(value, list) and all(
        isinstance(each, dict) and _is_count(each.get('last_step'))
        for each in value
    )


_DICT = 'a dict', lambda value: isinstance(value, dict)
_TEXT = 'text', lambda value: isinstance(value, str)
_COUNT = 'a whole number, not negative', _is_count
_NUMBER = 'a finite number', _is_finite
# Each key of a checkpoint comes after that which holds it.
STATE = {
    'meta': _DICT,
    'meta.epoch': _COUNT,
    'meta.iter': _COUNT,
    'meta.seed': _COUNT,
    'meta.time': _TEXT,
    'meta.share_of_epoch': ('a number', lambda x: isinstance(x, Real)),
    'message_hub': _DICT,
    'message_hub.log_scalars': _DICT,
    'message_hub.runtime_info': _DICT,
    'message_hub.runtime_info.best_score': _NUMBER,
    'message_hub.runtime_info.keep_ckpt_ids': (
        'a list of whole numbers',
        _are_counts,
    ),
    'message_hub.resumed_keys': _DICT,
    'optimizer': _DICT,
    'param_schedulers': ('a list of their states', _are_schedulers),
    'ema_state_dict': _DICT,
}
# A run may be told not to save some of these; mmengine knows no share.
OPTIONAL = (
    'meta.seed',
    'meta.time',
    'meta.share_of_epoch',
    'message_hub.runtime_info.best_score',
    'message_hub.runtime_info.keep_ckpt_ids',
    'optimizer',
    'param_schedulers',
    'ema_state_dict',
)


def check_resumed(path, checkpoint, model, optim_wrapper):
    """Refuse to resume what a different run saved."""
    instead = f'begin with its weights: --cfg-options load_from={path}'
    _check_state(path, checkpoint)
    averages = {
        name: value
        for name, value in (checkpoint.get('ema_state_dict') or {}).items()
        if str(name).startswith('module.')
    }
    fit = Fit(model, path, averages) if averages else True
    fit = fit and Fit(model, path, checkpoint)
    if not fit:
        fail(
            f'--resume: {path} does not fit this config: {fit}; resume with '
            f'the config of its run, or {instead}'
        )
    saved = checkpoint.get('optimizer')
    try:
        difference = _difference(saved, optim_wrapper)
    except (AttributeError, IndexError, KeyError, TypeError):
        fail(
            f'--resume: {path} holds no state of an optimizer as its optimizer'
        )
    if difference:
        fail(
            f'--resume: {path} is from a run with another optim_wrapper: '
            f'{difference}; resume with the config of its run, or {instead}'
        )
    wrong = saved and _try_step(saved, optim_wrapper)
    if wrong:
        fail(
            f'--resume: {path} holds a state of the optimizer with which it '
            f'makes no step ({wrong}); {instead}'
        )


def _try_step(saved, optim_wrapper):
    """Why an optimizer makes no step from a saved state; None if it does.

    It changes the parameters.
    """
    if not isinstance(optim_wrapper, OptimWrapper):
        return None
    optimizer = optim_wrapper.optimizer
    fresh = optimizer.state_dict()
    parameters = [p for g in optimizer.param_groups for p in g['params']]
    for each in parameters:
        each.grad = torch.zeros_like(each)
    try:
        optim_wrapper.load_state_dict(dict(saved))
        optimizer.step()
    except Exception as error:
        try:
            optimizer.load_state_dict(fresh)
            optimizer.step()
        except Exception:
            return None  # it makes none here at all, such as one for GPUs
        return f'{type(error).__name__}: {" ".join(str(error).split())}'
    if not all(each.isfinite().all() for each in parameters):
        return 'the weights become NaN or infinite'
    return None


def _difference(saved, optim_wrapper):
    """How a saved state does not fit an optimizer; None if it does."""
    if not isinstance(optim_wrapper, OptimWrapper) or not saved:
        return None  # several optimizers, or a checkpoint without a state
    groups = saved.get('param_groups', [])
    own = optim_wrapper.optimizer.state_dict()['param_groups']
    sizes, own_sizes = (
        [len(group['params']) for group in each] for each in (groups, own)
    )
    if sizes != own_sizes:
        return f'groups of {some(sizes)} parameters, not of {some(own_sizes)}'
    # Another torch may know more settings of the same optimizer, or fewer.
    # Only another optimizer both has some that this one lacks and lacks some.
    # Schedulers add their own, such as initial_lr and initial_momentum.
    more = {k for k in groups[0] if not k.startswith('initial_')} - {*own[0]}
    fewer = {*own[0]} - {*groups[0]}
    if more and fewer:
        return (
            f'it sets {some(sorted(more))}, '
            f'{type(optim_wrapper.optimizer).__name__} sets '
            f'{some(sorted(fewer))}'
        )
    return None


def finished(train_cfg, checkpoint):
    """The setting that ended a checkpoint's run, None if it has not ended."""
    for unit in ('epoch', 'iter'):
        key = f'max_{unit}s'
        if checkpoint['meta'].get(unit, 0) >= train_cfg.get(key, float('inf')):
            return f'train_cfg.{key}={train_cfg[key]}'
    return None


def pretrained(model):
    """(setting, checkpoint) of each part of a model config that has one."""
    for key, value in walk(model, 'model.'):
        if key.endswith('.pretrained') and isinstance(value, str):
            yield key, value
        elif isinstance(value, dict) and 'init_cfg' in key:
            kind = value.get('type')
            if getattr(kind, '__name__', kind) in PRETRAINED:
                if value.get('checkpoint'):
                    # also in a list of several
                    setting = key[: key.rindex('init_cfg') + len('init_cfg')]
                    yield setting, value['checkpoint']


PRETRAINED = ('Pretrained', 'PretrainedInit')


def check_pretrained(model):
    """Look for the weights to start from, as far as possible offline."""
    for key, path in pretrained(model):
        scratch = f'start with random weights: --cfg-options {key}=None'
        if path.startswith(('torchvision://', 'modelzoo://')):
            if not find_spec('torchvision'):
                fail(
                    f'{key}: {path} needs torchvision, which names the file '
                    f'to download: install it, or {scratch}'
                )
        elif '://' not in path:
            if not osp.isfile(osp.expanduser(path)):
                fail(
                    f'{key}: there is no checkpoint {path}; name one, or '
                    f'{scratch}'
                )
            load(path, model)
