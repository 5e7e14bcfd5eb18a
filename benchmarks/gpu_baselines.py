"""What the Triton kernels are compared with, besides PyTorch's upsamplers.

None of this has been run on a GPU yet.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from mmcarafe.ops import carafe_from_logits


def copy_floor(features, kernel_size, backward, scale_factor=2):
    """A copy of as many bytes as CARAFE cannot avoid moving.

    Each input is read once and each output written once: forward, features,
    logits and output; backward, the output's gradient, and features and logits
    with their gradients. A copy reads one half and writes the other.
    """
    n, c, h, w = features.shape
    small = c
    large = c * scale_factor**2
    weights = kernel_size**2 * scale_factor**2
    values = small + weights + large
    if backward:
        values += large + 2 * (small + weights)
    num_bytes = n * h * w * values * features.element_size()
    return copy_of(num_bytes, features.device)


def copy_of(num_bytes, device):
    """A copy that moves so many bytes: it reads half of them, writes half."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def shifts(features, logits, kernel_size):
    """CARAFE as a sum of shifted features, which torch.compile fuses.

    The reference will not do: it adds in place, to a slice for each tap and
    each few channels, which takes inductor more than ten minutes to compile.
    """
    n, c, h, w = features.shape
    weights = logits.view(n, 1, kernel_size**2, 2, 2, h, w).float().softmax(2)
    padded = F.pad(features, [kernel_size // 2] * 4).float()
    out = 0
    for k in range(kernel_size**2):
        y, x = divmod(k, kernel_size)
        shifted = padded[:, :, None, None, y : y + h, x : x + w]
        out = out + shifted * weights[:, :, k]  # [N, C, 2, 2, H, W]
    out = out.permute(0, 1, 4, 2, 5, 3).reshape(n, c, 2 * h, 2 * w)
    return out.to(features.dtype)


def methods(features, logits, kernel_size, mmcv):
    """What bench_op.py compares on a GPU only: name -> (function, inputs)."""
    # Compiled for one shape at a time, the fastest way.
    compiled = torch.compile(shifts, dynamic=False)
    found = {
        'CARAFE, compiled shifts': (
            lambda x, y: compiled(x, y, kernel_size),
            [features, logits],
        ),
        **modules(features, kernel_size, mmcv),
    }
    # mmcv's takes neither bf16 nor channels_last.
    if mmcv and features.dtype != torch.bfloat16 and features.is_contiguous():
        found["CARAFE, mmcv's"] = (
            lambda x, y: mmcv(x, normalize(y), kernel_size, 1, 2),
            [features, logits],
        )
    return found


def normalize(logits):
    """What mmcv's CARAFEPack does to its logits."""
    masks = F.pixel_shuffle(logits, 2)
    return masks.softmax(1)


class Module(torch.nn.Module):
    """``mmcarafe.CARAFE`` with a choice of the function that reassembles."""

    def __init__(self, channels, kernel_size, reassemble):
        super().__init__()
        self.compress = torch.nn.Conv2d(channels, 64, 1)
        self.encode = torch.nn.Conv2d(64, 4 * kernel_size**2, 3, padding=1)
        self.reassemble = reassemble

    def forward(self, x):
        return self.reassemble(x, self.encode(self.compress(x)))


def modules(features, kernel_size, mmcv):
    """The whole module, convolutions included, and its parameters' gradients.

    Each in the layout that suits it: channels_last for ours, NCHW for mmcv's.
    """

    def ours(x, logits):
        return carafe_from_logits(x, logits, kernel_size)

    def theirs(x, logits):
        masks = normalize(logits).to(x.dtype).contiguous()
        return mmcv(x.contiguous(), masks, kernel_size, 1, 2)

    def entry(reassemble, x, autocast=None, compiled=False, **layout):
        module = Module(x.shape[1], kernel_size, reassemble)
        module = module.to(x.device, **layout)
        names = [name for name, _ in module.named_parameters()]
        run = torch.compile(functional_call) if compiled else functional_call

        def call(x, *values):
            with torch.autocast(
                x.device.type, autocast, enabled=bool(autocast)
            ):
                out = run(module, dict(zip(names, values)), (x,))
            return out.to(x.dtype)

        return call, [x.to(**layout), *module.parameters()]

    last = dict(memory_format=torch.channels_last)
    bf16 = torch.bfloat16
    x = features.to(bf16)
    found = {
        'module, bf16 autocast': entry(ours, x, bf16, **last),
        'module, bf16 autocast, compiled': entry(ours, x, bf16, True, **last),
    }
    if mmcv:
        x = features.contiguous()
        found["module, mmcv's, fp32"] = entry(theirs, x.float())
        found["module, mmcv's, fp16 autocast"] = entry(
            theirs, x.half(), torch.float16
        )
    return found


def find_mmcv(source):
    """mmcv's operator, from ``source``, else from an installed mmcv, or None.

    Args:
        source (Path, optional): see :func:`mmcv_carafe`.
    """
    if source:
        return mmcv_carafe(source)
    if any(importlib.util.find_spec(m) is None for m in ('mmcv', 'mmcv._ext')):
        return None
    ops = importlib.import_module('mmcv.ops')
    if ops.get_compiling_cuda_version() == 'not available':
        return None
    return ops.carafe


def mmcv_carafe(source):
    """``mmcv.ops.carafe`` with its CUDA kernels, compiled from ``source``.

    ``source`` is the root of an unpacked release of mmcv, or the directory
    that holds an installed ``mmcv``, whose sources come with it. Only the
    files of CARAFE are compiled; nvcc is needed.

    Returns:
        Callable: features, masks, kernel_size, group_size, scale_factor.
    """
    from torch.utils.cpp_extension import CUDA_HOME, load_inline

    root = Path(source, 'mmcv', 'ops', 'csrc').resolve(strict=True)
    include = [
        root / part for part in ('pytorch/cuda', 'common', 'common/cuda')
    ]
    if not Path(f'{CUDA_HOME}/include/cusparse.h').exists():
        # Only a compiler; the libraries' headers came with torch, by pip.
        nvidia = importlib.util.find_spec('nvidia')
        for folder in nvidia.submodule_search_locations if nvidia else ():
            include += Path(folder).glob('*/include')
    # Bypasses mmcv's registry of devices, which other files would fill.
    names = [
        f'CARAFE{direction}CUDAKernelLauncher'
        for direction in ('Forward', 'Backward')
    ]
    declarations = [
        f'void {name}({", ".join(["at::Tensor"] * tensors + ["int"] * 3)});'
        for name, tensors in zip(names, (6, 9))
    ]
    flags = ['-O3', '-DMMCV_WITH_CUDA']
    extension = load_inline(
        'mmcv_carafe',
        cpp_sources='\n'.join(declarations),
        cuda_sources='#include "carafe_cuda.cu"',
        functions=names,
        extra_cflags=flags,
        extra_cuda_cflags=flags,
        extra_include_paths=[str(folder) for folder in include],
    )
    launch_forward, launch_backward = (getattr(extension, n) for n in names)

    class Function(torch.autograd.Function):
        """Allocates, fills and keeps the same as mmcv/ops/carafe.py."""

        @staticmethod
        def forward(ctx, features, masks, *sizes):
            n, c, h, w = features.shape
            s = sizes[-1]
            output = features.new_zeros((n, c, s * h, s * w))
            transposed = [
                torch.zeros_like(x) for x in (features, output, masks)
            ]
            launch_forward(features, masks, *transposed, output, *sizes)
            ctx.save_for_backward(features, masks, transposed[0])
            ctx.sizes = sizes
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            features, masks, transposed = ctx.saved_tensors
            zeros = [
                torch.zeros_like(x)
                for x in (grad, grad, features, masks, features, masks)
            ]
            launch_backward(
                grad.contiguous(), transposed, masks, *zeros, *ctx.sizes
            )
            return *zeros[-2:], *(None for _ in ctx.sizes)

    return Function.apply
