"""The Triton kernels against the reference in fp64.

The same cases run on a GPU (marker ``gpu``) and, where there is none, in
Triton's interpreter: in a process of its own, because Triton has to know
before it is imported. Compiling ahead of time needs no GPU either.
"""

import inspect
import itertools
import os
import re
import subprocess
import sys
import types

import fake_gpu
import pytest
import torch
from cases import (
    OPTIONS,
    Case,
    all_options,
    assert_as_exact_as,
    forward_and_gradients,
    part,
)
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
FPN = Case(1, 20, 5, 9)  # several tiles and blocks of channels
# Shape, options, and what the weights are a view of
CASES = {
    'fpn': (FPN, OPTIONS['softmax-zeros'], 'logits'),
    'fpn-renormalize': (
        FPN._replace(w=6),
        OPTIONS['softmax-renormalize'],
        'logits',
    ),
    'ready-masks': (Case(2, 8, 2, 4), OPTIONS['None-zeros'], 'masks'),
    'one-row': (
        Case(1, 3, 1, 7, k=3),
        OPTIONS['sigmoid_normalized-zeros'],
        'logits',
    ),
    'one-column-S=1': (
        Case(1, 3, 9, 1, k=3, s=1),
        OPTIONS['sigmoid-zeros'],
        'masks',
    ),
    'one-pixel-all-taps-but-one-outside': (
        Case(1, 2, 1, 1),
        OPTIONS['softmax-renormalize'],
        'logits',
    ),
    'K=1': (
        Case(1, 4, 3, 3, k=1),
        OPTIONS['sigmoid_normalized-zeros'],
        'logits',
    ),
    'G=2-S=3': (
        Case(1, 6, 2, 4, k=3, g=2, s=3),
        OPTIONS['sigmoid_normalized-renormalize'],
        'logits',
    ),
    # The public function refuses this border, which has no sum to change.
    'G=4-S=4': (
        Case(1, 8, 2, 3, k=3, g=4, s=4),
        (None, 'renormalize'),
        'logits',
    ),
    'K*K*G>384': (
        Case(1, 8, 2, 3, k=7, g=8, s=1),
        OPTIONS['softmax-zeros'],
        'logits',
    ),
    # K=7 and S=2: the gradient of features takes its patch in parts
    'window-larger-than-map': (
        Case(1, 2, 2, 3, k=7),
        OPTIONS['softmax-renormalize'],
        'logits',
    ),
    'larger-than-every-tile': (
        Case(1, 2, 2, 3, k=17, s=1),
        OPTIONS['softmax-zeros'],
        'masks',
    ),
}


def problem(case, options, form, dtype, device, channels_last=False):
    """Random grad, features and scores, and the options."""
    device = device.replace('interpreter', 'cpu')

    def randn(*shape):
        x = torch.randn(shape, dtype=dtype, device=device)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x

    view = getattr(reference, f'scores_from_{form}')
    scores = view(randn(*getattr(case, f'{form}_shape')), *case.arguments)
    high = case.n, case.c, case.s * case.h, case.s * case.w
    return randn(*high), randn(*case.features_shape), scores, *options


def arguments(name, grad, features, scores, *options):
    tensors = {
        'reassemble': (features, scores),
        'reassemble_grad_features': (grad, scores),
        'reassemble_grad_weights': (grad, features, scores),
    }[name]
    return *tensors, *options


def check(name, args):
    *tensors, normalizer, border = args
    options = normalizer, border
    got = getattr(kernels, name)(*args)
    same_dtype = OPERATORS[name](*args)
    assert got.stride() == same_dtype.stride()
    exact = OPERATORS[name](*(x.double() for x in tensors), *options)
    assert_as_exact_as(got, same_dtype, exact)


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


time_candidates = kernels._time


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    """The first candidate; compiling them all for each case takes minutes."""
    monkeypatch.setattr(kernels, '_times', {})
    monkeypatch.setattr(kernels, '_launches', {})
    monkeypatch.setattr(
        kernels, '_time', lambda problem, configs, tensors: {configs[0]: 0}
    )


def test_cases_have_all_options():
    assert {options for _, options, _ in CASES.values()} >= {*OPTIONS.values()}


@on_each_device_and_layout
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
@for_each_operator
def test_agrees_with_fp64(name, case, device, dtype, channels_last):
    check(name, arguments(name, *problem(*case, dtype, device, channels_last)))


@on_each_device(DTYPES)
@pytest.mark.parametrize('value', [torch.nan, torch.inf], ids=str)
@for_each_operator
def test_scores_outside_have_no_effect(name, value, device, dtype):
    """Neither on the weights inside, nor by not being finite."""
    case = Case(1, 3, 2, 3, k=3)  # each pixel has taps outside
    options = OPTIONS['softmax-renormalize']
    grad, features, scores, *_ = problem(
        case, options, 'logits', dtype, device
    )
    spoilt = scores.masked_fill(outside(scores), value)
    clean, other = (
        getattr(kernels, name)(*arguments(name, grad, features, x, *options))
        for x in (scores, spoilt)
    )
    assert clean.isfinite().all()
    assert torch.equal(clean, other)


@pytest.mark.filterwarnings('ignore:invalid value encountered')  # by numpy
@on_each_device(
    [(*dtype, layout) for dtype in DTYPES for layout in (False, True)],
    [(torch.float32, False), (torch.float16, True)],
)
@pytest.mark.parametrize('value', [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@for_each_operator
def test_not_finite_where_the_reference_is_not(
    name, options, value, device, dtype, channels_last
):
    """One value in one of the tensors, in the corner or amid the map."""
    case = Case(1, 3, 4, 5, k=3)
    *tensors, normalizer, border = problem(
        case, options, 'logits', dtype, device, channels_last
    )
    args = arguments(name, *tensors, normalizer, border)
    for spoilt, (y, x) in itertools.product(args[:-2], [(0, 0), (2, 2)]):
        at = spoilt[0, 0] if spoilt.dim() == 4 else spoilt[0, 0, 0, 0, 0]
        before = at[y, x].clone()
        at[y, x] = value
        got = getattr(kernels, name)(*args)
        want = OPERATORS[name](*args)
        at[y, x] = before
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        torch.testing.assert_close(got[finite], want[finite])
        assert finite.any()
        assert spoilt is not args[0] or not finite.all()


@on_each_device(DTYPES)
def test_gradient_of_scores_outside_is_zero(device, dtype):
    """Of a renormalised border, though the other was called just before."""
    *tensors, normalizer, _ = problem(*CASES['fpn'], dtype, device)
    zeros, renormalize = (
        kernels.reassemble_grad_weights(*tensors, normalizer, border)
        for border in ('zeros', 'renormalize')
    )
    there = outside(tensors[-1])
    assert zeros[there].all()
    assert not renormalize[there].any()


def outside(scores):
    """Which scores are of taps outside of the map."""
    finite = torch.zeros_like(scores)
    return reference.exclude_outside(finite, 'renormalize').isinf()


def shown_by_interpreter(width, config):
    """Two widths are enough where nothing is loaded as vectors: one smaller
    than most tiles, and the least level that takes more than one."""
    return width in (9, min(w for w in (42, 84, 168) if w > config.block_w))


@pytest.mark.parametrize(
    ('name', 'kind', 'config', 'width', 'device'),
    [
        pytest.param(*key, config, width, device, marks=marks)
        for key, configs in kernels._CANDIDATES.items()
        for config in configs
        for width in (9, 42, 84, 168)
        for device, marks in (
            ('cuda', on_gpu),
            ('interpreter', in_interpreter),
        )
        if device == 'cuda' or shown_by_interpreter(width, config)
    ],
    ids=str,
)
def test_every_candidate(name, kind, config, width, device, monkeypatch):
    """Widths of an FPN's levels decide what is loaded as vectors."""
    monkeypatch.setitem(kernels.pinned, name, config)
    dtype = torch.float32 if 'fp32' in kind else torch.float16
    # More than one tile in every direction, and more than two of channels.
    case = Case(
        n=1,
        c=2 * max(16, config.block_c) + (2 if width == 9 else 16),
        h=5 if config.way == 'banded' else 2,
        w=width,
        k=3 if width == 9 else 5,
    )
    problem_ = problem(
        case, OPTIONS['softmax-zeros'], 'logits', dtype, device, 'NHWC' in kind
    )
    check(name, arguments(name, *problem_))


@on_each_device(DTYPES)
@for_each_operator
def test_64_bit_offsets(name, dtype, device, monkeypatch):
    """What images of 2**31 elements take, on a small one."""
    monkeypatch.setattr(kernels, '_largest_offset', lambda tensors: 2**31)
    case = CASES['fpn-renormalize']
    check(name, arguments(name, *problem(*case, dtype, device)))


@on_each_device([()])
@for_each_operator
def test_strides_of_slices_and_of_one_value(name, device):
    case, options, form = CASES['fpn-renormalize']
    larger = case._replace(c=2 * case.c, h=case.h + 3)
    grad, features, scores, *_ = problem(
        larger, options, form, torch.float32, device
    )
    features = features[:, ::2, 3:]
    scores = scores[..., 1:-2, :].flip(-1)
    # What backward() of a sum passes: one value, all strides 0.
    grad = grad.new_ones(()).expand_as(grad[:, : case.c, : case.s * case.h])
    check(name, arguments(name, grad, features, scores, *options))


@on_each_device([()])
@for_each_operator
def test_empty_batch(name, device):
    case, options, form = CASES['fpn']
    empty = problem(case._replace(n=0), options, form, torch.float32, device)
    check(name, arguments(name, *empty))


@on_each_device(DTYPES)
@for_each_operator
def test_writes_every_element(name, device, dtype, deterministic):
    """``deterministic`` fills what torch.empty returns with NaN."""
    args = arguments(name, *problem(*CASES['G=2-S=3'], dtype, device))
    assert torch.empty_like(args[0]).isnan().all()
    assert getattr(kernels, name)(*args).isfinite().all()


@on_each_device(DTYPES)
@for_each_operator
def test_twice_is_equal_to_the_bit(name, dtype, device):
    args = arguments(name, *problem(*CASES['fpn'], dtype, device))
    kernel = getattr(kernels, name)
    assert torch.equal(kernel(*args), kernel(*args))


@pytest.fixture
def deterministic():
    pytest.importorskip('torch.utils.deterministic')  # torch >= 2.2
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@for_each_operator
def test_takes_the_arguments_of_the_schema(name):
    """Defaults too: torch leaves out arguments that are equal to them."""
    schema = getattr(torch.ops.mmcarafe, name).default._schema
    signature = inspect.signature(getattr(kernels, name))
    assert [(x.name, x.default) for x in signature.parameters.values()] == [
        (
            x.name,
            x.default_value
            if x.has_default_value()
            else inspect.Parameter.empty,
        )
        for x in schema.arguments
    ]


BAD_OPTIONS = {
    'normalizer': ('tanh', 'zeros'),
    'border': ('softmax', 'mirror'),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('option', BAD_OPTIONS)
@for_each_operator
def test_unknown_option(name, option, dtype):
    case, _, form = CASES['fpn']
    args = problem(case, BAD_OPTIONS[option], form, dtype, 'cpu')
    with pytest.raises(ValueError, match=f"{option} is '.*', expected one of"):
        getattr(kernels, name)(*arguments(name, *args))


class _Clock(fake_gpu._Event):
    """Each interval is shorter than the one before."""

    intervals = 0

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

    def load(problem, config, tensors):
        if config in too_large:
            raise OutOfResources(2, 1, 'shared memory')
        return kernels.Launch(lambda: None, problem, config, None)

    monkeypatch.setattr(kernels, '_load', load)

    def fastest():
        times = time_candidates(None, configs, (), rounds=1)
        return min(times, key=times.get)

    too_large = configs[1:2]
    assert fastest() == configs[-1]
    too_large = configs[-1:]
    assert fastest() == configs[-2]
    too_large = configs[:1]
    with pytest.raises(OutOfResources):
        fastest()


@needs_triton
def test_what_was_launched(monkeypatch):
    """With what, and how fast the others were, for the report."""
    compiled = types.SimpleNamespace(
        n_regs=128, n_spills=0, metadata=types.SimpleNamespace(shared=4096)
    )

    def load(problem, config, tensors):
        return kernels.Launch(lambda *_: None, problem, config, compiled)

    monkeypatch.setattr(kernels, '_load', load)
    assert kernels.launched() == []
    _, features, scores, *options = problem(
        *CASES['fpn'], torch.bfloat16, 'cpu', channels_last=True
    )
    for _ in range(2):
        kernels.reassemble(features, scores, *options)
    (launch,) = kernels.launched()
    key = 'reassemble', '16 bit NHWC'
    default = kernels._CANDIDATES[key][0]._asdict()
    assert launch == {
        'operator': 'reassemble',
        'normalizer': 'softmax',
        'border': 'zeros',
        'dtype': 'bfloat16',
        'layout': 'NHWC',
        'shape': [1, 20, 5, 9],
        'scores': [1, 1, 25, 2, 2, 5, 9],
        'candidate': default,
        'registers': 128,
        'spills': 0,
        'shared_bytes': 4096,
        'timed': [],
    }
    ((_, problem_, config, _),) = kernels._launches.values()
    kernels._times[kernels._configs(problem_)[1]] = {config: 0.5}
    (launch,) = kernels.launched()
    assert launch['timed'] == [{**default, 'milliseconds': 0.5}]


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
    from triton.compiler import CompiledKernel

    compiled = []

    def instead_of_launching(self, grid):
        return lambda *args: compiled.append(self)

    monkeypatch.setattr(CompiledKernel, '__getitem__', instead_of_launching)

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


LEVELS = {'P3': (100, 168), 'P4': (50, 84), 'P5': (25, 42)}


def fpn_level(kind, channels_last, level='P3'):
    """Of 800x1344 images, to upsample, on a device without storage."""
    dtype = torch.float32 if 'fp32' in kind else torch.bfloat16
    n, c, h, w, k, s = 8, 256, *LEVELS[level], 5, 2
    form = torch.channels_last if channels_last else torch.contiguous_format

    def empty(*shape):
        return torch.empty(
            shape, dtype=dtype, device='meta', memory_format=form
        )

    scores = reference.scores_from_logits(
        empty(n, k * k * s * s, h, w), k, 1, s
    )
    return empty(n, c, s * h, s * w), empty(n, c, h, w), scores


TARGETS = {
    'sm_80': ('cuda', 80, 32),
    'sm_90': ('cuda', 90, 32),
    'gfx942': ('hip', 'gfx942', 64),
}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
@pytest.mark.parametrize(
    ('capability', 'level'), [(80, 'P3'), *((90, level) for level in LEVELS)]
)
@pytest.mark.parametrize('channels_last', [False, True], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize(('name', 'kind'), kernels._CANDIDATES, ids=str)
def test_fast_paths_spill_no_registers(
    name,
    kind,
    channels_last,
    capability,
    level,
    compile_for,
    tmp_path,
    monkeypatch,
):
    if ('NHWC' if not channels_last else 'NCHW') in kind:
        pytest.skip('candidates of the other memory format')
    tensors = fpn_level(kind, channels_last, level)
    first, *others = kernels._CANDIDATES[name, kind]
    runs = [(first, 'zeros')]
    # sm_80: the default alone, which every smaller GPU has to run.
    if capability == 90:
        runs += [(config, 'zeros') for config in others]
    if capability == 90 and level == 'P3':
        runs += [(first, 'renormalize')]
    for config, border in runs:
        monkeypatch.setitem(kernels.pinned, name, config)
        args = arguments(name, *tensors, 'softmax', border)
        kernel = compile_for(TARGETS[f'sm_{capability}'], name, args)
        registers, stack = resources(kernel, tmp_path / 'cubin')
        shared = kernel.metadata.shared
        print(config, border, registers, 'registers', shared, 'bytes')
        assert stack == 0
        # At least 8 warps share a multiprocessor of an H100.
        assert 8 // config.num_warps * shared <= 227 * 1024
        banded_16_bit = config.way == 'banded' and '16 bit' in kind
        assert ('mma' in kernel.asm['ptx']) == banded_16_bit
        if (name, kind) == ('reassemble', 'fp32 NCHW'):  # whole sectors
            assert 'st.global.v2' in kernel.asm['ptx']
        # The next block of channels is loaded while this one is multiplied.
        assert ('cp.async' in kernel.asm['ptx']) == (config.way == 'banded')


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
@pytest.mark.parametrize(
    ('case', 'target'),
    [
        *itertools.product(
            ['G=2-S=3', 'larger-than-every-tile'],
            ['sm_80', 'sm_90', 'gfx942'],
        ),
        ('one-column-S=1', 'sm_90'),
        ('ready-masks', 'sm_90'),
    ],
)
@for_each_operator
def test_other_shapes_compile(name, case, target, compile_for, monkeypatch):
    """Every normalizer, and offsets of 64 bits."""
    monkeypatch.setattr(kernels, '_largest_offset', lambda tensors: 2**31)
    *tensors, normalizer, border = problem(*CASES[case], torch.float16, 'cpu')
    tensors = [x.to('meta') for x in tensors]
    args = arguments(name, *tensors, normalizer, border)
    kernel = compile_for(TARGETS[target], name, args)
    assert kernel.metadata.shared < 99 * 1024  # of a small GPU, sm_86


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
@pytest.mark.parametrize('kind', ['fp32', '16 bit'])
@pytest.mark.parametrize('option', BAD_OPTIONS)
@for_each_operator
def test_what_the_kernels_do_not_know_fails_to_compile(
    name, option, kind, compile_for, monkeypatch
):
    """If a new option were added to the package, but not to them."""
    from triton.compiler.errors import CompilationError

    normalizer, border = BAD_OPTIONS[option]
    for known, value in (('NORMALIZERS', normalizer), ('BORDERS', border)):
        monkeypatch.setattr(
            reference, known, (*getattr(reference, known), value)
        )
    args = arguments(name, *fpn_level(kind, False), normalizer, border)
    with pytest.raises(CompilationError) as caught:
        compile_for(TARGETS['sm_90'], name, args)
    innermost = caught.value
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    assert f'unknown {option}' in str(innermost)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
@pytest.mark.parametrize('name', [*OPERATORS][:2])
def test_writing_again_waits_for_the_first_writing(name, compile_for):
    """Of 16 channels: then nothing else makes the threads wait."""
    case = Case(1, 16, 8, 8, k=3, s=1), OPTIONS['softmax-zeros'], 'logits'
    *tensors, normalizer, border = problem(*case, torch.float16, 'cpu')
    tensors = [x.to('meta') for x in tensors]
    args = arguments(name, *tensors, normalizer, border)
    ptx = compile_for(TARGETS['sm_90'], name, args).asm['ptx']
    entry = ptx[ptx.index('.visible .entry') :]
    before = entry[: re.search(r'call.*\n?.*_rewrite', entry).start()]
    assert before.rindex('bar.sync') > before.rindex('st.global')


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
def test_kernel_that_is_not_loaded_in_a_capture(monkeypatch):
    import triton

    monkeypatch.setattr(triton.runtime.driver, '_active', fake_gpu.Driver())
    monkeypatch.setattr(kernels, '_is_capturing', lambda device: True)
    args = arguments(
        'reassemble', *problem(*CASES['fpn'], torch.float32, 'cpu')
    )
    message = (
        'reassemble runs for the first time with these shapes, strides and '
        'alignments of tensors, and a CUDA graph is being captured, which '
        'forbids to load its kernel; run it once before the capture'
    )
    with pytest.raises(RuntimeError) as caught:
        kernels.reassemble(*args)
    assert str(caught.value) == message
    monkeypatch.setattr(kernels, '_is_capturing', lambda device: False)
    kernels.reassemble(*args)
    monkeypatch.setattr(kernels, '_is_capturing', lambda device: True)
    kernels.reassemble(*args)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason='nothing compiles in the interpreter')
def test_a_launch_is_prepared_once(monkeypatch):
    """And again for what Triton compiles anew, or what was pinned."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, '_active', fake_gpu.Driver())
    prepare, prepared = kernels._prepare, []
    monkeypatch.setattr(
        kernels, '_prepare', lambda *a: prepared.append(a) or prepare(*a)
    )
    case, options, form = CASES['fpn']
    tensors = problem(case, options, form, torch.float32, 'cpu')
    args = arguments('reassemble', *tensors)

    def count(*args):
        before = len(prepared)
        kernels.reassemble(*args)
        kernels.reassemble(*args)
        return len(prepared) - before

    assert count(*args) == 1
    features, scores, *options = args
    unaligned = torch.empty(features.numel() + 1)[1:].view_as(features)
    assert count(unaligned, scores, *options) == 1
    assert count(features, scores, 'sigmoid', 'zeros') == 1
    channels_last = features.to(memory_format=torch.channels_last)
    assert count(channels_last, scores, *options) == 1
    config = kernels._CANDIDATES['reassemble', 'fp32 NCHW'][-1]
    monkeypatch.setitem(kernels.pinned, 'reassemble', config)
    assert count(*args) == 1


# What only a GPU can show.


@pytest.fixture
def module_like():
    """Features and logits that want gradients, and what runs on them."""
    case = Case(2, 64, 24, 40)
    grad, features, logits, *_ = problem(
        case, OPTIONS['softmax-zeros'], 'logits', torch.float32, 'cuda'
    )
    logits = logits.reshape(case.logits_shape)
    inputs = features.requires_grad_(), logits.requires_grad_()

    def step(f=carafe_from_logits):
        return torch.autograd.grad(f(*inputs, 5), inputs, grad.clone())

    return step, inputs, grad


@gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@for_each_operator
def test_tuned(name, dtype, monkeypatch):
    monkeypatch.setattr(kernels, '_time', time_candidates)
    for case in ('fpn', 'fpn-renormalize'):
        check(name, arguments(name, *problem(*CASES[case], dtype, 'cuda')))
    assert len(kernels._times) == 2  # a border has a fastest of its own
    for times in kernels._times.values():
        assert {*times} <= {*itertools.chain(*kernels._CANDIDATES.values())}
        assert all(0 < x < 10 for x in times.values())


@gpu
# gloo's, on a machine that does not know its own name
@pytest.mark.filterwarnings('ignore:Unable to resolve hostname')
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
@pytest.mark.filterwarnings('ignore:The CUDA Graph is empty')
def test_cuda_graph_of_what_never_ran():
    """Neither at all, nor with strides of this divisibility."""
    case = Case(2, 64, 24, 40, k=9)  # no other test has this K
    _, features, scores, *_ = problem(
        case, OPTIONS['softmax-zeros'], 'logits', torch.float32, 'cuda'
    )
    logits = scores.reshape(case.logits_shape)
    odd = features[..., :-1].clone(), logits[..., :-1].clone()
    for inputs in ((features, logits), odd):
        with pytest.raises(RuntimeError, match='run it once before'):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                carafe_from_logits(*inputs, case.k)
        carafe_from_logits(*inputs, case.k)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = carafe_from_logits(*inputs, case.k)
        graph.replay()
        want = reference.carafe_from_logits(*inputs, case.k)
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
    args = problem(*CASES['fpn'], torch.float32, 'cuda:1')
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
    case = Case(2, 64, 24, 40, g=2)
    _, features, scores, *_ = problem(
        case, OPTIONS['None-zeros'], 'logits', torch.float32, 'cuda'
    )
    masks = reference.masks_from_scores(scores)  # [2, 2*25, 48, 80]
    got = carafe(features, masks, 5, 2)
    want = reference.carafe(features.double(), masks.double(), 5, 2)
    torch.testing.assert_close(got, want.float())


@gpu
@all_options
def test_gradients_of_the_public_function(options):
    case = Case(2, 64, 24, 40)
    grad, features, scores, *_ = problem(
        case, options, 'logits', torch.float32, 'cuda'
    )
    logits = scores.reshape(case.logits_shape)
    got = forward_and_gradients(
        carafe_from_logits, features, logits, grad, *case.arguments, *options
    )
    want = forward_and_gradients(
        reference.carafe_from_logits,
        *(x.double() for x in (features, logits, grad)),
        *case.arguments,
        *options,
    )
    for actual, exact in zip(got, want):
        torch.testing.assert_close(actual, exact.float())


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
    case = Case(*shape)
    args = problem(case, OPTIONS['softmax-zeros'], 'logits', dtype, 'cuda')
    assert args[0].numel() > 2**31
    args = arguments(name, *args)
    *tensors, normalizer, border = args
    got = getattr(kernels, name)(*args)
    scale = {'reassemble': 2}.get(name, 1)
    for y, x in itertools.product(
        (1, case.h // 2, case.h - 4), (2, case.w - 4)
    ):
        near = [
            part(tensor[-1:], y, x, 4, tensor.shape[-2] // case.h)
            for tensor in tensors
        ]
        exact = OPERATORS[name](
            *(a.double() for a in near), normalizer, border
        )
        same_dtype = OPERATORS[name](*near, normalizer, border)
        inside = min(y, 4), min(x, 4), 0, scale
        assert_as_exact_as(
            part(got[-1:], y, x, 0, scale),
            part(same_dtype, *inside),
            part(exact, *inside),
        )
