"""The GPU kernels against the reference in fp64.

The same cases run on a GPU (marker ``gpu``) and, where there is none, in
Triton's interpreter: in a process of its own, because Triton has to know
before it is imported. Compiling ahead of time needs no GPU either.
"""

import importlib.util
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
    importlib.util.find_spec('triton') is None,
    reason='triton is not installed (pip install triton)',
)


def gpu(*args):
    """Mark a test, or a parameter, that needs a CUDA device."""
    marks = [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available() or INTERPRETED,
            reason='torch.cuda.is_available() is False: no GPU',
        ),
    ]
    if isinstance(args[0], str):
        return pytest.param(*args, marks=marks)
    return marks[0](marks[1](args[0]))


on_each_device = pytest.mark.parametrize(
    'device',
    [
        gpu('cuda'),
        pytest.param(
            'cpu',
            id='interpreter',
            marks=pytest.mark.skipif(
                not INTERPRETED, reason='test_interpreter runs it, in a child'
            ),
        ),
    ],
)
in_each_dtype = pytest.mark.parametrize(
    'dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str
)
in_each_layout = pytest.mark.parametrize(
    'channels_last', [False, True], ids=['NCHW', 'NHWC']
)
OPERATORS = {
    'carafe': reference.reassemble,
    'carafe_grad_features': reference.grad_features,
    'carafe_grad_weights': reference.grad_weights,
}
for_each_operator = pytest.mark.parametrize('name', OPERATORS)
# N, C, H, W, K, G, S, normalizer, and what the weights are a view of
FPN = (1, 20, 5, 9, 5, 1, 2, 'softmax', 'logits')
CASES = {
    'fpn': FPN,
    'ready-masks': (2, 8, 3, 4, 5, 1, 2, None, 'masks'),
    'H=1': (1, 3, 1, 7, 3, 1, 2, 'softmax', 'logits'),
    'W=1-S=1': (1, 3, 9, 1, 3, 1, 1, 'sigmoid', 'masks'),
    'K=1': (1, 4, 3, 3, 1, 1, 2, 'sigmoid_normalized', 'logits'),
    'G=2-S=3': (2, 6, 4, 5, 3, 2, 3, 'sigmoid_normalized', 'logits'),
    'G=4-S=4': (1, 8, 2, 3, 3, 4, 4, None, 'logits'),
    'K*K*G>384': (1, 8, 3, 4, 7, 8, 2, 'softmax', 'logits'),
    'larger-than-every-tile': (1, 2, 2, 3, 17, 1, 2, 'softmax', 'masks'),
}


def problem(case, dtype, device, channels_last=False):
    """Random grad, features and weights, and the normalizer."""
    n, c, h, w, k, g, s, normalizer, form = case
    random = torch.Generator(device).manual_seed(h * w + k)

    def randn(*shape):
        x = torch.randn(shape, generator=random, dtype=dtype, device=device)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x

    if form == 'masks':
        weights = randn(n, g * k * k, s * h, s * w)
        weights = reference.weights_from_masks(weights, k, g, s)
    else:
        weights = randn(n, g * k * k * s * s, h, w)
        weights = reference.weights_from_logits(weights, k, g, s)
    return randn(n, c, s * h, s * w), randn(n, c, h, w), weights, normalizer


def arguments(name, grad, features, weights, normalizer):
    tensors = {
        'carafe': (features, weights),
        'carafe_grad_features': (grad, weights),
        'carafe_grad_weights': (grad, features, weights),
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


@on_each_device
@in_each_layout
@in_each_dtype
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
@for_each_operator
def test_agrees_with_fp64(name, case, dtype, channels_last, device):
    check(name, arguments(name, *problem(case, dtype, device, channels_last)))


@on_each_device
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
    case = (1, 130, 9, 17, 3, 1, 2, 'softmax', 'logits')
    check(name, arguments(name, *problem(case, dtype, device, 'NHWC' in kind)))


@on_each_device
@in_each_dtype
@for_each_operator
def test_64_bit_offsets(name, dtype, device, monkeypatch):
    """What images of 2**31 elements take, on a small one."""
    monkeypatch.setattr(kernels, '_largest_offset', lambda tensors: 2**31)
    check(name, arguments(name, *problem(FPN, dtype, device)))


@on_each_device
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
    grad = torch.ones((), device=device).expand(n, c, s * h, s * w)
    check(name, arguments(name, grad, features, weights, 'softmax'))


@on_each_device
@for_each_operator
def test_empty_batch(name, device):
    args = problem((0, *FPN[1:]), torch.float32, device)
    got = getattr(kernels, name)(*arguments(name, *args))
    want = OPERATORS[name](*arguments(name, *args))
    assert got.shape == want.shape


@on_each_device
@in_each_dtype
@for_each_operator
def test_writes_every_element(name, dtype, device, deterministic):
    """``deterministic`` fills what torch.empty returns with NaN."""
    assert torch.empty(3, device=device).isnan().all()
    args = arguments(name, *problem(CASES['G=2-S=3'], dtype, device))
    assert getattr(kernels, name)(*args).isfinite().all()


@on_each_device
@in_each_dtype
@for_each_operator
def test_twice_is_equal_to_the_bit(name, dtype, device):
    args = arguments(name, *problem(FPN, dtype, device))
    kernel = getattr(kernels, name)
    assert torch.equal(kernel(*args), kernel(*args))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_triton
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
    return [int(x) for x in re.search(r'REG:(\d+) STACK:(\d+)', report).groups()]


def fpn_level(kind, channels_last):
    """P3 to P2 of 800x1344 images, on a device without storage."""
    dtype = torch.float32 if 'fp32' in kind else torch.bfloat16
    # Random numbers have no storage to go to: torch.Generator('meta') fails.
    n, c, h, w, k, s = 8, 256, 100, 168, 5, 2
    form = torch.channels_last if channels_last else torch.contiguous_format

    def empty(*shape):
        return torch.empty(
            shape, dtype=dtype, device='meta', memory_format=form
        )

    weights = reference.weights_from_logits(empty(n, k * k * s * s, h, w), k, 1, s)
    return empty(n, c, s * h, s * w), empty(n, c, h, w), weights, 'softmax'


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
@pytest.mark.parametrize('capability', [80, 90])
@in_each_layout
@pytest.mark.parametrize(('name', 'kind'), kernels._CANDIDATES, ids=str)
def test_fast_paths_spill_no_registers(
    name, kind, channels_last, capability, compile_for, tmp_path, monkeypatch
):
    if name == 'carafe' and ('NHWC' in kind) != channels_last:
        pytest.skip('candidates of the other memory format')
    args = arguments(name, *fpn_level(kind, channels_last))
    for config in kernels._CANDIDATES[name, kind]:
        monkeypatch.setitem(kernels.pinned, name, config)
        kernel = compile_for(('cuda', capability, 32), name, args)
        registers, stack = resources(kernel, tmp_path / 'cubin')
        print(config, registers, 'registers', kernel.metadata.shared, 'bytes')
        assert stack == 0
        banded_16_bit = config.banded and '16 bit' in kind
        assert ('mma' in kernel.asm['ptx']) == banded_16_bit
