"""The GPU kernels against the reference in fp64.

The same cases run on a GPU (marker ``gpu``) and, where there is none, in
Triton's interpreter: in a process of its own, because Triton has to know
before it is imported. Compiling ahead of time needs no GPU either.
"""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmcarafe.ops.triton as kernels
from mmcarafe.ops import carafe, carafe_from_logits, reference

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
needs_triton = pytest.mark.skipif(
    kernels._why_reference() is not None,
    reason=str(kernels._why_reference()),
)


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or INTERPRETED,
        reason='torch.cuda.is_available() is False: no GPU',
    ),
]
in_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason='test_interpreter runs it, in a child process'
)


def gpu(test):
    """Mark a test that needs a CUDA device."""
    return on_gpu[0](on_gpu[1](test))


def on_each_device(runs, fewer=None):
    """Parametrise over runs on a GPU, and fewer in the slow interpreter."""
    names = 'device', *DTYPE_AND_LAYOUT[: len(runs[0])]
    on = [pytest.param('cuda', *run, marks=on_gpu) for run in runs]
    on += [
        pytest.param('interpreter', *run, marks=in_interpreter)
        for run in fewer or runs
    ]
    return pytest.mark.parametrize(names, on)


DTYPE_AND_LAYOUT = 'dtype', 'channels_last'
DTYPES = [(torch.float32,), (torch.bfloat16,), (torch.float16,)]
on_each_device_and_layout = on_each_device(
    [(*dtype, layout) for dtype in DTYPES for layout in (False, True)],
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, True),
    ],
)
OPERATORS = {
    'reassemble': reference.reassemble,
    'reassemble_grad_features': reference.reassemble_grad_features,
    'reassemble_grad_weights': reference.reassemble_grad_weights,
}
for_each_operator = pytest.mark.parametrize('name', OPERATORS)
# N, C, H, W, K, G, S, normalizer, and what the weights are a view of
FPN = (1, 20, 5, 9, 5, 1, 2, 'softmax', 'logits')
CASES = {
    'fpn': FPN,
    'ready-masks': (2, 8, 2, 4, 5, 1, 2, None, 'masks'),
    'H=1': (1, 3, 1, 7, 3, 1, 2, 'softmax', 'logits'),
    'W=1-S=1': (1, 3, 9, 1, 3, 1, 1, 'sigmoid', 'masks'),
    'K=1': (1, 4, 3, 3, 1, 1, 2, 'sigmoid_normalized', 'logits'),
    'G=2-S=3': (1, 6, 2, 4, 3, 2, 3, 'sigmoid_normalized', 'logits'),
    'G=4-S=4': (1, 8, 2, 3, 3, 4, 4, None, 'logits'),
    'K*K*G>384': (1, 8, 2, 3, 7, 8, 1, 'softmax', 'logits'),
    'larger-than-every-tile': (1, 2, 2, 3, 17, 1, 1, 'softmax', 'masks'),
}


def problem(case, dtype, device, channels_last=False):
    """Random grad, features and weights, and the normalizer."""
    n, c, h, w, k, g, s, normalizer, form = case
    device = device.replace('interpreter', 'cpu')
    random = torch.Generator(device).manual_seed(h * w + k)

    def randn(*shape):
        x = torch.randn(shape, generator=random, dtype=dtype, device=device)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x

    if form == 'masks':
        weights = randn(n, g * k * k, s * h, s * w)
        weights = reference.scores_from_masks(weights, k, g, s)
    else:
        weights = randn(n, g * k * k * s * s, h, w)
        weights = reference.scores_from_logits(weights, k, g, s)
    return randn(n, c, s * h, s * w), randn(n, c, h, w), weights, normalizer


def arguments(name, grad, features, weights, normalizer):
    tensors = {
        'reassemble': (features, weights),
        'reassemble_grad_features': (grad, weights),
        'reassemble_grad_weights': (grad, features, weights),
    }[name]
    return *tensors, normalizer


def check(name, args):
    """fp32: assert_close. 16 bits: at most twice the reference's own error."""
    got = getattr(kernels, name)(*args)
    same_dtype = OPERATORS[name](*args)
    assert (got.dtype, got.stride()) == (args[0].dtype, same_dtype.stride())
    want = OPERATORS[name](*(x.double() for x in args[:-1]), args[-1])
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, want.float())
    else:
        error = (got.double() - want).abs().max()
        assert error <= 2 * (same_dtype.double() - want).abs().max()


@pytest.fixture(autouse=INTERPRETED)
def _bf16_as_on_a_gpu(monkeypatch):
    """Triton's interpreter (3.7.1) truncates to bf16 instead of rounding, and
    multiplies the bit patterns of bf16 matrices."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        data = torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(data, tl.bfloat16)

    def widened(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, 'cast_impl', rounded)
    monkeypatch.setattr(InterpreterBuilder, 'create_dot', widened)


fastest = kernels._fastest


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    """The first candidate; compiling them all for each case takes minutes."""
    monkeypatch.setattr(kernels, '_tuned', {})
    monkeypatch.setattr(kernels, '_fastest', lambda configs, _: configs[0])
    kernels._plan.cache_clear()
    yield
    kernels._plan.cache_clear()


@on_each_device_and_layout
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
@for_each_operator
def test_agrees_with_fp64(name, case, device, dtype, channels_last):
    check(name, arguments(name, *problem(case, dtype, device, channels_last)))


@on_each_device([()])
@pytest.mark.parametrize(
    ('name', 'kind', 'config'),
    [
        (*key, config)
        for key, configs in kernels._CANDIDATES.items()
        for config in configs
    ],
    ids=str,
)
def test_every_candidate(name, kind, config, device, monkeypatch):
    monkeypatch.setitem(kernels.pinned, name, config)
    dtype = torch.float32 if 'fp32' in kind else torch.float16
    # More than one tile and one block of channels in every direction.
    size = (5, 9) if config.banded else (2, 5)
    case = (1, 130, *size, 3, 1, 2, 'softmax', 'logits')
    check(name, arguments(name, *problem(case, dtype, device, 'NHWC' in kind)))


@on_each_device(DTYPES)
@for_each_operator
def test_64_bit_offsets(name, dtype, device, monkeypatch):
    """What images of 2**31 elements take, on a small one."""
    monkeypatch.setattr(kernels, '_largest_offset', lambda tensors: 2**31)
    check(name, arguments(name, *problem(FPN, dtype, device)))


@on_each_device([()])
@for_each_operator
def test_strides_of_slices_and_of_one_value(name, device):
    n, c, h, w, k, g, s, *_ = FPN
    _, features, weights, _ = problem(
        (n, 2 * c, h + 3, w, k, g, s, 'softmax', 'logits'),
        torch.float32,
        device,
    )
    features = features[:, ::2, 3:]
    weights = weights[..., 1:-2, :].flip(-1)
    # What backward() of a sum passes: one value, all strides 0.
    grad = features.new_ones(()).expand(n, c, s * h, s * w)
    check(name, arguments(name, grad, features, weights, 'softmax'))


@on_each_device([()])
@for_each_operator
def test_empty_batch(name, device):
    args = problem((0, *FPN[1:]), torch.float32, device)
    got = getattr(kernels, name)(*arguments(name, *args))
    want = OPERATORS[name](*arguments(name, *args))
    assert got.shape == want.shape


@on_each_device(DTYPES)
@for_each_operator
def test_writes_every_element(name, device, dtype, deterministic):
    """``deterministic`` fills what torch.empty returns with NaN."""
    args = arguments(name, *problem(CASES['G=2-S=3'], dtype, device))
    assert torch.empty_like(args[0]).isnan().all()
    assert getattr(kernels, name)(*args).isfinite().all()


@on_each_device(DTYPES)
@for_each_operator
def test_twice_is_equal_to_the_bit(name, dtype, device):
    args = arguments(name, *problem(FPN, dtype, device))
    kernel = getattr(kernels, name)
    assert torch.equal(kernel(*args), kernel(*args))


@pytest.fixture
def deterministic():
    pytest.importorskip('torch.utils.deterministic')  # torch >= 2.2
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class _Clock:
    """A CUDA event: each interval is shorter than the one before."""

    intervals = 0

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        _Clock.intervals += 1
        return -_Clock.intervals


@needs_triton
def test_tuning_takes_the_fastest_that_fits(monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(torch.cuda, 'Event', _Clock)
    monkeypatch.setattr(torch.cuda, '_sleep', lambda cycles: None)
    configs = kernels._CANDIDATES['reassemble', 'fp32 NCHW']
    assert len(configs) > 2

    def launch(config):
        if config in too_large:
            raise OutOfResources(2, 1, 'shared memory')

    too_large = configs[1:2]
    assert fastest(configs, launch) == configs[-1]
    too_large = configs[-1:]
    assert fastest(configs, launch) == configs[-2]
    too_large = configs[:1]
    with pytest.raises(OutOfResources):
        fastest(configs, launch)


def _interpreter_can_index():
    if kernels._why_reference() is not None:
        return False
    import triton

    return tuple(map(int, triton.__version__.split('.')[:2])) >= (3, 7)


@needs_triton
@pytest.mark.skipif(
    not _interpreter_can_index(),
    reason='the interpreter of triton < 3.7 makes an int of an array',
)
@pytest.mark.skipif(INTERPRETED, reason='this is the child')
def test_interpreter():
    """The tests above, on the CPU."""
    child = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-k', 'interpreter', __file__],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert int(re.search(r'(\d+) passed', child.stdout)[1]) > 100


# Ahead of time: the launchers run on tensors without storage, for a device
# that is not there, and stop short of launching.


class _Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, *target):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(*target)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return str(self._target.arch)  # kernels are cached by it

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compile_for(monkeypatch):
    """Compile what one call launches; return its one kernel."""
    import triton
    from triton.runtime.jit import JITFunction

    compiled = []

    def instead_of_launching(self, grid):
        return lambda *args, **options: compiled.append(
            self.run(*args, grid=grid, warmup=True, **options)
        )

    monkeypatch.setattr(JITFunction, '__getitem__', instead_of_launching)

    def compile_for(target, name, args):
        driver = triton.runtime.driver
        monkeypatch.setattr(driver, '_active', _Target(*target))
        getattr(kernels, name)(*args)
        return compiled.pop()

    return compile_for


def resources(kernel, path):
    """Registers and bytes of stack, where spilled registers go."""
    from triton import knobs

    path.write_bytes(kernel.asm['cubin'])
    report = subprocess.run(
        [knobs.nvidia.cuobjdump.path, '-res-usage', path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [
        int(x) for x in re.search(r'REG:(\d+) STACK:(\d+)', report).groups()
    ]


def fpn_level(kind, channels_last):
    """P3 to P2 of 800x1344 images, on a device without storage."""
    dtype = torch.float32 if 'fp32' in kind else torch.bfloat16
    n, c, h, w, k, s = 8, 256, 100, 168, 5, 2
    form = torch.channels_last if channels_last else torch.contiguous_format

    def empty(*shape):
        return torch.empty(
            shape, dtype=dtype, device='meta', memory_format=form
        )

    weights = reference.scores_from_logits(
        empty(n, k * k * s * s, h, w), k, 1, s
    )
    return empty(n, c, s * h, s * w), empty(n, c, h, w), weights, 'softmax'


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('channels_last', [False, True], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize(('name', 'kind'), kernels._CANDIDATES, ids=str)
def test_fast_paths_spill_no_registers(
    name, kind, channels_last, capability, compile_for, tmp_path, monkeypatch
):
    if name == 'reassemble' and ('NHWC' in kind) != channels_last:
        pytest.skip('candidates of the other memory format')
    args = arguments(name, *fpn_level(kind, channels_last))
    # sm_80: the defaults alone, which every smaller GPU has to run.
    configs = kernels._CANDIDATES[name, kind][
        : None if capability == 90 else 1
    ]
    for config in configs:
        monkeypatch.setitem(kernels.pinned, name, config)
        kernel = compile_for(('cuda', capability, 32), name, args)
        registers, stack = resources(kernel, tmp_path / 'cubin')
        print(config, registers, 'registers', kernel.metadata.shared, 'bytes')
        assert stack == 0
        banded_16_bit = config.banded and '16 bit' in kind
        assert ('mma' in kernel.asm['ptx']) == banded_16_bit


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
@pytest.mark.parametrize(
    'target',
    [('cuda', 80, 32), ('cuda', 90, 32), ('hip', 'gfx942', 64)],
    ids=['sm_80', 'sm_90', 'gfx942'],
)
@pytest.mark.parametrize(
    'case', [CASES['G=2-S=3'], CASES['larger-than-every-tile']], ids=str
)
@for_each_operator
def test_other_shapes_compile(name, case, target, compile_for, monkeypatch):
    """Every normalizer, and offsets of 64 bits."""
    monkeypatch.setattr(kernels, '_largest_offset', lambda tensors: 2**31)
    grad, features, weights, normalizer = problem(case, torch.float16, 'cpu')
    args = [x.to('meta') for x in (grad, features, weights)]
    kernel = compile_for(target, name, arguments(name, *args, normalizer))
    assert kernel.metadata.shared < 99 * 1024  # of a small GPU, sm_86


# What only a GPU can show.


@pytest.fixture
def module_like():
    """Features and logits that want gradients, and what runs on them."""
    grad, features, logits, _ = problem(
        (2, 64, 24, 40, 5, 1, 2, 'softmax', 'logits'), torch.float32, 'cuda'
    )
    logits = logits.reshape(2, 100, 24, 40)
    inputs = features.requires_grad_(), logits.requires_grad_()

    def step(f=carafe_from_logits):
        return torch.autograd.grad(f(*inputs, 5), inputs, grad.clone())

    return step, inputs, grad


@gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@for_each_operator
def test_tuned(name, dtype, monkeypatch):
    monkeypatch.setattr(kernels, '_fastest', fastest)
    check(name, arguments(name, *problem(FPN, dtype, 'cuda')))
    (config,) = kernels._tuned.values()
    assert config in itertools.chain(*kernels._CANDIDATES.values())


@gpu
def test_ddp(tmp_path):
    """One process is enough for the hooks and the bucket views."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = torch.nn.Conv2d(8, 100, 1)

        def forward(self, x):
            return carafe_from_logits(x, self.encode(x), 5)

    model = Model().cuda()
    x = torch.randn(2, 8, 9, 11, device='cuda', requires_grad=True)
    inputs = x, *model.parameters()
    want = torch.autograd.grad(model(x).square().sum(), inputs)
    torch.distributed.init_process_group(
        'gloo', f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for tensor, gradient in zip(inputs, want):
        torch.testing.assert_close(tensor.grad, gradient)


@gpu
def test_compiles_into_one_graph(module_like):
    step, *_ = module_like
    compiled = torch.compile(carafe_from_logits, fullgraph=True)
    torch.testing.assert_close(step(compiled), step())


@gpu
def test_cuda_graph(module_like):
    _, (features, logits), _ = module_like
    features, logits = features.detach(), logits.detach()
    carafe_from_logits(features, logits, 5)  # compiles and tunes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = carafe_from_logits(features, logits, 5)
    features.normal_()
    graph.replay()
    want = reference.carafe_from_logits(features, logits, 5)
    torch.testing.assert_close(captured, want)


@gpu
def test_side_stream(module_like):
    _, (features, logits), _ = module_like
    with torch.no_grad():
        want = reference.carafe_from_logits(features * 2, logits, 5)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # the default stream overtakes
            got = carafe_from_logits(features * 2, logits, 5)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(got, want)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='one GPU only')
def test_second_device():
    args = problem(FPN, torch.float32, 'cuda:1')
    for name in OPERATORS:
        check(name, arguments(name, *args))


@gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, module_like):
    _, (features, logits), _ = module_like
    narrow = features.to(dtype), logits.to(dtype)
    with torch.autocast('cuda', dtype):
        got = carafe_from_logits(*narrow, 5)
        mixed = carafe_from_logits(features, narrow[1], 5)
    assert (got.dtype, mixed.dtype) == (dtype, torch.float32)
    assert torch.equal(got, carafe_from_logits(*narrow, 5))


@gpu
def test_checkpointing(module_like):
    step, *_ = module_like

    def recomputed(*args):
        return checkpoint(carafe_from_logits, *args, use_reentrant=False)

    torch.testing.assert_close(step(recomputed), step(), rtol=0, atol=0)


@gpu
def test_ready_masks_through_the_public_function():
    grad, features, weights, _ = problem(
        (2, 64, 24, 40, 5, 2, 2, None, 'logits'), torch.float32, 'cuda'
    )
    masks = reference.masks_from_scores(weights)  # [2, 2*25, 48, 80]
    got = carafe(features, masks, 5, 2)
    want = reference.carafe(features.double(), masks.double(), 5, 2)
    torch.testing.assert_close(got, want.float())


@gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    'shape',
    [(1, 32, 4099, 5250), (16, 32, 1025, 1050)],
    ids=['image', 'batch'],
)
@for_each_operator
def test_more_than_2_31_elements(name, shape, dtype):
    """Pixels all over the map, at its edges too, against their surroundings.

    One image has more than 2**31 weights and more than 2**31 outputs.
    """
    needed = 24 * dtype.itemsize // 2
    torch.cuda.empty_cache()  # of the case before
    free, _ = torch.cuda.mem_get_info()
    if free < needed * 2**30:
        pytest.skip(f'{free >> 30} GiB of GPU memory free, {needed} needed')
    n, c, h, w = shape
    args = problem((*shape, 5, 1, 2, 'softmax', 'logits'), dtype, 'cuda')
    assert args[0].numel() > 2**31
    args = arguments(name, *args)
    got = getattr(kernels, name)(*args)
    scale = {'reassemble': 2}.get(name, 1)
    for y, x in itertools.product((1, h // 2, h - 4), (2, w - 4)):
        near = [
            part(tensor[-1:], y, x, 4, tensor.shape[-2] // h)
            for tensor in args[:-1]
        ]
        want = OPERATORS[name](*(a.double() for a in near), args[-1])
        same_dtype = OPERATORS[name](*near, args[-1])
        inside = min(y, 4), min(x, 4), 0, scale
        want, same_dtype = part(want, *inside), part(same_dtype, *inside)
        sampled = part(got[-1:], y, x, 0, scale)
        if dtype == torch.float32:
            torch.testing.assert_close(sampled, want.float())
        else:
            error = (sampled - want).abs().max()
            assert error <= 2 * (same_dtype - want).abs().max()


def part(x, row, column, around, scale):
    """The 4x4 source pixels from (row, column) on, and those around them."""
    rows = slice(max(0, row - around) * scale, (row + 4 + around) * scale)
    columns = slice(
        max(0, column - around) * scale, (column + 4 + around) * scale
    )
    return x[..., rows, columns]
