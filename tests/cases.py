"""Shapes with a reason, and their inputs, to test every implementation."""

from typing import NamedTuple

import pytest
import torch

from mmcarafe.ops.reference import BORDERS, DTYPES, NORMALIZERS, SUM_TO_ONE


class Case(NamedTuple):
    """Letters are those of :mod:`mmcarafe.ops.carafe`."""

    n: int
    c: int
    h: int
    w: int
    k: int = 5
    g: int = 1
    s: int = 2

    @property
    def arguments(self):
        return self.k, self.g, self.s

    @property
    def features_shape(self):
        return self.n, self.c, self.h, self.w

    @property
    def logits_shape(self):
        return self.n, self.g * self.k**2 * self.s**2, self.h, self.w

    @property
    def masks_shape(self):
        return self.n, self.g * self.k**2, self.s * self.h, self.s * self.w


CASES = {
    'the-paper': Case(2, 8, 6, 7),
    'k3': Case(1, 4, 5, 6, k=3),
    'k1-is-nearest': Case(1, 3, 4, 5, k=1),
    'k7-wider-than-map': Case(1, 3, 2, 3, k=7),
    'groups-2': Case(2, 6, 4, 5, g=2),
    'groups-4-k3': Case(1, 8, 5, 4, k=3, g=4),
    's1-filters-only': Case(1, 4, 5, 6, s=1),
    's3': Case(1, 4, 3, 5, k=3, s=3),
    's4-groups': Case(1, 4, 3, 3, g=2, s=4),
    'one-row': Case(2, 5, 1, 7),
    'one-column': Case(1, 5, 7, 1, k=3),
    'one-pixel': Case(1, 2, 1, 1),
    'c-not-a-power-of-two': Case(1, 37, 4, 9),
    'c-above-a-chunk': Case(1, 35, 5, 19, s=2),
    'c-of-whole-cache-lines': Case(1, 32, 3, 19),
    'empty-batch': Case(0, 4, 3, 5),
}
all_cases = pytest.mark.parametrize('case', CASES.values(), ids=CASES)

# Every normaliser and border that go together, as arguments of the operators.
OPTIONS = {
    f'{normalizer}-{border}': (normalizer, border)
    for normalizer in NORMALIZERS
    for border in BORDERS
    if border == 'zeros' or normalizer in SUM_TO_ONE
}
all_options = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)

all_dtypes = pytest.mark.parametrize(
    'dtype', DTYPES, ids=lambda dtype: str(dtype)[6:]
)

# For layers, not for the operator, which has its own kernels.
all_16_bits = pytest.mark.parametrize(
    'dtype',
    [
        torch.bfloat16,
        pytest.param(
            torch.float16,
            marks=pytest.mark.skipif(
                torch.__version__.startswith('2.1.'),
                reason='torch 2.1 has no convolution or autocast in fp16 '
                'on a CPU',
            ),
        ),
    ],
    ids=str,
)


def _sliced(x):
    """The same values in the middle of a larger tensor."""
    big = x.new_full([size + 3 for size in x.shape], torch.nan)
    view = big[tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'sliced': _sliced,
    'sliced_channels_last': lambda x: _sliced(
        x.permute(0, 2, 3, 1)  # [N, H, W, C]
    ).permute(0, 3, 1, 2),
}
all_layouts = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)


def randn(*shape, dtype=torch.float64, device='cpu'):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def part(x, row, column, around, scale):
    """The 4×4 source pixels from (row, column) on, and those around them."""
    rows = slice(max(0, row - around) * scale, (row + 4 + around) * scale)
    columns = slice(
        max(0, column - around) * scale, (column + 4 + around) * scale
    )
    return x[..., rows, columns]


def forward_and_gradients(operator, features, weights, grad, *arguments):
    """Output, gradient of features, gradient of weights."""
    features = features.detach().requires_grad_()
    weights = weights.detach().requires_grad_()
    out = operator(features, weights, *arguments)
    return (
        out.detach(),
        *torch.autograd.grad(out, (features, weights), grad.to(out)),
    )


def assert_as_exact_as(actual, reference, exact):
    """fp64 to 1e-10, fp32 to torch's defaults, fp16 and bf16 by their error.

    A 16-bit result may be at most twice as far from the fp64 result as the
    reference's own result in the same dtype.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == reference.dtype
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-10)
    elif actual.dtype == torch.float32:
        torch.testing.assert_close(actual, exact.float())
    elif exact.numel():
        error = (actual.double() - exact).abs().max()
        allowed = 2 * (reference.double() - exact).abs().max()
        assert error <= allowed
