"""Launches the GPU kernels of :mod:`mmcarafe.ops.triton_kernels`.

Two routes lead to an output, and each pays where the other does not:

- plain FMAs carry fp32. One loaded feature serves all S*S subpixels.
- fp16 and bf16 go through the tensor cores. All the weights of a tile of
  output pixels form one matrix, zero outside a band, which a dense product
  applies to the tile's source patch. Each weight enters as two numbers, its
  rounded value and the rest, so that rounding the output is what limits the
  accuracy; sums are fp32. A zero weight times infinity is NaN, so a feature
  that is not finite spreads over its tile, not only over its window.

Both gradients are such products in every dtype (with FMAs in fp32). Nothing is
scattered, so there are no atomics: the features' gradient gathers. Masks are
never written; each program normalises the logits of its own tile. fp64 runs
on the reference.

What the work is, by arithmetic (nothing here is a measurement). For each
source pixel, K=5, S=2, C=256, G=1: forward reads C features and 100 logits
and writes 4*C outputs; backward, if it read everything once, would read 4*C
gradients, C features and 100 logits and write C + 100 gradients. The floor is
bytes over 4.8 TB/s, which is the vendor's figure for an H200. A level of an
FPN for 800x1344 images, N=8:

========  ===============  ===============  ===============  ===============
 H x W     forward fp32     forward bf16     backward fp32    backward bf16
========  ===============  ===============  ===============  ===============
 25x42     46 MB   10 us    23 MB    5 us    58 MB   12 us    29 MB    6 us
 50x84    185 MB   39 us    93 MB   19 us   233 MB   49 us   117 MB   24 us
100x168   742 MB  155 us   371 MB   77 us   933 MB  194 us   467 MB   97 us
========  ===============  ===============  ===============  ===============

Operations: 100*C multiply-adds a source pixel forward and 200*C backward, at
100x168 3.4 and 6.9 billion. Plain FMAs do 33.5 trillion a second at the
vendor's 67 TFLOP/s: 103 us forward, less than the floor of fp32 and more than
that of bf16. Tiles of 8x8 output pixels read 8x8 source pixels: their banded
products do 256*C multiply-adds, for rounded weights and for the rest, instead
of 100*C; that is 35 GFLOP, or 36 us at the vendor's 989 TFLOP/s.
"""

import functools
import importlib.util
import math
from typing import NamedTuple

import torch

from mmcarafe.ops import reference
from mmcarafe.ops.carafe import _LIBRARY

_TRITON = (3, 3)  # tuples as kernel arguments
_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests


class Config(NamedTuple):
    """How one kernel cuts its work; a tile is block_h x block_w pixels."""

    banded: bool
    block_c: int
    block_h: int
    block_w: int
    num_warps: int
    num_stages: int = 3


# The first candidate that fits is the default; timing picks among all of them
# unless torch.use_deterministic_algorithms is on or a CUDA graph is captured.
_CANDIDATES = {
    ('carafe', 'fp32 NCHW'): [
        Config(False, 64, 1, 32, 4),
        Config(False, 32, 1, 64, 4),
        Config(False, 16, 1, 128, 4),
        Config(False, 32, 1, 32, 2),
    ],
    ('carafe', 'fp32 NHWC'): [
        Config(False, 128, 1, 8, 4),
        Config(False, 256, 1, 4, 4),
        Config(False, 64, 1, 16, 4),
    ],
    ('carafe', '16 bit NCHW'): [
        Config(True, 64, 2, 16, 4),
        Config(True, 64, 2, 32, 4),
        Config(True, 128, 4, 16, 8),
        Config(False, 64, 1, 32, 4),
    ],
    ('carafe', '16 bit NHWC'): [
        Config(True, 64, 8, 8, 4),
        Config(True, 64, 8, 16, 4),
        Config(True, 128, 8, 16, 8),
        Config(False, 128, 1, 8, 4),
    ],
    ('carafe_grad_features', 'fp32'): [
        Config(True, 32, 4, 4, 4, 2),
        Config(True, 64, 4, 4, 8, 2),
    ],
    ('carafe_grad_features', '16 bit'): [
        Config(True, 64, 4, 4, 4, 2),
        Config(True, 128, 4, 4, 4, 2),
        Config(True, 128, 4, 4, 8, 2),
    ],
    ('carafe_grad_weights', 'fp32'): [
        Config(True, 16, 2, 16, 4),
        Config(True, 32, 2, 16, 4),
        Config(True, 32, 4, 16, 8),
    ],
    ('carafe_grad_weights', '16 bit'): [
        Config(True, 64, 4, 16, 4),
        Config(True, 64, 2, 16, 4),
        Config(True, 64, 8, 8, 4),
        Config(True, 64, 8, 16, 8),
    ],
}
# Where no candidate fits: large K, whose patches outgrow the tiles above.
_FALLBACK = {
    'carafe': Config(False, 16, 1, 16, 4),
    'carafe_grad_features': Config(True, 16, 4, 4, 4),
    'carafe_grad_weights': Config(True, 16, 1, 16, 4),
}

pinned = {}  # operator name -> Config that is used whatever the problem
_tuned = {}  # problem -> fastest Config


def status() -> str:
    """Which kernels serve CUDA tensors, and why."""
    reason = _why_reference()
    if reason is None and torch.cuda.is_available():
        reason = _why_not_on(torch.cuda.current_device())
    if reason is not None:
        return f'PyTorch reference: {reason}'
    import triton

    return f'Triton {triton.__version__} kernels (fp64: PyTorch reference)'


def carafe(features, weights, normalizer):
    """See :func:`mmcarafe.ops.reference.reassemble`."""
    if _takes_reference(features):
        return reference.reassemble(features, weights, normalizer)
    out = reference.empty_map(features, features.shape[1], weights.shape[3])
    _run('carafe', features, weights, (features, weights, out), normalizer)
    return out


def carafe_grad_features(grad, weights, normalizer):
    """See :func:`mmcarafe.ops.reference.grad_features`."""
    if _takes_reference(grad):
        return reference.grad_features(grad, weights, normalizer)
    out = reference.empty_map(grad, grad.shape[1], 1, weights.shape[-2:])
    tensors = (grad, weights, out)
    _run('carafe_grad_features', out, weights, tensors, normalizer)
    return out


def carafe_grad_weights(grad, features, weights, normalizer):
    """See :func:`mmcarafe.ops.reference.grad_weights`."""
    if _takes_reference(features):
        return reference.grad_weights(grad, features, weights, normalizer)
    out = torch.empty_like(weights)
    tensors = (grad, features, weights, out)
    _run('carafe_grad_weights', features, weights, tensors, normalizer)
    return out


def _run(name, features, weights, tensors, normalizer):
    if weights.numel() == 0:
        return
    launch = functools.partial(
        _launch, name, features, weights, tensors, normalizer
    )
    # On the tensors' own device and current stream; a no-op for the CPU
    # tensors of Triton's interpreter.
    with torch.cuda.device_of(weights):
        launch(_choose(name, features, weights, normalizer, launch))


def _choose(name, features, weights, normalizer, launch):
    if name in pinned:
        return pinned[name]
    kind = 'fp32' if features.dtype == torch.float32 else '16 bit'
    layout = 'NHWC' if features.stride(1) == 1 else 'NCHW'
    if name == 'carafe':
        kind = f'{kind} {layout}'
    configs = [c for c in _CANDIDATES[name, kind] if _fits(name, c, weights)]
    configs = configs or [_FALLBACK[name]]
    if (
        len(configs) == 1
        or not weights.is_cuda
        or torch.are_deterministic_algorithms_enabled()
    ):
        # Tiles of another shape may add in another order, so timing them
        # would let the clock choose the last bit.
        return configs[0]
    n, groups, taps, scale, _, height, width = weights.shape
    problem = (
        name,
        weights.device,
        features.dtype,
        layout,
        normalizer,
        (features.shape[1], groups, taps, scale),
        # Images of a few more rows are no new problem.
        (n * height * width).bit_length() // 2,
    )
    if problem not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        _tuned[problem] = _fastest(configs, launch)
    return _tuned[problem]


def _fastest(configs, launch, repeats=10):
    from triton.runtime.errors import OutOfResources

    times = {}
    for config in configs:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            launch(config)  # compiles
        except OutOfResources:  # a smaller GPU; the first fits all of them
            if config is configs[0]:
                raise
            continue
        start.record()
        for _ in range(repeats):
            launch(config)
        end.record()
        end.synchronize()
        times[config] = start.elapsed_time(end)
    return min(times, key=times.get)


def _fits(name, config, weights):
    """Whether the tile's weights and its band stay in registers."""
    if not config.banded:
        return True
    tile = _tile(name, config, weights)
    written = config.block_h * config.block_w
    weights_of = tile['P'] if name == 'carafe_grad_features' else written
    return (
        tile['TAPS'] * weights_of <= 4096 * config.num_warps
        and tile['P'] * written <= 4096 * config.num_warps
    )


def _tile(name, config, weights):
    """Compile-time sizes of the tile and of the patch that it reads."""
    taps, scale = weights.shape[2:4]
    k = math.isqrt(taps)
    tile = {'K': k, 'S': scale, 'BLOCK_W': config.block_w}
    if not config.banded:
        # Bounds the accumulators: 4 for S=2, else a row of them up to 4.
        tile['SUBPIXELS'] = {1: 1, 2: 4, 3: 3, 4: 4}.get(scale, 1)
        return tile
    tile.update(BLOCK_H=config.block_h, TAPS=_power_of_2(taps))
    # Whether rows of 8 divide evenly decides whether stores are vectors.
    tile['ALIGN'] = 8 if weights.shape[-1] % 8 == 0 else 1
    if name == 'carafe_grad_features':
        patch = (config.block_h + k - 1) * (config.block_w + k - 1) * scale**2
        tile['P'] = min(_power_of_2(patch), max(16, 8192 // tile['TAPS']))
        tile['PARTS'] = -(-patch // tile['P'])
        return tile
    patch = [
        _rows_touched(block, scale) + k - 1
        for block in (config.block_h, config.block_w)
    ]
    tile.update(PATCH_H=patch[0], PATCH_W=patch[1])
    tile['P'] = _power_of_2(patch[0] * patch[1])
    return tile


def _launch(name, features, weights, tensors, normalizer, config):
    from mmcarafe.ops import triton_kernels as kernels

    n, groups, _, scale, _, height, width = weights.shape
    channels = features.shape[1] // groups
    tile = _tile(name, config, weights)
    tile['NORMALIZER'] = normalizer
    tile['INDEX'] = kernels.index_dtype(_largest_offset(tensors) >= 2**31)
    tile['BLOCK_C'] = max(16, min(config.block_c, _power_of_2(channels)))

    rows, columns = height, width
    if config.banded and name != 'carafe_grad_features':
        rows, columns = scale * height, scale * width
    if config.banded:
        kernel = kernels.KERNELS[name]
        programs = -(-rows // config.block_h) * -(-columns // config.block_w)
    else:
        kernel = kernels.KERNELS['carafe_plain']
        programs = -(-rows * columns // config.block_w)
        programs *= scale**2 // tile['SUBPIXELS']
    programs *= n * groups
    arguments = [channels, height, width, groups]
    if name != 'carafe_grad_weights':
        # Few tiles: share their channels out, so that all multiprocessors
        # work, though each program then normalises the same weights.
        blocks = -(-channels // tile['BLOCK_C'])
        shares = min(blocks, -(-_enough_programs(weights) // programs))
        arguments.append(-(-blocks // shares))
        programs *= -(-blocks // arguments[-1])
    kernel[(programs,)](
        *tensors,
        *(tensor.stride() for tensor in tensors),
        *arguments,
        **tile,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _enough_programs(tensor):
    if not tensor.is_cuda:
        return 1
    device = torch.cuda.get_device_properties(tensor.device)
    return 4 * device.multi_processor_count


def _largest_offset(tensors):
    """Within one image: the batch has a pointer of its own."""
    return max(
        max(
            sum((x.size(d) - 1) * x.stride(d) for d in range(1, x.dim())),
            x.size(-2) * x.size(-1),
        )
        for x in tensors
    )


def _rows_touched(block, scale):
    """Source rows that ``block`` output rows lie in, wherever they begin."""
    if block % scale == 0:
        return block // scale
    return (block + scale - 2) // scale + 1


def _power_of_2(x):
    return max(16, 1 << (x - 1).bit_length())


def _takes_reference(tensor):
    return (
        tensor.dtype == torch.float64
        or _why_reference() is not None
        or (tensor.is_cuda and _why_not_on(tensor.device.index) is not None)
    )


@functools.lru_cache(None)
def _why_reference():
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed (pip install triton)'
    import triton

    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    if version < _TRITON:
        return 'triton {}.{} is older than {}.{}'.format(*version, *_TRITON)
    return None


@functools.lru_cache(None)
def _why_not_on(device):
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return (
            'compute capability {}.{} is lower than {}.{}, the lowest that '
            'the kernels are compiled for'.format(*capability, *_CAPABILITY)
        )
    return None


for _kernel in (carafe, carafe_grad_features, carafe_grad_weights):
    _LIBRARY.impl(_kernel.__name__, _kernel, 'CUDA')
