"""What the GPU kernels are measured against, beside PyTorch's upsamplers.

None of this has been run on a GPU yet.
"""

from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from mmcarafe.ops import reference


def copy_floor(num_bytes, device):
    """A copy on the device that moves ``num_bytes``: half read, half written.

    ``num_bytes`` are those that the operator cannot avoid: each input read
    once and each output written once.
    """
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def minimum_bytes(features, logits, scale_factor, backward=False):
    """Bytes that forward, or backward alone, has to move."""
    small = features.numel() * features.element_size()
    weights = logits.numel() * logits.element_size()
    large = small * scale_factor**2
    # Backward reads the gradient, features and logits; it writes two of them.
    return large + (small + weights) * (2 if backward else 1)


def compiled_reference():
    """The PyTorch version, fused by torch.compile for one shape at a time."""
    return torch.compile(reference.carafe_from_logits, dynamic=False)


def mmcv_carafe(source):
    """``mmcv.ops.carafe`` with its CUDA kernels, compiled from ``source``.

    ``source`` is the root of an unpacked release of mmcv, or the directory
    that holds an installed ``mmcv``, whose sources come with it. Only the
    files of CARAFE are compiled; nvcc is needed.

    Returns:
        Callable: features, ready masks, kernel_size, group_size, scale_factor.
    """
    from torch.utils.cpp_extension import load_inline

    root = Path(source, 'mmcv', 'ops', 'csrc').resolve(strict=True)
    flags = ['-O3', '-DMMCV_WITH_CUDA']
    extension = load_inline(
        'mmcv_carafe',
        cpp_sources='#include "carafe.cpp"',
        cuda_sources='#include "carafe_cuda.cu"',
        functions=['carafe_forward', 'carafe_backward'],
        extra_cflags=flags,
        extra_cuda_cflags=flags,
        extra_include_paths=[
            str(root / path)
            for path in ('pytorch', 'pytorch/cuda', 'common', 'common/cuda')
        ],
    )

    class Function(torch.autograd.Function):
        """Allocates, fills and keeps what mmcv/ops/carafe.py does."""

        @staticmethod
        def forward(ctx, features, masks, *sizes):
            n, c, h, w = features.shape
            s = sizes[-1]
            output = features.new_zeros((n, c, s * h, s * w))
            transposed = [
                torch.zeros_like(x) for x in (features, output, masks)
            ]
            extension.carafe_forward(
                features, masks, *transposed, output, *sizes
            )
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
            extension.carafe_backward(
                grad.contiguous(), transposed, masks, *zeros, *ctx.sizes
            )
            return *zeros[-2:], *(None for _ in ctx.sizes)

    return Function.apply
