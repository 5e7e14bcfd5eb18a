"""The operator against a hand-worked example, six loops and its contract."""

import itertools

import pytest
import torch
from _measure import peak_memory
from cases import (
    CASES,
    LAYOUTS,
    OPTIONS,
    Case,
    all_cases,
    all_dtypes,
    all_layouts,
    all_options,
    assert_as_exact_as,
    forward_and_gradients,
    randn,
)
from torch.autograd import forward_ad
from torch.nn import functional as F

from mmcarafe.ops import (
    carafe,
    carafe_from_logits,
    cpu,
    export,
    reference,
    triton,
)
from mmcarafe.upsamplers import CARAFE

# The reference, against things that can be checked by eye


def six_loops(features, masks, kernel_size, group_size, scale_factor):
    """mmcv's contract, literally: masks are normalised and shuffled."""
    n, channels, height, width = features.shape
    out = features.new_zeros(
        n, channels, height * scale_factor, width * scale_factor
    )
    for b, c, y, x in itertools.product(*map(range, out.shape)):
        group = c // (channels // group_size)
        for dy, dx in itertools.product(range(kernel_size), repeat=2):
            source_y = y // scale_factor + dy - kernel_size // 2
            source_x = x // scale_factor + dx - kernel_size // 2
            if 0 <= source_y < height and 0 <= source_x < width:
                tap = (group * kernel_size + dy) * kernel_size + dx
                out[b, c, y, x] += (
                    masks[b, tap, y, x] * features[b, c, source_y, source_x]
                )
    return out


def masks_from_logits(
    logits, kernel_size, group_size, scale_factor, normalizer, border
):
    """What mmcv's CARAFEPack does between its convolution and its operator.

    With border 'renormalize' the taps outside the map become zero before
    the others are divided by their sum.
    """
    masks = F.pixel_shuffle(logits, scale_factor)
    shape = masks.shape
    masks = masks.view(shape[0], group_size, kernel_size**2, *shape[2:])
    if normalizer == 'softmax':
        masks = masks.exp()
    elif normalizer in ('sigmoid_normalized', 'sigmoid'):
        masks = 1 / (1 + (-masks).exp())
    else:
        assert normalizer is None, f'{normalizer} has no definition here'
    if border == 'renormalize':
        for tap, y, x in itertools.product(*map(range, masks.shape[2:])):
            source_y = (
                y // scale_factor + tap // kernel_size - kernel_size // 2
            )
            source_x = x // scale_factor + tap % kernel_size - kernel_size // 2
            if not (
                0 <= source_y < shape[2] // scale_factor
                and 0 <= source_x < shape[3] // scale_factor
            ):
                masks[:, :, tap, y, x] = 0
    if normalizer in reference.SUM_TO_ONE:
        masks = masks / masks.sum(2, keepdim=True)
    return masks.view(shape)


@pytest.mark.parametrize('operator', [reference.carafe, carafe])
def test_hand_worked_example(operator):
    features = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    masks = torch.zeros(1, 9, 6, 6)
    masks[0, 4] = 1.0  # the centre tap alone: nearest
    masks[0, :, 0, 0] = 1 / 9  # top left: 4 of 9 taps are inside the map
    masks[0, :, 3, 2] = 1 / 9  # the mean of the whole map
    masks[0, :, 5, 5] = 0
    masks[0, 0, 5, 5] = 2.0  # twice the upper left neighbour
    expected = torch.tensor(
        [
            [12 / 9, 1, 2, 2, 3, 3],
            [1, 1, 2, 2, 3, 3],
            [4, 4, 5, 5, 6, 6],
            [4, 4, 5, 5, 6, 6],
            [7, 7, 8, 8, 9, 9],
            [7, 7, 8, 8, 9, 10],
        ]
    )
    expected[3, 2] = 45 / 9
    torch.testing.assert_close(operator(features, masks, 3)[0, 0], expected)


@all_cases
def test_reference_equals_six_loops(case):
    features = randn(*case.features_shape)
    masks = randn(*case.masks_shape)
    torch.testing.assert_close(
        reference.carafe(features, masks, *case.arguments),
        six_loops(features, masks, *case.arguments),
        rtol=0,
        atol=1e-10,
    )


@all_cases
@all_options
def test_reference_normalises_as_the_definition(case, options):
    features = randn(*case.features_shape)
    logits = randn(*case.logits_shape)
    masks = masks_from_logits(logits, *case.arguments, *options)
    torch.testing.assert_close(
        reference.carafe_from_logits(
            features, logits, *case.arguments, *options
        ),
        reference.carafe(features, masks, *case.arguments),
        rtol=0,
        atol=1e-10,
    )


@all_cases
@all_options
@all_layouts
def test_reference_gradients_equal_autograds(case, options, layout):
    """The closed forms, against autograd through the forward."""
    features = randn(*case.features_shape)
    logits = randn(*case.logits_shape)
    grad = randn(case.n, case.c, case.s * case.h, case.s * case.w)
    _, expected_features, expected_logits = forward_and_gradients(
        reference.carafe_from_logits,
        features,
        logits,
        grad,
        *case.arguments,
        *options,
    )
    features, logits, grad = map(layout, (features, logits, grad))
    scores = reference.scores_from_logits(logits, *case.arguments)
    for result, expected in (
        (
            reference.reassemble_grad_features(grad, scores, *options),
            expected_features,
        ),
        (
            reference.reassemble_grad_weights(
                grad, features, scores, *options
            ),
            expected_logits.view(scores.shape),
        ),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


# The operator, against the reference


@all_cases
@all_dtypes
@all_layouts
@pytest.mark.parametrize('form', ['logits', 'masks'])
def test_operator_equals_reference(case, dtype, layout, form):
    if form == 'masks':
        operator, plain = carafe, reference.carafe
        shape, all_arguments = case.masks_shape, [case.arguments]
    else:
        operator, plain = carafe_from_logits, reference.carafe_from_logits
        shape = case.logits_shape
        all_arguments = [
            (*case.arguments, *options) for options in OPTIONS.values()
        ]
    features = randn(*case.features_shape, dtype=dtype)
    scores = randn(*shape, dtype=dtype)
    grad = randn(case.n, case.c, *[case.s * x for x in case[2:4]], dtype=dtype)
    for arguments in all_arguments:
        # autograd through the plain forward, not the closed-form gradients
        exact = forward_and_gradients(
            *(plain, features.double(), scores.double(), grad.double()),
            *arguments,
        )
        same_dtype = forward_and_gradients(
            plain, features, scores, grad, *arguments
        )
        results = forward_and_gradients(
            operator,
            layout(features),
            layout(scores),
            layout(grad),
            *arguments,
        )
        for result, rounded, true in zip(results, same_dtype, exact):
            assert_as_exact_as(result, rounded, true)


def test_forward_mode_is_an_error():
    """Not a derivative of zero."""
    features, logits = torch.randn(1, 4, 5, 6), torch.randn(1, 36, 5, 6)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(features, torch.ones_like(features))
        with pytest.raises(NotImplementedError, match='forward mode'):
            carafe_from_logits(dual, logits, 3)


@all_options
@pytest.mark.parametrize(
    'case',
    [Case(1, 4, 2, 2, k=3, g=2, s=1), Case(1, 2, 2, 2, k=3), Case(1, 1, 3, 1)],
    ids=repr,
)
def test_gradients_of_first_and_second_order(case, options):
    features = randn(*case.features_shape).requires_grad_()
    logits = randn(*case.logits_shape).requires_grad_()

    def upsample(features, logits):
        return carafe_from_logits(features, logits, *case.arguments, *options)

    torch.autograd.gradcheck(upsample, (features, logits))
    torch.autograd.gradgradcheck(upsample, (features, logits))


@all_options
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_gradients_that_can_be_differentiated_are_as_exact(dtype, options):
    """create_graph takes another path: its 16-bit roundings may not add up.

    Compared are mean errors of five draws: one draw's vary by a factor of two.
    """
    case = CASES['the-paper']
    arguments = *case.arguments, *options
    errors = torch.zeros(2, 2, dtype=torch.float64)  # [path, input]
    for _ in range(5):
        inputs = [
            randn(*shape, dtype=dtype).requires_grad_()
            for shape in (case.features_shape, case.logits_shape)
        ]
        grad = randn(2, 8, 12, 14, dtype=dtype)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        out = carafe_from_logits(*doubles, *arguments)
        exact = torch.autograd.grad(out, doubles, grad.double())
        for path, create_graph in enumerate((False, True)):
            gradients = torch.autograd.grad(
                carafe_from_logits(*inputs, *arguments),
                inputs,
                grad,
                create_graph=create_graph,
            )
            for i, (got, want) in enumerate(zip(gradients, exact)):
                error = (got.detach().double() - want).abs().max()
                errors[path, i] += error
    plain, differentiable = errors
    assert (differentiable <= 2 * plain).all(), errors


@pytest.mark.parametrize('which', ['features', 'logits'])
def test_gradient_for_one_input_only(which):
    case = CASES['the-paper']
    inputs = dict(
        features=randn(*case.features_shape), logits=randn(*case.logits_shape)
    )
    both = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    carafe_from_logits(**both, kernel_size=5).square().sum().backward()
    inputs[which].requires_grad_()
    carafe_from_logits(**inputs, kernel_size=5).square().sum().backward()
    torch.testing.assert_close(inputs[which].grad, both[which].grad)
    for other in inputs.keys() - {which}:
        assert inputs[other].grad is None


# Properties


def test_unit_mask_of_kernel_1_is_nearest():
    features = randn(2, 3, 4, 5)
    masks = torch.ones(2, 1, 12, 15, dtype=torch.float64)
    nearest = F.interpolate(features, scale_factor=3, mode='nearest')
    assert torch.equal(carafe(features, masks, 1, 1, 3), nearest)


@pytest.mark.parametrize('normalizer', reference.SUM_TO_ONE)
def test_constant_stays_constant_away_from_the_border(normalizer):
    features = torch.full((1, 2, 9, 9), 3.0)
    logits = randn(1, 100, 9, 9, dtype=torch.float32)
    out = carafe_from_logits(features, logits, 5, normalizer=normalizer)
    inner = out[:, :, 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.full_like(inner, 3.0))
    assert out[0, 0, 0, 0] < 3.0  # no renormalisation at the border


@pytest.mark.parametrize('normalizer', reference.SUM_TO_ONE)
@pytest.mark.parametrize('kernel_size', [3, 5, 7])
@pytest.mark.parametrize('size', [(1, 1), (2, 2), (1, 6), (9, 7)], ids=str)
def test_constant_stays_constant_everywhere(normalizer, kernel_size, size):
    """With a renormalised border, on maps smaller than the window too."""
    features = torch.full((1, 2, *size), 3.0)
    logits = randn(1, 4 * kernel_size**2, *size, dtype=torch.float32)
    out = carafe_from_logits(
        features, logits, kernel_size, 1, 2, normalizer, 'renormalize'
    )
    assert (out - 3).abs().max() <= 3e-6


def test_taps_outside_take_no_part_whatever_their_score():
    features = randn(1, 2, 5, 6).requires_grad_()
    logits = randn(1, 100, 5, 6).requires_grad_()
    spoilt = logits.detach().clone()
    spoilt[:, :4, 0] = torch.nan  # the first tap of the first row
    spoilt[:, -4:, :, -1] = torch.inf  # the last tap of the last column
    spoilt.requires_grad_()
    results = [
        forward_and_gradients(
            carafe_from_logits,
            *(features, each, torch.ones(1, 2, 10, 12)),
            *(5, 1, 2, 'softmax', 'renormalize'),
        )
        for each in (logits, spoilt)
    ]
    for clean, other in zip(*results):
        assert torch.equal(clean, other)


def test_linear_in_features():
    case = CASES['groups-2']
    a, b = randn(2, *case.features_shape)
    logits = randn(*case.logits_shape)
    torch.testing.assert_close(
        carafe_from_logits(2 * a + b, logits, *case.arguments),
        2 * carafe_from_logits(a, logits, *case.arguments)
        + carafe_from_logits(b, logits, *case.arguments),
    )


def test_batch_neighbours_do_not_matter():
    case = CASES['the-paper']
    features = randn(*case.features_shape)
    logits = randn(*case.logits_shape)
    expected = carafe_from_logits(features, logits, 5)[1]
    features[0] = torch.nan
    logits[0] = torch.nan
    assert torch.equal(carafe_from_logits(features, logits, 5)[1], expected)


@all_dtypes
def test_run_twice_equal_to_the_bit(dtype):
    features = randn(2, 19, 7, 9, dtype=dtype)
    logits = randn(2, 100, 7, 9, dtype=dtype)
    grad = randn(2, 19, 14, 18, dtype=dtype)
    first, second = (
        forward_and_gradients(carafe_from_logits, features, logits, grad, 5)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize('logit', [-1e4, 1e4])
@all_options
def test_large_logits_stay_finite(options, logit):
    features = randn(1, 2, 5, 5, dtype=torch.float32)
    logits = torch.full((1, 100, 5, 5), logit)
    grad = torch.ones(1, 2, 10, 10)
    results = forward_and_gradients(
        carafe_from_logits, features, logits, grad, 5, 1, 2, *options
    )
    assert all(result.isfinite().all() for result in results)


@pytest.mark.skipif(
    not hasattr(torch.utils, 'deterministic'),
    reason='torch.utils.deterministic came with torch 2.2',
)
@all_layouts
def test_every_element_is_written(layout):
    """Uninitialised memory is filled with NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan()
        results = forward_and_gradients(
            carafe_from_logits,
            layout(randn(2, 5, 3, 4)),
            layout(randn(2, 100, 3, 4)),
            layout(randn(2, 5, 6, 8)),
            5,
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


# What reaches which output pixel, by hand. For every path and every place,
# tests/test_fuzz.py compares it with the reference.
BOTH = pytest.mark.parametrize('path', [reference, None], ids=['ref', 'op'])
INF, NAN = float('inf'), float('nan')


def run_not_finite(path, features, logits, options):
    operator = path.carafe_from_logits if path else carafe_from_logits
    out = operator(features, logits, 3, 2, 2, *options)
    if path:
        return (out,)
    return forward_and_gradients(
        operator, features, logits, torch.ones_like(out), 3, 2, 2, *options
    )


@BOTH
@all_options
@pytest.mark.parametrize('value', [INF, -INF, NAN])
def test_a_feature_that_is_not_finite(path, options, value):
    """It reaches its channel, where it lies in the window: 3 pixels each way.

    Of the gradients it reaches those of the scores of these windows alone.
    """
    case = Case(1, 4, 5, 6, 3, 2, 2)
    features = randn(*case.features_shape)
    features[0, 1, 2, 3] = value  # of group 0
    logits = randn(*case.logits_shape)
    out, *gradients = run_not_finite(path, features, logits, options)
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[0, 1, 2:8, 4:10] = True
    assert torch.equal(~out.isfinite(), reached)
    if gradients:
        assert gradients[0].isfinite().all()
        scores = ~gradients[1].isfinite()
        assert scores.any()
        scores.view(2, -1, 5, 6)[0, :, 1:4, 2:5] = False
        assert not scores.any()


@BOTH
@pytest.mark.parametrize('value', [INF, NAN])
def test_a_weight_of_zero_does_not_hide_it(path, value):
    features = torch.ones(1, 1, 3, 3)
    features[0, 0, 1, 1] = value
    operator = path.carafe if path else carafe
    assert operator(features, torch.zeros(1, 9, 6, 6), 3).isnan().all()


@BOTH
@pytest.mark.parametrize(
    'normalizer, value, like',
    [
        ('softmax', NAN, NAN),
        ('softmax', INF, NAN),
        ('softmax', -INF, -1e300),
        ('sigmoid_normalized', NAN, NAN),
        ('sigmoid_normalized', INF, 1e300),
        ('sigmoid_normalized', -INF, -1e300),
        ('sigmoid', NAN, NAN),
        ('sigmoid', INF, 1e300),
        ('sigmoid', -INF, -1e300),
        (None, NAN, NAN),
        (None, INF, INF),
        (None, -INF, -INF),
    ],
)
def test_a_score_that_is_not_finite(path, normalizer, value, like):
    """It counts like a large one, or its output pixel is not finite."""
    case = Case(1, 4, 5, 6, 3, 2, 2)
    features = randn(*case.features_shape)
    logits = randn(*case.logits_shape)
    place = (9 + 4) * 4 + 1  # group 1, the centre tap, subpixel (0, 1)
    logits[0, place, 2, 3] = value
    out, *gradients = run_not_finite(path, features, logits, (normalizer,))
    finite = abs(like) < INF
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[0, 2:, 4, 7] = not finite  # pixel (2, 3), the channels of group 1
    assert torch.equal(~out.isfinite(), reached)
    assert torch.equal(out.isnan(), reached & (like != like))
    if finite:
        logits[0, place, 2, 3] = like
        expected = run_not_finite(path, features, logits, (normalizer,))
        for actual, wanted in zip([out, *gradients], expected):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    elif gradients:
        # a NaN reaches, through the sum, the weights of the whole window
        one_tap = normalizer in ('sigmoid', None)
        reached = torch.zeros_like(features, dtype=torch.bool)
        if one_tap:
            reached[0, 2:, 2, 3] = True
        else:
            reached[0, 2:, 1:4, 2:5] = True
        assert torch.equal(~gradients[0].isfinite(), reached)
        scores = (~gradients[1].isfinite()).view(2, 9, 4, 5, 6)
        found = scores[1, :, 1, 2, 3].sum()
        assert found == scores.sum()
        assert found == {'sigmoid': 1, None: 0}.get(normalizer, 9)


@BOTH
@all_options
def test_a_window_of_minus_infinities(path, options):
    """NaN where the normaliser divides by a sum, which is zero here."""
    features = randn(1, 1, 3, 4)
    logits = randn(1, 9, 3, 4)
    logits[0, :, 1, 2] = -INF
    operator = path.carafe_from_logits if path else carafe_from_logits
    out = operator(features, logits, 3, 1, 1, *options)
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[0, 0, 1, 2] = options[0] in (*reference.SUM_TO_ONE, None)
    assert torch.equal(~out.isfinite(), reached)


# Memory


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('scale_factor', [1, 2])
@pytest.mark.parametrize('path', ['operator', 'reference'])
def test_extra_memory_is_at_most_three_outputs(path, dtype, scale_factor):
    """Of any of the three operators, its own result apart."""
    case = Case(1, 256, 25, 42, s=scale_factor)
    features = randn(*case.features_shape, dtype=dtype)
    scores = reference.scores_from_logits(
        randn(*case.logits_shape, dtype=dtype), *case.arguments
    )
    if path == 'operator':
        op = torch.ops.mmcarafe
        forward, to_features, to_weights = (
            op.reassemble,
            op.reassemble_grad_features,
            op.reassemble_grad_weights,
        )
    else:
        forward, to_features, to_weights = (
            reference.reassemble,
            reference.reassemble_grad_features,
            reference.reassemble_grad_weights,
        )
    out = forward(features, scores, 'softmax')
    limit = 3 * out.nbytes
    grad = torch.ones_like(out)
    for run in (
        lambda: forward(features, scores, 'softmax'),
        lambda: to_features(grad, scores, 'softmax'),
        lambda: to_weights(grad, features, scores, 'softmax'),
    ):
        result = run()
        peak = peak_memory(run, result.device)
        assert peak >= result.nbytes  # the profiler has seen the operator
        assert peak - result.nbytes <= limit


def test_training_keeps_features_and_logits_alone():
    features = randn(1, 8, 5, 6).requires_grad_()
    logits = randn(1, 100, 5, 6).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        carafe_from_logits(features, logits, 5)
    assert {x.untyped_storage().data_ptr() for x in kept} == {
        features.data_ptr(),
        logits.data_ptr(),
    }


# How the operator sits in torch


@all_layouts
def test_output_keeps_the_memory_format(layout):
    features = layout(randn(2, 5, 4, 6))
    out = carafe_from_logits(features, randn(2, 100, 4, 6), 5)
    channels_last = features.stride(1) == 1
    assert out.is_contiguous(
        memory_format=torch.channels_last
        if channels_last
        else torch.contiguous_format
    )
    assert channels_last == (
        layout in (LAYOUTS['channels_last'], LAYOUTS['sliced_channels_last'])
    )


needs_opcheck = pytest.mark.skipif(
    not hasattr(torch.library, 'opcheck'), reason='opcheck came with torch 2.4'
)


@needs_opcheck
# opcheck itself reads .grad of what passes between two operators
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor')
# int() of the symbolic floats of torch < 2.9, as Python 3.11 and 3.12 see it
@pytest.mark.filterwarnings('ignore:The delegation of int:DeprecationWarning')
@all_layouts
@all_options
def test_opcheck(layout, options):
    features = layout(randn(2, 4, 3, 5)).requires_grad_()
    grad = layout(randn(2, 4, 6, 10)).requires_grad_()
    scores = reference.scores_from_logits(
        layout(randn(2, 200, 3, 5)), 5, 2, 2
    ).requires_grad_()
    op = torch.ops.mmcarafe
    for operator, inputs in (
        (op.reassemble, (features, scores)),
        (op.reassemble_grad_features, (grad, scores)),
        (op.reassemble_grad_weights, (grad, features, scores)),
    ):
        torch.library.opcheck(operator, (*inputs, *options))


@pytest.mark.skipif(
    torch.__version__.startswith('2.1.'),
    reason='torch 2.1 compiles no view of the shapes that this one takes',
)
@pytest.mark.parametrize(
    'operator, options',
    [
        (carafe, ()),
        (carafe_from_logits, ()),
        (carafe_from_logits, (1, 2, 'softmax', 'renormalize')),
        (carafe_from_logits, (1, 2, 'sigmoid_normalized', 'renormalize')),
    ],
)
def test_compiles_into_one_graph_with_dynamic_shapes(operator, options):
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend='aot_eager')
    for height, width in ((4, 6), (5, 6), (7, 9)):
        features = randn(2, 4, height, width)
        grad = randn(2, 4, 2 * height, 2 * width)
        if operator is carafe:
            weights = randn(2, 25, 2 * height, 2 * width)
        else:
            weights = randn(2, 100, height, width)
        arguments = features, weights, grad, 5, *options
        expected = forward_and_gradients(operator, *arguments)
        results = forward_and_gradients(compiled, *arguments)
        for result, eager in zip(results, expected):
            torch.testing.assert_close(result, eager)


def test_meta_tensors_give_shapes():
    out = carafe_from_logits(
        torch.empty(2, 4, 3, 5, device='meta'),
        torch.empty(2, 100, 3, 5, device='meta'),
        5,
    )
    assert out.is_meta and out.shape == (2, 4, 6, 10)


@pytest.mark.parametrize(
    'features_dtype, logits_dtype, expected',
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_autocast_takes_the_wider_dtype(
    features_dtype, logits_dtype, expected
):
    features = randn(1, 4, 3, 5, dtype=features_dtype).requires_grad_()
    logits = randn(1, 100, 3, 5, dtype=logits_dtype).requires_grad_()
    for options in OPTIONS.values():
        arguments = 5, 1, 2, *options
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = carafe_from_logits(features, logits, *arguments)
        assert out.dtype == expected
        gradients = torch.autograd.grad(out.sum(), (features, logits))
        assert [x.dtype for x in gradients] == [features_dtype, logits_dtype]
        wide = features.to(expected), logits.to(expected)
        assert torch.equal(out, carafe_from_logits(*wide, *arguments))


# torch 2.4 checkpoints by a name that it deprecates itself.
@pytest.mark.filterwarnings('ignore:`torch.cpu.amp.autocast:FutureWarning')
def test_activation_checkpointing():
    features = randn(1, 4, 3, 5).requires_grad_()
    logits = randn(1, 100, 3, 5).requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        carafe_from_logits, features, logits, 5, use_reentrant=False
    )
    expected = carafe_from_logits(features, logits, 5)
    assert torch.equal(out, expected)
    inputs = (features, logits)
    for again, once in zip(
        torch.autograd.grad(out.sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
    ):
        assert torch.equal(again, once)


# Bad input: argument, what was expected, what came

X = torch.zeros(2, 4, 3, 5)
MASKS = torch.zeros(2, 25, 6, 10)
LOGITS = torch.zeros(2, 100, 3, 5)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(features=[1]), 'features is a list, expected a Tensor'),
        (
            dict(features=X[0]),
            r'features has 3 dimensions \(4, 3, 5\), expected 4',
        ),
        (dict(features=X.int()), 'features has dtype torch.int32, expected'),
        (
            dict(features=X[:, :, :0], logits=LOGITS[:, :, :0]),
            r'features has shape \(2, 4, 0, 5\), expected C, H and W >= 1',
        ),
        (dict(logits=None), 'logits is a NoneType, expected a Tensor'),
        (dict(logits=LOGITS[0]), 'logits has 3 dimensions'),
        (dict(logits=LOGITS.long()), 'logits has dtype torch.int64, expected'),
        (
            dict(logits=LOGITS.double()),
            'logits has dtype torch.float64, expected torch.float32',
        ),
        (
            dict(logits=LOGITS.to('meta')),
            'logits is on meta, expected cpu, where features is',
        ),
        (dict(logits=LOGITS[:1]), 'logits has batch size 1, expected 2'),
        (
            dict(logits=LOGITS[:, 1:]),
            r'logits has 99 channels, expected G\*K\*K\*S\*S = 100',
        ),
        (
            dict(logits=LOGITS[:, :, 1:]),
            r'logits has size \(2, 5\), expected \(H, W\) = \(3, 5\)',
        ),
        (dict(kernel_size=4), 'kernel_size is 4, expected an odd int >= 1'),
        (dict(kernel_size=-1), 'kernel_size is -1, expected an odd int >= 1'),
        (dict(kernel_size=5.0), 'kernel_size is a float, expected an odd int'),
        (dict(kernel_size=True), 'kernel_size is a bool, expected an odd int'),
        (dict(group_size=0), 'group_size is 0, expected an int >= 1'),
        (
            dict(group_size=3),
            'features has 4 channels, expected a multiple of group_size = 3',
        ),
        (dict(scale_factor=0), 'scale_factor is 0, expected an int >= 1'),
        (dict(scale_factor=1.5), 'scale_factor is a float, expected an int'),
        (
            dict(normalizer='tanh'),
            "normalizer is 'tanh', expected one of .*softmax",
        ),
        (dict(border='mirror'), "border is 'mirror', expected one of .*zeros"),
        (
            dict(border='renormalize', normalizer='sigmoid'),
            "border is 'renormalize' and normalizer 'sigmoid', expected",
        ),
        (
            dict(border='renormalize', normalizer=None),
            "border is 'renormalize' and normalizer None, expected one of",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_bad_input_of_carafe_from_logits(changes, message):
    arguments = dict(features=X, logits=LOGITS, kernel_size=5)
    with pytest.raises((TypeError, ValueError), match=message):
        carafe_from_logits(**{**arguments, **changes})


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            dict(masks=MASKS[:, 1:]),
            r'masks has 24 channels, expected G\*K\*K = 25',
        ),
        (
            dict(masks=MASKS[..., 1:]),
            r'masks has size \(6, 9\), expected \(S\*H, S\*W\) = \(6, 10\)',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_bad_input_of_carafe(changes, message):
    arguments = dict(features=X, masks=MASKS, kernel_size=5)
    with pytest.raises((TypeError, ValueError), match=message):
        carafe(**{**arguments, **changes})


# An unknown normaliser or border ends in an error that names it on every path,
# also on those that the public functions' checks stand before.

SCORES = reference.scores_from_logits(LOGITS, 5, 1, 2)
HIGH = torch.rand(2, 4, 6, 10)
OPERATORS = {
    'reassemble': (X, SCORES),
    'reassemble_grad_features': (HIGH, SCORES),
    'reassemble_grad_weights': (HIGH, X, SCORES),
}
UNKNOWN = {
    ('tanh', 'zeros'): "^normalizer is 'tanh', expected one of .*sigmoid",
    ('softmax', 'tanh'): "^border is 'tanh', expected one of .*renormalize",
}
all_unknown = pytest.mark.parametrize(
    'options, message', UNKNOWN.items(), ids=['normalizer', 'border']
)
all_operators = pytest.mark.parametrize('name', OPERATORS)


@all_unknown
@all_operators
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('who', ['reference', 'triton', *cpu.CAPABILITIES])
def test_unknown_option_of_who_answers(who, dtype, name, options, message):
    answers = {'reference': reference, 'triton': triton}.get(who)
    if answers is None:
        if who not in cpu.runnable() or cpu.find(who) is None:
            pytest.skip(f'no library for {who}, or no machine that runs it')
        answers = cpu.Library(cpu.find(who))
    tensors = [x.to(dtype) for x in OPERATORS[name]]
    with pytest.raises(ValueError, match=message):
        getattr(answers, name)(*tensors, *options)


@all_unknown
@all_operators
@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('batch', [0, 2])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_unknown_option_of_an_operator(
    device, batch, requires_grad, name, options, message
):
    tensors = [
        x[:batch].detach().to(device).requires_grad_(requires_grad)
        for x in OPERATORS[name]
    ]
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.mmcarafe, name)(*tensors, *options)


@all_unknown
def test_unknown_option_of_the_export(options, message):
    with pytest.raises(ValueError, match=message):
        export.reassemble(X, SCORES, *options, 5, 1, 2)


def test_unknown_option_of_the_reference_parts():
    normalizer, border = UNKNOWN.values()
    with pytest.raises(ValueError, match=normalizer):
        reference.normalize(SCORES, 'tanh')
    with pytest.raises(ValueError, match=normalizer):
        reference.normalize_backward(SCORES, SCORES, 'tanh')
    with pytest.raises(ValueError, match=border):
        reference.exclude_outside(SCORES, 'tanh')


@pytest.mark.parametrize('name', ['normalizer', 'border', 'init'])
def test_unknown_option_of_the_module(name):
    with pytest.raises(ValueError, match=f"^{name} is 'tanh', expected one"):
        CARAFE(4, **{name: 'tanh'})


@pytest.mark.parametrize('name', ['normalizer', 'border', 'init'])
def test_unknown_option_that_was_set_later(name):
    """It is found when it counts."""
    module = CARAFE(4, init='bilinear')
    setattr(module, name, 'tanh')
    runs = {'init': [module.init_weights], 'border': [lambda: module(X)]}
    both = [module.init_weights, lambda: module(X)]
    for run in runs.get(name, both):
        with pytest.raises(ValueError, match=f"^{name} is 'tanh', expected"):
            run()
