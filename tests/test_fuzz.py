"""Random shapes, layouts and values, drawn by hypothesis, on every CPU path.

`make test` draws the same 2,000 examples each time. For others, and more::

    MMCARAFE_FUZZ=100000 python -m pytest tests/test_fuzz.py

Values that are not finite reach the outputs that they reach in the reference,
and no others; only whether these are infinite or NaN may differ.
"""

import importlib.util
import io
import os
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from cases import LAYOUTS, OPTIONS, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcarafe.ops import carafe_from_logits, cpu, reference

pytestmark = pytest.mark.usefixtures('one_thread')
EXAMPLES = int(os.environ.get('MMCARAFE_FUZZ', 0))
fuzz = settings(
    max_examples=EXAMPLES or 2000,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MOST = 100_000  # products of one example, which bounds its time
LIBRARIES = {
    name: cpu.Library(cpu.find(name))
    for name in cpu.runnable()
    if cpu.find(name)
}


class Values(NamedTuple):
    """What a tensor is filled with: noise of a scale, and odd values."""

    scale: float
    odd: 'tuple[float, ...]'
    layout: str
    same: bool  # one image for the whole batch, by a stride of zero


NOT_FINITE = (float('inf'), float('-inf'), float('nan'))
# the smallest and the largest that all dtypes tell from 0 and infinity,
# denormals of fp16, fp32 and bf16, and zeros
ODD = (6e-8, 6e4, -6e4, 1e-40, -1e-40, 1e-30, 0.0, -0.0)


def values(scales):
    return st.builds(
        Values,
        st.sampled_from(scales),
        st.lists(st.sampled_from(ODD + NOT_FINITE), max_size=3).map(tuple)
        | st.just(()),
        st.sampled_from(sorted(LAYOUTS)),
        st.booleans(),
    )


@st.composite
def cases(draw):
    """A case of at most ``MOST`` products."""
    k = draw(st.sampled_from((1, 3, 3, 5, 5, 7, 13)))
    s = draw(st.integers(1, 4))
    g = draw(st.integers(1, 4))
    n = draw(st.sampled_from((1, 1, 1, 2, 3, 0)))
    left = MOST // (k * k * s * s * g * max(n, 1))
    h = draw(st.integers(1, min(40, left)))
    w = draw(st.integers(1, min(90, left // h)))
    c = draw(st.integers(1, min(40, max(1, left // (h * w)))))
    return Case(n, g * c, h, w, k, g, s)


def fill(shape, how, dtype, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = (how.scale * x).flatten()
    for value in how.odd if x.numel() else ():
        x[torch.randint(x.numel(), (1,), generator=generator)] = value
    x = LAYOUTS[how.layout](x.view(shape).to(dtype))
    return x[:1].expand(shape) if how.same and shape[0] else x


def run(operators, features, scores, grad, options):
    return (
        operators.reassemble(features, scores, *options),
        operators.reassemble_grad_features(grad, scores, *options),
        operators.reassemble_grad_weights(grad, features, scores, *options),
    )


def bounds(case, features, scores, grad, options):
    """Sums of absolute values behind each element of the results.

    Those of the weights' gradient have one bound, since each is less the mean
    of others where the weights are divided by their sum.
    """
    x, g = (t.nan_to_num(0, 0, 0).abs() for t in (features, grad))
    w = scores.abs() if options[0] is None else scores
    largest = [t.max().item() if t.numel() else 0 for t in (x, g)]
    return (
        reference.reassemble(x, w, *options),
        reference.reassemble_grad_features(g, w, *options),
        2 * largest[0] * largest[1] * case.c / case.g,
    )


def check(result, rounded, exact, bound):
    """As exact as sums in fp32 (fp64 for fp64) can be, rounded to the dtype.

    Args:
        result (Tensor): of the path that is tested.
        rounded (Tensor): of the reference in the same dtype.
        exact (Tensor): of the reference in fp64, from the same inputs.
        bound (Tensor | float): on the sums of absolute values.
    """
    assert result.dtype == rounded.dtype
    assert result.shape == rounded.shape
    assert result.stride() == rounded.stride()
    finite = rounded.isfinite()
    # a sum that rounds to infinity in one order may just not in another
    edge = torch.finfo(result.dtype).max * 0.99 < exact.abs()
    assert (result.isfinite() == finite)[~edge].all()
    sure = finite & ~edge & exact.isfinite()
    wide = torch.float64 if result.dtype == torch.float64 else torch.float32
    # 16 roundings of the sum, and one of the result
    allowed = 16 * torch.finfo(wide).eps * bound
    allowed = allowed + torch.finfo(result.dtype).eps * exact.abs()
    # denormals of the dtype round to its smallest step
    allowed = allowed + torch.finfo(result.dtype).smallest_normal
    error = (result.double() - exact).abs()
    assert (error <= allowed)[sure].all(), (error - allowed)[sure].max()


@fuzz
@given(
    case=cases(),
    dtype=st.sampled_from(reference.DTYPES),
    options=st.sampled_from(sorted(OPTIONS)),
    masks=st.booleans(),
    features=values((1, 1e-3, 30)),
    scores=values((1, 10, 1e-3, 1e30)),
    grad=values((1, 1e-3, 30)),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.skipif(not LIBRARIES, reason='the CPU library was not compiled')
def test_compiled_library(
    case, dtype, options, masks, features, scores, grad, seed
):
    generator = torch.Generator().manual_seed(seed)
    options = (None, 'zeros') if masks else OPTIONS[options]
    if masks:  # weights of 1e30 are nobody's
        scores = scores._replace(scale=min(scores.scale, 1))
    shape = case.masks_shape if masks else case.logits_shape
    view = (
        reference.scores_from_masks if masks else reference.scores_from_logits
    )
    out_shape = case.n, case.c, case.s * case.h, case.s * case.w
    tensors = (
        fill(case.features_shape, features, dtype, generator),
        view(fill(shape, scores, dtype, generator), *case.arguments),
        fill(out_shape, grad, dtype, generator),
    )
    doubles = [tensor.double() for tensor in tensors]
    rounded = run(reference, *tensors, options)
    exact = run(reference, *doubles, options)
    summed = bounds(case, *doubles, options)
    for library in LIBRARIES.values():
        results = run(library, *tensors, options)
        for each in zip(results, rounded, exact, summed):
            check(*each)


class Exported(torch.nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        self.arguments = arguments

    def forward(self, features, logits):
        return carafe_from_logits(features, logits, *self.arguments)


@lru_cache(maxsize=None)
def session(k, g, s, options):
    """The operator in onnxruntime, for any batch and size."""
    import onnxruntime

    case = Case(2, 3 * g, 5, 6, k, g, s)
    tensors = torch.randn(case.features_shape), torch.randn(case.logits_shape)
    file = io.BytesIO()
    names = ['features', 'logits']
    torch.onnx.export(
        Exported(k, g, s, *options),
        tensors,
        file,
        input_names=names,
        dynamic_axes={name: {0: 'n', 2: 'h', 3: 'w'} for name in names},
        opset_version=17,
        dynamo=False,
    )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), settings)


@settings(fuzz, max_examples=max(200, EXAMPLES // 10))
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 30),
    w=st.integers(1, 30),
    kgs=st.sampled_from(((1, 1, 2), (3, 2, 3), (5, 1, 2), (7, 3, 1))),
    options=st.sampled_from(sorted(OPTIONS)),
    features=values((1, 1e-3, 30)),
    logits=values((1, 10, 1e-3, 1e30)),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.skipif(
    importlib.util.find_spec('onnxruntime') is None,
    reason='onnxruntime is not installed',
)
@pytest.mark.filterwarnings('ignore')  # of torch's older exporter
def test_exported_graph(n, h, w, kgs, options, features, logits, seed):
    """Of values that are finite: outside the map the graph reads 0 times w."""
    k, g, s = kgs
    case = Case(n, 3 * g, h, w, k, g, s)
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        fill(shape, how, torch.float32, generator).nan_to_num(1, 2, -2)
        for shape, how in (
            (case.features_shape, features),
            (case.logits_shape, logits),
        )
    ]
    doubles = [tensor.double() for tensor in tensors]
    options = OPTIONS[options]
    if options[0] is None:  # weights of 1e30 are nobody's
        tensors[1], doubles[1] = (
            x.clamp(-10, 10) for x in (tensors[1], doubles[1])
        )
    rounded, exact = (
        reference.carafe_from_logits(*each, *case.arguments, *options)
        for each in (tensors, doubles)
    )
    # onnxruntime's weights are as exact as their largest value, 1
    x, w = doubles[0].abs(), doubles[1].abs()
    w = w if options[0] is None else torch.ones_like(w)
    bound = reference.carafe_from_logits(x, w, *case.arguments, None, 'zeros')
    (found,) = session(*kgs, options).run(
        None,
        {
            name: x.contiguous().numpy()
            for name, x in zip(('features', 'logits'), tensors)
        },
    )
    check(torch.from_numpy(found), rounded.contiguous(), exact, bound)
