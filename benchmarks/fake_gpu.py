"""GPUs that are not there, for what a CPU can show of the GPU's side.

CPU tensors stand for those of the GPU. There are two: :func:`install` compiles
kernels for an H100 but launches none, so what tensors hold afterwards is
meaningless; :func:`pretend` compiles nothing and has the reference compute,
and stands in for much of ``torch.cuda``. Every time measured on either is
meaningless.
"""

import contextlib
import types
import warnings

import torch

from mmcarafe.ops import reference
from mmcarafe.ops import triton as kernels
from mmcarafe.ops.operators import OPERATORS

# Bytes of shared memory that a program may have, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


class _Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, *args):
        pass


class _Utils:
    def __init__(self, capability):
        self.shared = SHARED.get(capability, 99 * 1024)

    def load_binary(self, name, kernel, shared, device):
        return object(), object(), 0, 0, 1024  # module, function, ...

    def get_device_properties(self, device):
        return {'max_shared_mem': self.shared, 'multiprocessor_count': 132}


class Driver:
    """As much of a Triton driver as compiling and launching need."""

    launcher_cls = _Launcher

    def __init__(self, capability=90):
        self.capability = capability
        self.utils = _Utils(capability)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', self.capability, 32)

    def get_current_device(self):
        return self.capability  # kernels are cached by it

    def get_current_stream(self, device):
        return 0


def install(capability=90):
    """From here on, CPU tensors take the way of CUDA tensors."""
    from triton.runtime import driver

    driver.set_active(Driver(capability))
    _serve_cpu_tensors()


def _serve_cpu_tensors():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Warning only once for all operator')
        for name in OPERATORS:
            _LIBRARY.impl(name, getattr(kernels, name), 'CPU')


class _Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000  # milliseconds


class _Stream:
    def wait_stream(self, stream):
        pass


class _Graph:
    """Replays the kernels that were launched in its capture."""

    under_way = None

    def __init__(self):
        self.launches = []

    def replay(self):
        for launch in self.launches:
            launch()

    def reset(self):
        self.launches = None


@contextlib.contextmanager
def _capture(graph, pool=None, stream=None):
    _Graph.under_way = graph
    try:
        yield
    finally:
        _Graph.under_way = None


def _synchronize(device=None):
    if _Graph.under_way:
        raise RuntimeError(
            'CUDA error: operation not permitted when capturing'
        )


_CUDA = {
    'CUDAGraph': _Graph,
    'Event': _Event,
    'Stream': _Stream,
    '_sleep': lambda cycles: None,
    'current_stream': _Stream,
    'empty_cache': lambda: None,
    'get_device_capability': lambda device=None: (9, 0),
    'get_device_name': lambda device=None: 'no GPU',
    'get_device_properties': lambda device=None: types.SimpleNamespace(
        L2_cache_size=1, multi_processor_count=132
    ),
    'graph': _capture,
    'graph_pool_handle': lambda: (0, 1),
    'max_memory_allocated': lambda device=None: 0,
    'mem_get_info': lambda device=None: (0, 0),
    'memory_allocated': lambda device=None: 0,
    'reset_peak_memory_stats': lambda device=None: None,
    'stream': lambda stream: contextlib.nullcontext(),
    'synchronize': _synchronize,
}


def pretend():
    """From here on, the reference serves what a GPU's kernels would."""
    for target, name, fake in FAKES:
        setattr(target, name, fake)
    _serve_cpu_tensors()


def _load(problem, config, tensors):
    if _Graph.under_way:
        raise RuntimeError(
            f'{problem.name}: nothing is loaded in a capture, as on a GPU; '
            'run it once before the capture'
        )
    operator = getattr(reference, problem.name)

    def run(*tensors):
        def launch():
            *inputs, out = tensors
            out.copy_(operator(*inputs, problem.normalizer, problem.border))

        if _Graph.under_way:
            _Graph.under_way.launches.append(launch)
        else:
            launch()

    return kernels.Launch(run, problem, config, None)


# Object, attribute, and what takes its place.
FAKES = [
    *((torch.cuda, name, fake) for name, fake in _CUDA.items()),
    (kernels, '_load', _load),
    (kernels, '_is_capturing', lambda device: _Graph.under_way is not None),
]

_LIBRARY = torch.library.Library('mmcarafe', 'IMPL')
