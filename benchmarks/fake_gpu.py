"""A GPU that does nothing, for what a CPU can show of the GPU's side.

Kernels are compiled for an H100, but neither loaded nor launched; events and
streams know no time. CPU tensors stand for those of the GPU, so what they hold
afterwards is meaningless, and so is every time measured on it.
"""

import warnings

import torch

from mmcarafe.ops import triton as kernels
from mmcarafe.ops.operators import OPERATORS

CAPABILITY = 90


class _Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, *args):
        pass


class _Utils:
    def load_binary(self, name, kernel, shared, device):
        return object(), object(), 0, 0, 1024  # module, function, ...

    def get_device_properties(self, device):
        return {'max_shared_mem': 227 * 1024, 'multiprocessor_count': 132}


class _Driver:
    """As much of a Triton driver as compiling and launching need."""

    launcher_cls = _Launcher
    utils = _Utils()

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def install():
    """From here on, CPU tensors take the way of CUDA tensors."""
    from triton.runtime import driver

    driver.set_active(_Driver())
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Warning only once for all operator')
        for name in OPERATORS:
            _LIBRARY.impl(name, getattr(kernels, name), 'CPU')


_LIBRARY = torch.library.Library('mmcarafe', 'IMPL')
