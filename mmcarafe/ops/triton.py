"""Launches the GPU kernels of :mod:`mmcarafe.ops.triton_kernels`.

A kernel computes its result in one of three ways, and each pays where the
others do not (``Config.way``):

- *hoisted*, for fp32: plain FMAs. All K*K*S*S weights of a source pixel, or
  the sums of their gradients, stay in registers while its channels pass by.
- *plain*, where those are too many: a weight is loaded once per block of
  channels. One loaded feature still serves all S*S subpixels.
- *banded*, through the tensor cores, for fp16 and bf16: all weights of a tile
  of output pixels form one matrix, zero outside a band, which a dense product
  applies to the tile's source patch. Each weight enters as two numbers, its
  rounded value and the rest, so that rounding the output is what limits the
  accuracy; sums are fp32. A zero weight times infinity is NaN, so a tile whose
  sums are not finite is written once more, each pixel from its window alone.

The features' gradient is a banded product in every dtype (with FMAs in fp32).
Nothing is scattered, so there are no atomics: it gathers. Masks are never
written; each program normalises the logits of its own tile. fp64 runs on the
reference.

A value that is not finite makes the same outputs not finite as in the
reference; which of them are NaN, and which infinite, may differ.

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
from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch

from mmcarafe.ops import reference

_TRITON = (3, 3)  # tuples as kernel arguments
_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests


class Config(NamedTuple):
    """How one kernel cuts its work; a tile is block_h x block_w pixels."""

    way: str  # 'plain', 'hoisted' or 'banded'
    block_c: int
    block_h: int
    block_w: int
    num_warps: int
    num_stages: int = 3


class View(NamedTuple):
    """How a tensor lies in memory."""

    shape: Tuple[int, ...]
    stride: Tuple[int, ...]


class Problem(NamedTuple):
    """What decides how a kernel cuts its work."""

    name: str
    normalizer: Optional[str]
    border: str
    device: torch.device
    dtype: torch.dtype
    features: View
    scores: View
    tensors: Tuple[View, ...]

    @property
    def layout(self):
        return 'NHWC' if self.features.stride[1] == 1 else 'NCHW'


class Launch(NamedTuple):
    """A kernel that is ready, for tensors of one kind."""

    run: Callable  # takes the tensors
    problem: Problem
    config: Config
    compiled: Any  # Triton's; None in its interpreter


# The first candidate that fits is the default; timing picks among all of them
# unless torch.use_deterministic_algorithms is on or a CUDA graph is captured.
_CANDIDATES = {
    ('reassemble', 'fp32 NCHW'): [
        Config('hoisted', 16, 1, 32, 4),
        Config('plain', 64, 1, 32, 4),
        Config('plain', 32, 1, 64, 4),
        Config('plain', 16, 1, 128, 4),
        Config('plain', 32, 1, 32, 2),
    ],
    ('reassemble', 'fp32 NHWC'): [
        Config('hoisted', 16, 1, 16, 4),
        Config('plain', 128, 1, 8, 4),
        Config('plain', 64, 1, 16, 4),
    ],
    ('reassemble', '16 bit NCHW'): [
        Config('banded', 64, 8, 8, 4),
        Config('banded', 64, 8, 16, 4, 2),
        Config('banded', 64, 4, 32, 4, 2),
        Config('banded', 64, 2, 16, 4),
    ],
    ('reassemble', '16 bit NHWC'): [
        Config('banded', 64, 8, 8, 4),
        Config('banded', 64, 8, 16, 4, 2),
        Config('banded', 128, 8, 16, 8, 2),
    ],
    ('reassemble_grad_features', 'fp32'): [
        Config('banded', 64, 4, 4, 8, 2),
        Config('banded', 32, 4, 4, 4, 2),
    ],
    ('reassemble_grad_features', '16 bit'): [
        Config('banded', 64, 4, 4, 4, 2),
        Config('banded', 128, 4, 4, 8, 2),
    ],
    ('reassemble_grad_weights', 'fp32 NCHW'): [
        Config('hoisted', 4, 1, 32, 4),
        Config('hoisted', 2, 1, 64, 4),
        Config('banded', 16, 2, 16, 4),
        Config('banded', 32, 2, 16, 4),
    ],
    ('reassemble_grad_weights', 'fp32 NHWC'): [
        Config('banded', 16, 2, 16, 4),
        Config('banded', 32, 2, 16, 4),
        Config('banded', 32, 4, 16, 8),
    ],
    ('reassemble_grad_weights', '16 bit'): [
        Config('banded', 64, 8, 8, 4),
        Config('banded', 64, 4, 16, 4),
        Config('banded', 64, 2, 16, 4),
        Config('banded', 64, 8, 16, 8),
    ],
}
# Where no candidate fits: large K, whose patches outgrow the tiles above.
_FALLBACK = {
    'reassemble': Config('plain', 16, 1, 16, 4),
    'reassemble_grad_features': Config('banded', 16, 4, 4, 4),
    'reassemble_grad_weights': Config('banded', 16, 1, 16, 4),
}

_HOISTED = 100  # weights of a pixel that registers hold, as K=5 and S=2 need

pinned = {}  # operator name -> Config that is used whatever the problem
_times = {}  # kind of problem -> Config -> milliseconds
_launches = {}  # all that decides a launch -> Launch
_MOST_LAUNCHES = 4096


def status() -> str:
    """What serves CUDA tensors, and why."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return 'not available, because this torch was built without CUDA'
        return 'not available, because torch finds no CUDA device'
    where = f'on {torch.cuda.get_device_name()}'
    reason = _why_reference() or _why_not_on(torch.cuda.current_device())
    if reason is not None:
        return f'PyTorch reference {where}: {reason}'
    import triton

    return (
        f'Triton {triton.__version__} kernels (fp64: PyTorch reference) '
        f'{where}'
    )


def reassemble(features, scores, normalizer, border='zeros'):
    """See :func:`mmcarafe.ops.reference.reassemble`."""
    if _takes_reference(features):
        return reference.reassemble(features, scores, normalizer, border)
    out = reference.empty_map(features, features.shape[1], scores.shape[3])
    tensors = (features, scores, out)
    _run('reassemble', features, scores, tensors, normalizer, border)
    return out


def reassemble_grad_features(grad, scores, normalizer, border='zeros'):
    """See :func:`mmcarafe.ops.reference.reassemble_grad_features`."""
    if _takes_reference(grad):
        return reference.reassemble_grad_features(
            grad, scores, normalizer, border
        )
    out = reference.empty_map(grad, grad.shape[1], 1, scores.shape[-2:])
    tensors = (grad, scores, out)
    _run('reassemble_grad_features', out, scores, tensors, normalizer, border)
    return out


def reassemble_grad_weights(
    grad, features, scores, normalizer, border='zeros'
):
    """See :func:`mmcarafe.ops.reference.reassemble_grad_weights`."""
    if _takes_reference(features):
        return reference.reassemble_grad_weights(
            grad, features, scores, normalizer, border
        )
    out = torch.empty_like(scores)
    tensors = (grad, features, scores, out)
    _run(
        'reassemble_grad_weights',
        features,
        scores,
        tensors,
        normalizer,
        border,
    )
    return out


def launched():
    """What has served calls so far: a plain dict for each kind of launch."""
    return [
        {
            'operator': problem.name,
            'normalizer': problem.normalizer,
            'border': problem.border,
            'dtype': str(problem.dtype)[len('torch.') :],
            'layout': problem.layout,
            'shape': [*problem.features.shape],
            'scores': [*problem.scores.shape],
            'candidate': config._asdict(),
            **resources(compiled),
            # Of all that timing chose among, if it did.
            'timed': [
                {**other._asdict(), 'milliseconds': time}
                for other, time in _times.get(_configs(problem)[1], {}).items()
            ],
        }
        for _, problem, config, compiled in _launches.values()
    ]


def resources(compiled):
    """What a kernel takes of a multiprocessor, as far as Triton says."""
    metadata = getattr(compiled, 'metadata', None)
    return {
        'registers': getattr(compiled, 'n_regs', None),
        'spills': getattr(compiled, 'n_spills', None),
        'shared_bytes': getattr(metadata, 'shared', None),
    }


def _run(name, features, scores, tensors, normalizer, border):
    if scores.numel() == 0:
        return
    # All that decides a launch. Triton compiles for pointers that are
    # multiples of 16 bytes, and for others.
    device = scores.get_device()  # -1 for Triton's interpreter
    key = [
        name,
        normalizer,
        border,
        device,
        scores.dtype,
        pinned.get(name),
        torch.are_deterministic_algorithms_enabled(),
    ]
    for x in tensors:
        key += x.shape, x.stride(), x.data_ptr() % 16 == 0
    key = tuple(key)
    # On the tensors' own device and current stream. No context where that is
    # the current one, because it would take longer than all of the above.
    if device < 0 or device == torch.cuda.current_device():
        launch = _launches.get(key) or _prepare(key, features, scores, tensors)
        launch.run(*tensors)
        return
    with torch.cuda.device(device):
        _run(name, features, scores, tensors, normalizer, border)


def _prepare(key, features, scores, tensors):
    """Choose, compile and load a kernel; return its launch."""
    name, normalizer, border, *_ = key
    problem = _problem(name, features, scores, tensors, normalizer, border)
    config = _choose(problem, tensors)
    launch = _load(problem, config, tensors)
    if not _is_capturing(problem.device):  # then the choice may be a makeshift
        if len(_launches) == _MOST_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    return launch


def _problem(name, features, scores, tensors, normalizer, border):
    reference.check_options(normalizer, border)
    if normalizer not in reference.SUM_TO_ONE:
        border = 'zeros'  # the same, because there is no sum over the taps
    return Problem(
        name,
        normalizer,
        border,
        scores.device,
        scores.dtype,
        View(features.shape, features.stride()),
        View(scores.shape, scores.stride()),
        tuple(View(x.shape, x.stride()) for x in tensors),
    )


def _choose(problem, tensors):
    if problem.name in pinned:
        return pinned[problem.name]
    configs, like = _configs(problem)
    if (
        len(configs) == 1
        or problem.device.type != 'cuda'
        or torch.are_deterministic_algorithms_enabled()
    ):
        # Tiles of another shape may add in another order, so timing them
        # would let the clock choose the last bit.
        return configs[0]
    if like not in _times:
        if _is_capturing(problem.device):
            return configs[0]
        _times[like] = _time(problem, configs, tensors)
    return min(_times[like], key=_times[like].get)


def _is_capturing(device):
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


def _load(problem, config, tensors):
    """Compile and load a kernel for tensors like these; return its launch."""
    from triton.runtime.jit import JITFunction

    kernel, grid, arguments, options = _plan(problem, config)
    if not isinstance(kernel, JITFunction):  # in Triton's interpreter

        def interpret(*tensors):
            kernel[grid](*tensors, *arguments, **options)

        return Launch(interpret, problem, config, None)
    # Not kernel[grid](*tensors, ...), which would find out on each call what
    # it has to compile for: that takes longer than some kernels do.
    compiled = kernel.warmup(*tensors, *arguments, grid=grid, **options)
    if _is_capturing(problem.device) and compiled.module is None:
        raise RuntimeError(
            f'{problem.name} runs for the first time with these shapes, '
            'strides and alignments of tensors, and a CUDA graph is being '
            'captured, which forbids to load its kernel; run it once before '
            'the capture'
        )
    run = compiled[grid]
    given = len(tensors) + len(arguments)
    rest = *arguments, *(options[name] for name in kernel.arg_names[given:])
    return Launch(
        lambda *tensors: run(*tensors, *rest), problem, config, compiled
    )


def _configs(problem):
    """The candidates, and what problems share the fastest of them."""
    kind = 'fp32' if problem.dtype == torch.float32 else '16 bit'
    candidates = _CANDIDATES.get((problem.name, f'{kind} {problem.layout}'))
    candidates = candidates or _CANDIDATES[problem.name, kind]
    configs = [c for c in candidates if _fits(problem, c)]
    n, *sizes, _, height, width = problem.scores.shape
    return configs or [_FALLBACK[problem.name]], (
        *problem[:5],
        problem.layout,
        (problem.features.shape[1], *sizes),
        # Images of a few more rows are no new problem.
        (n * height * width).bit_length() // 2,
    )


def _time(problem, configs, tensors, rounds=3, repeats=20):
    """Shortest milliseconds of each candidate that the GPU can run."""
    from triton.runtime.errors import OutOfResources

    runs = {}
    for config in configs:
        try:
            runs[config] = _load(problem, config, tensors).run
        except OutOfResources:  # a smaller GPU; the first fits all of them
            if config is configs[0]:
                raise
    found = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for config, run in runs.items():
            run(*tensors)  # warm up
            start, end = (
                torch.cuda.Event(enable_timing=True) for _ in range(2)
            )
            # The GPU waits until all are queued: not their launch is timed.
            torch.cuda._sleep(2_000_000)
            start.record()
            for _ in range(repeats):
                run(*tensors)
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end) / repeats
            found[config] = min(found[config], elapsed)
    return found


def _fits(problem, config):
    """Whether the tile's weights and its band stay in registers."""
    if config.way == 'plain':
        return True
    tile = _tile(problem, config)
    if config.way == 'hoisted':
        subpixels = tile.get('SUBPIXELS', tile['S'] ** 2)
        return subpixels * tile['K'] ** 2 <= _HOISTED
    written = config.block_h * config.block_w
    gathers = problem.name == 'reassemble_grad_features'
    weights_of = tile['PATCH'] if gathers else written
    return (
        tile['TAPS'] * weights_of <= 4096 * config.num_warps
        and tile['PATCH'] * written <= 4096 * config.num_warps
    )


def _tile(problem, config):
    """Compile-time sizes of the tile and of the patch that it reads.

    PATCH pixels are a power of two: those of the patch, and padding.
    """
    taps, scale = problem.scores.shape[2:4]
    k = math.isqrt(taps)
    tile = {'K': k, 'S': scale, 'BLOCK_W': config.block_w}
    if config.way != 'banded':
        tile['ROWS'] = all(
            view.stride[3] == 1
            for view in problem.tensors
            if len(view.shape) == 4
        )
        if problem.name == 'reassemble':
            tile['HOISTED'] = config.way == 'hoisted'
            # Bounds the accumulators: 4 for S=2, else a row of them up to 4.
            tile['SUBPIXELS'] = {1: 1, 2: 4, 3: 3, 4: 4}.get(scale, 1)
        return tile
    tile.update(BLOCK_H=config.block_h, TAPS=_power_of_2(taps))
    tile['ALIGN'] = _alignment(problem.tensors)
    if problem.name == 'reassemble_grad_features':
        patch = (config.block_h + k - 1) * (config.block_w + k - 1) * scale**2
        tile['PATCH'] = min(_power_of_2(patch), max(16, 8192 // tile['TAPS']))
        tile['PARTS'] = -(-patch // tile['PATCH'])
        return tile
    patch = [
        _rows_touched(block, scale) + k - 1
        for block in (config.block_h, config.block_w)
    ]
    tile.update(PATCH_H=patch[0], PATCH_W=patch[1])
    tile['PATCH'] = _power_of_2(patch[0] * patch[1])
    return tile


def _plan(problem, config):
    """Kernel, grid, arguments behind the tensors, and compile-time ones."""
    from mmcarafe.ops import triton_kernels as kernels

    n, groups, _, scale, _, height, width = problem.scores.shape
    channels = problem.features.shape[1] // groups
    tile = _tile(problem, config)
    tile.update(NORMALIZER=problem.normalizer, BORDER=problem.border)
    wide = _largest_offset(problem.tensors) >= 2**31
    tile['INDEX'] = kernels.index_dtype(wide)
    tile['BLOCK_C'] = min(config.block_c, _power_of_2(channels))

    rows, columns = height, width
    if config.way == 'banded' and problem.name != 'reassemble_grad_features':
        rows, columns = scale * height, scale * width
    if config.way == 'banded':
        kernel = getattr(kernels, f'{problem.name}_banded')
        programs = -(-rows // config.block_h) * -(-columns // config.block_w)
    else:
        kernel = kernels.reassemble_plain
        if problem.name == 'reassemble_grad_weights':
            kernel = kernels.reassemble_grad_weights_hoisted
        programs = -(-rows * columns // config.block_w)
        programs *= scale**2 // tile.get('SUBPIXELS', scale**2)
    programs *= n * groups
    arguments = [view.stride for view in problem.tensors]
    arguments += [channels, height, width, groups]
    if problem.name != 'reassemble_grad_weights':
        # Few tiles: share their channels out, so that all multiprocessors
        # work, though each program then normalises the same weights.
        blocks = -(-channels // tile['BLOCK_C'])
        shares = min(blocks, -(-_enough_programs(problem.device) // programs))
        arguments.append(-(-blocks // shares))
        programs *= -(-blocks // arguments[-1])
    tile.update(num_warps=config.num_warps, num_stages=config.num_stages)
    return kernel, (programs, 1, 1), arguments, tile


def _alignment(views):
    """Elements, up to 8, that every row of NCHW maps is a multiple of.

    It decides whether they are loaded and stored as vectors.
    """
    maps = [view for view in views if len(view.shape) == 4]
    if any(view.stride[3] != 1 for view in maps):
        return 1
    lengths = [n for x in maps for n in (x.shape[3], *x.stride[1:3])]
    return functools.reduce(math.gcd, lengths, 8)


def _enough_programs(device):
    if device.type != 'cuda':
        return 1
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _largest_offset(views):
    """Within one image: the batch has a pointer of its own."""
    return max(
        max(
            sum((n - 1) * step for n, step in zip(x.shape[1:], x.stride[1:])),
            x.shape[-2] * x.shape[-1],
        )
        for x in views
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
