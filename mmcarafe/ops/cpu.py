"""Load the compiled library that serves CPU tensors.

Installing compiles cpu.cpp once per vector width (see setup.py), into shared
libraries named after torch's own levels, :data:`CAPABILITIES`. The widest one
that torch itself would use here is loaded.
"""

import ctypes
import os
import warnings

import torch

from mmcarafe.ops import reference

# torch.backends.cpu.get_cpu_capability(), widest first. Anything else that it
# may return, as on arm64, counts as the last.
CAPABILITIES = ('AVX512', 'AVX2', 'DEFAULT')


class _Arguments(ctypes.Structure):
    """Mirrors Arguments in cpu.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ('dtype', 'normalizer', 'border')
        ),
        *((name, ctypes.c_int64) for name in ('threads', *'NCHWKGS')),
        ('low', ctypes.c_void_p),
        ('low_strides', ctypes.c_int64 * 4),
        ('high', ctypes.c_void_p),
        ('high_strides', ctypes.c_int64 * 4),
        ('scores', ctypes.c_void_p),
        ('scores_strides', ctypes.c_int64 * 7),
        ('grad_scores', ctypes.c_void_p),
        ('grad_scores_strides', ctypes.c_int64 * 7),
    ]


class Library:
    """The three operators of :mod:`mmcarafe.ops.reference`, compiled.

    ctypes releases the GIL while a function of the library runs.
    """

    def __init__(self, path):
        self.path = path
        self._library = ctypes.CDLL(path)
        self._pid = os.getpid()

    def reassemble(self, features, scores, normalizer, border='zeros'):
        out = reference.empty_map(features, features.shape[1], scores.shape[3])
        self._run('reassemble', features, out, scores, normalizer, border)
        return out

    def reassemble_grad_features(
        self, grad, scores, normalizer, border='zeros'
    ):
        out = reference.empty_map(grad, grad.shape[1], 1, scores.shape[-2:])
        self._run(
            'reassemble_grad_features', out, grad, scores, normalizer, border
        )
        return out

    def reassemble_grad_weights(
        self, grad, features, scores, normalizer, border='zeros'
    ):
        out = torch.empty_like(scores)
        self._run(
            'reassemble_grad_weights',
            features,
            grad,
            scores,
            normalizer,
            border,
            grad_scores=out,
        )
        return out

    def _run(
        self,
        name,
        low,
        high,
        scores,
        normalizer,
        border,
        grad_scores=None,
    ):
        if not low.dtype == high.dtype == scores.dtype:
            raise TypeError(
                f'{name} got {low.dtype}, {high.dtype} and {scores.dtype}, '
                'expected one dtype'
            )
        reference.check_options(normalizer, border)
        n, groups, taps, s, _, height, width = scores.shape
        if scores.numel() == 0:
            return
        arguments = _Arguments(
            dtype=reference.DTYPES.index(scores.dtype),
            normalizer=reference.NORMALIZERS.index(normalizer),
            border=reference.BORDERS.index(border),
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
            'scores': scores,
            'grad_scores': grad_scores,
        }
        for field, tensor in tensors.items():
            if tensor is not None:
                setattr(arguments, field, tensor.data_ptr())
                getattr(arguments, f'{field}_strides')[:] = tensor.stride()
        if getattr(self._library, name)(ctypes.byref(arguments)):
            raise RuntimeError(
                f'{self.path} was compiled from another version of cpu.cpp: '
                'install mmcarafe again'
            )

    def _threads(self):
        # A forked process has lost the OpenMP threads of its parent, and
        # would wait for them forever.
        return torch.get_num_threads() if os.getpid() == self._pid else 1


def find(capability: str) -> 'str | None':
    """Path of the library for one of :data:`CAPABILITIES`, or None."""
    path = os.path.join(
        os.path.dirname(__file__), f'_cpu_{capability.lower()}.so'
    )
    return path if os.path.isfile(path) else None


def runnable() -> 'tuple[str, ...]':
    """Those of :data:`CAPABILITIES` that this machine runs, widest first."""
    here = torch.backends.cpu.get_cpu_capability()
    first = CAPABILITIES.index(here) if here in CAPABILITIES else -1
    return CAPABILITIES[first:]


def _load() -> 'Library | None':
    for capability in runnable():
        path = find(capability)
        if not path:
            continue
        try:
            return Library(path)
        except OSError as error:  # it names the file
            warnings.warn(
                f'cannot load {error}: install mmcarafe again', stacklevel=2
            )
    return None


#: What serves CPU tensors; None if nothing was compiled, or can be loaded.
LIBRARY = _load()


def status() -> str:
    """What serves CPU tensors, why, and how to get something faster."""
    if LIBRARY is None:
        why = 'nothing was compiled at install time'
        if any(map(find, runnable())):
            why = 'the compiled library cannot be loaded'
        return (
            f'PyTorch reference, because {why}\n'
            '  To do: install a C++ compiler (sudo apt install g++), then\n'
            '  run `pip install .` or `pip install -e .` again, with -v to\n'
            '  see what the compiler says.'
        )
    lines = [f'compiled library {LIBRARY.path}']
    widest = runnable()[0]
    if LIBRARY.path != find(widest):
        lines.append(
            f'  The faster one for {widest} was not compiled.\n'
            '  To do: get a newer C++ compiler, run `pip install -v .` again.'
        )
    if hasattr(ctypes.CDLL(None), 'GOMP_parallel'):
        lines.append(f'  {torch.get_num_threads()} threads, as torch')
    else:
        lines.append('  1 thread, because torch has brought no OpenMP runtime')
    return '\n'.join(lines)
