"""Loading checkpoints without executing them.

A checkpoint is a pickle, and a pickle may call any function. After
:func:`enable`, every checkpoint that mmengine loads, from a file or a URL, for
``Runner.resume``, ``load_from``, ``init_cfg`` or inference, is loaded as by
``torch.load(weights_only=True)``, with any torch. Besides torch's own list of
harmless names, only what mmengine's runner writes passes: its histories of
losses, and numpy's numbers and numeric arrays. All else is refused. So is a
file whose bytes are not those that were saved, and so is a config in a
checkpoint, which is text, but Python's: mmengine would run it.
"""

import functools
import os
import pickle
import re
import zipfile
from _codecs import encode
from collections import Counter, OrderedDict
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.utils import digit_version
from torch import _weights_only_unpickler as torch_unpickler
from torch import serialization


def _getattr(owner, name):
    """Stands in for getattr, which checkpoints need for these four."""
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise pickle.UnpicklingError('Unsupported class builtins.getattr')


class _Dtype:
    """Stands in for numpy.dtype: no more than a type of numbers.

    numpy's own would take a size, or fields, from a file, and read memory
    that is not the array's.
    """

    def __init__(self, code, align=False, copy=False):
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in 'biuf':
            raise pickle.UnpicklingError(f'an array of {self.dtype}')

    def __setstate__(self, state):
        _, order, *rest = state
        if order not in ('<', '>', '|') or rest != [None] * 3 + [-1, -1, 0]:
            raise pickle.UnpicklingError(f'an array of {self.dtype} {state}')
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """Stands in for numpy.ndarray, which would take any bytes for objects."""

    def __new__(cls):
        return np.empty(0, np.int8).view(cls)

    def __setstate__(self, state):
        _, shape, kind, in_fortran_order, data = state
        # This checks sizes and types, which numpy's __setstate__ may not.
        array = _from_bytes(kind, data).reshape(shape)
        super().__setstate__(
            (1, array.shape, array.dtype, bool(in_fortran_order), data)
        )

    def __reduce__(self):  # saved again as numpy's own
        return self.view(np.ndarray).__reduce__()


def _from_bytes(kind, data):
    if type(kind) is not _Dtype or type(data) is not bytes:
        raise pickle.UnpicklingError(f'an array of {type(kind).__name__}')
    return np.frombuffer(data, kind.dtype)


def _reconstruct(kind, shape, code):
    return _Array()  # its state comes next


def _scalar(kind, data):
    (value,) = _from_bytes(kind, data)
    return value


ALLOWED = {
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'builtins.getattr': _getattr,
    'collections.Counter': Counter,
    # the bytes of an array, and of an empty one
    '_codecs.encode': encode,
    'builtins.bytes': bytes,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
    # numpy 2 moved these two; files have the old or the new names
    'numpy.core.multiarray._reconstruct': _reconstruct,
    'numpy._core.multiarray._reconstruct': _reconstruct,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
}


class OldTorchUnpickler(pickle._Unpickler):
    """torch's weights-only unpickler plus the names above, for torch < 2.6.

    There, torch's own takes no further names, or none that numpy has moved.
    Like torch's own, this looks names up in a list, never in modules, and sets
    the state of plain data only.
    """

    dispatch = pickle._Unpickler.dispatch.copy()
    plain_data = {
        torch.Tensor,
        torch.nn.Parameter,
        OrderedDict,
        HistoryBuffer,
        _Array,
        _Dtype,
    }

    def find_class(self, module, name):
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        allowed = {**torch_unpickler._get_allowed_globals(), **ALLOWED}
        if path not in allowed:
            raise pickle.UnpicklingError(f'Unsupported class {path}')
        return allowed[path]

    def load_build(self):
        if type(self.stack[-2]) not in self.plain_data:
            raise pickle.UnpicklingError(
                f'Unsupported class {type(self.stack[-2]).__name__}'
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


@contextmanager
def _weights_only():
    """Make torch.load read weights only, whatever its caller asks for.

    mmengine does not ask for it; torch's loading from URLs asks not to.
    """
    force = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = {
        name: os.environ.pop(name, None)
        for name in (force, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
    }
    os.environ[force] = '1'
    HistoryBuffer()  # of which the first fills in the class's statistics
    statistics = HistoryBuffer._statistics_methods
    own = dict(statistics)  # which unpickling a history would replace
    try:
        with _allowed():
            yield
    finally:
        statistics.clear()
        statistics.update(own)
        del os.environ[force]
        os.environ.update({k: v for k, v in before.items() if v is not None})


@contextmanager
def _allowed():
    """Let torch's weights-only unpickler find what ALLOWED holds."""
    if not _FROM_2_6:
        torch_unpickler.Unpickler = OldTorchUnpickler
        try:
            yield
        finally:
            torch_unpickler.Unpickler = _own_unpickler
        return
    before = serialization.get_safe_globals()
    # Others may have allowed numpy's own array, which is not safe.
    others = [
        each
        for each in before
        if (each[1] if isinstance(each, tuple) else _path(each)) not in ALLOWED
    ]
    serialization.clear_safe_globals()
    serialization.add_safe_globals(
        others + [(value, path) for path, value in ALLOWED.items()]
    )
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _path(thing):
    return f'{thing.__module__}.{thing.__qualname__}'


_FROM_2_6 = digit_version(torch.__version__) >= digit_version('2.6')
_own_unpickler = torch_unpickler.Unpickler
_load_checkpoint = CheckpointLoader.load_checkpoint


@functools.wraps(_load_checkpoint)
def load_checkpoint(filename, *args, **kwargs):
    try:
        _check_sums(filename)
        with _weights_only():
            checkpoint = _load_checkpoint(filename, *args, **kwargs)
    except FileNotFoundError:
        raise  # names the file itself
    except Exception as error:
        raise RuntimeError(
            f'cannot load the checkpoint {filename}: {_reason(error)}'
        ) from error
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        # mmcv 1 saved it. Runner.resume would run it, for the number of GPUs.
        meta.pop('config', None)
    return checkpoint


_init_model = BaseInferencer._init_model


@functools.wraps(_init_model)
def init_model(self, cfg, weights, *args, **kwargs):
    if not cfg:
        raise RuntimeError(
            f'the config in the checkpoint {weights} is not run: name a '
            'config, model=CONFIG'
        )
    return _init_model(self, cfg, weights, *args, **kwargs)


def _check_sums(path):
    """Refuse a file with a flipped bit, which torch does not look for."""
    path = os.path.expanduser(path)  # as mmengine does
    if not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return  # elsewhere, or in the older format, which has no sums
    with zipfile.ZipFile(path) as file:
        record = file.testzip()
    if record:
        raise ValueError(f'{record} does not have the CRC that was saved')


def _reason(error):
    """One line instead of torch's advice to load the file anyway."""
    refused = re.search(r'(?:GLOBAL|Unsupported class) ([\w.]+)', str(error))
    if refused:
        return f'it would run {refused[1]}, and it may only hold data'
    text = str(error).split('WeightsUnpickler error: ')[-1].strip()
    text = f'{type(error).__name__} {text}'.splitlines()[0]
    return f'is it damaged, or not a checkpoint? ({text.strip()})'


# onedl-mmengine has its own list, which allows getattr of anything.
_own_safe_globals = getattr(
    mmengine_checkpoint, 'get_torch_safe_globals', None
)


def enable() -> None:
    """Load as data only, from now on; ``mmcarafe.models`` calls this."""
    CheckpointLoader.load_checkpoint = staticmethod(load_checkpoint)
    BaseInferencer._init_model = init_model
    if _own_safe_globals:
        mmengine_checkpoint.get_torch_safe_globals = list


def disable() -> None:
    """Let mmengine load checkpoints in its own way again."""
    CheckpointLoader.load_checkpoint = staticmethod(_load_checkpoint)
    BaseInferencer._init_model = _init_model
    if _own_safe_globals:
        mmengine_checkpoint.get_torch_safe_globals = _own_safe_globals
