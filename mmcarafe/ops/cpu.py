"""Load the CPU kernel, cpu.cpp, and register it with torch.

Installing compiles cpu.cpp once per vector width (see setup.py), into shared
libraries named after torch's own levels, :data:`CAPABILITIES`. The widest one
that torch itself would use here is loaded. Without any, the operators run on
the PyTorch path of :mod:`mmcarafe.ops.reference`.
"""

import ctypes
import importlib.machinery
import os

import torch

from mmcarafe.ops import reference
from mmcarafe.ops.carafe import _LIBRARY

# torch.backends.cpu.get_cpu_capability(), widest first. Anything else that it
# may return, such as arm64's, goes with the last.
CAPABILITIES = ('AVX512', 'AVX2', 'DEFAULT')

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NORMALIZERS = (None, 'softmax', 'sigmoid_normalized', 'sigmoid')


class _Arguments(ctypes.Structure):
    """Mirrors Arguments in cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('dtype', 'normalizer')),
        *((name, ctypes.c_int64) for name in ('threads', *'NCHWKGS')),
        ('low', ctypes.c_void_p),
        ('low_strides', ctypes.c_int64 * 4),
        ('high', ctypes.c_void_p),
        ('high_strides', ctypes.c_int64 * 4),
        ('weights', ctypes.c_void_p),
        ('weights_strides', ctypes.c_int64 * 7),
        ('grad_weights', ctypes.c_void_p),
        ('grad_weights_strides', ctypes.c_int64 * 7),
        ('statistics', ctypes.c_void_p),
    ]


class Kernel:
    """The three operators of :mod:`mmcarafe.ops.carafe`, in one library.

    ctypes releases the GIL while a function of the library runs.
    """

    def __init__(self, path):
        self.path = path
        self._library = ctypes.CDLL(path)
        self._pid = os.getpid()

    def carafe(self, features, weights, normalizer):
        out = reference.empty_map(
            features, features.shape[1], weights.shape[3]
        )
        self._run('carafe', features, out, weights, normalizer)
        return out

    def carafe_grad_features(self, grad, weights, normalizer):
        out = reference.empty_map(grad, grad.shape[1], 1, weights.shape[-2:])
        statistics = None
        if normalizer in ('softmax', 'sigmoid_normalized'):
            n, groups, _, s, _, height, width = weights.shape
            statistics = torch.empty(
                (2, n, groups, s * s, height, width),
                dtype=torch.promote_types(weights.dtype, torch.float32),
            )
        self._run(
            'carafe_grad_features',
            out,
            grad,
            weights,
            normalizer,
            statistics=statistics,
        )
        return out

    def carafe_grad_weights(self, grad, features, weights, normalizer):
        out = torch.empty_like(weights)
        self._run(
            'carafe_grad_weights',
            features,
            grad,
            weights,
            normalizer,
            grad_weights=out,
        )
        return out

    def _run(
        self,
        name,
        low,
        high,
        weights,
        normalizer,
        grad_weights=None,
        statistics=None,
    ):
        if not low.dtype == high.dtype == weights.dtype:
            raise TypeError(
                f'{name} got {low.dtype}, {high.dtype} and {weights.dtype}, '
                'expected one dtype'
            )
        n, groups, taps, s, _, height, width = weights.shape
        if n == 0:
            return
        arguments = _Arguments(
            dtype=_DTYPES.index(weights.dtype),
            normalizer=_NORMALIZERS.index(normalizer),
            threads=self._threads(),
            N=n,
            C=low.shape[1],
            H=height,
            W=width,
            K=int(taps**0.5),
            G=groups,
            S=s,
        )
        tensors = {
            'low': low,
            'high': high,
            'weights': weights,
            'grad_weights': grad_weights,
        }
        for field, tensor in tensors.items():
            if tensor is not None:
                setattr(arguments, field, tensor.data_ptr())
                getattr(arguments, f'{field}_strides')[:] = tensor.stride()
        if statistics is not None:
            arguments.statistics = statistics.data_ptr()
        getattr(self._library, name)(ctypes.byref(arguments))

    def _threads(self):
        # A forked process has lost the OpenMP threads of its parent, and
        # would wait for them forever.
        return torch.get_num_threads() if os.getpid() == self._pid else 1


def find(capability):
    """Path of the library for one of :data:`CAPABILITIES`, or None."""
    # Beside this file: the finder of another, editable install would go on.
    spec = importlib.machinery.PathFinder.find_spec(
        f'_cpu_{capability.lower()}', [os.path.dirname(__file__)]
    )
    return spec and spec.origin


def runnable():
    """Those of :data:`CAPABILITIES` that this machine runs, widest first."""
    here = torch.backends.cpu.get_cpu_capability()
    first = CAPABILITIES.index(here) if here in CAPABILITIES else -1
    return CAPABILITIES[first:]


def _register():
    for capability in runnable():
        path = find(capability)
        if path:
            kernel = Kernel(path)
            for name in (
                'carafe',
                'carafe_grad_features',
                'carafe_grad_weights',
            ):
                _LIBRARY.impl(name, getattr(kernel, name), 'CPU')
            return kernel
    return None


#: What serves CPU tensors; None if nothing was compiled.
KERNEL = _register()
