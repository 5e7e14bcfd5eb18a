"""Similarities of output pixels and windows, against plain PyTorch."""

import pytest
import torch
from _measure import peak_memory
from cases import (
    all_cases,
    all_dtypes,
    all_layouts,
    assert_as_exact_as,
    randn,
)
from torch.nn import functional as F

from mmcarafe.ops import carafe, window_similarity


def plain(query, key, kernel_size, group_size, scale_factor):
    """Windows of the key, unfolded, times the pixels of the query."""
    n, channels, height, width = key.shape
    if n == 0:
        return query.new_empty(
            0, group_size * kernel_size**2, *query.shape[2:]
        )
    windows = F.unfold(key, kernel_size, padding=kernel_size // 2)
    windows = windows.view(
        n, group_size, -1, kernel_size**2, height, width
    )  # [N, G, C/G, K*K, H, W]
    for dim in (-2, -1):
        windows = windows.repeat_interleave(scale_factor, dim)
    query = query.view(n, group_size, -1, 1, *query.shape[2:])
    return (query * windows).sum(2).flatten(1, 2)  # [N, G*K*K, S*H, S*W]


def high_shape(case):
    return (case.n, case.c, case.s * case.h, case.s * case.w)


@all_cases
@all_dtypes
@all_layouts
def test_equals_unfolded_windows(case, dtype, layout):
    query = layout(randn(*high_shape(case), dtype=dtype))
    key = layout(randn(*case.features_shape, dtype=dtype))
    out = window_similarity(query, key, *case.arguments)
    exact = plain(
        query.double().contiguous(), key.double().contiguous(), *case.arguments
    )
    reference = plain(
        query.float().contiguous(), key.float().contiguous(), *case.arguments
    ).to(dtype)
    assert_as_exact_as(out, reference, exact)


@all_cases
def test_is_the_gradient_of_the_masks(case):
    key, grad = randn(*case.features_shape), randn(*high_shape(case))
    masks = randn(*case.masks_shape).requires_grad_()
    out = carafe(key, masks, *case.arguments)
    (expected,) = torch.autograd.grad(out, masks, grad)
    ours = window_similarity(grad, key, *case.arguments)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_gradients_of_first_and_second_order():
    query = randn(2, 4, 4, 6).requires_grad_()
    key = randn(2, 4, 2, 3).requires_grad_()

    def function(query, key):
        return window_similarity(query, key, 3, 2, 2)

    assert torch.autograd.gradcheck(function, (query, key))
    assert torch.autograd.gradgradcheck(function, (query, key))


@pytest.mark.skipif(
    torch.__version__.startswith('2.1.'),
    reason='torch 2.1 compiles no sizes that are squares of others',
)
def test_compiles_into_one_graph_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(
        window_similarity, fullgraph=True, dynamic=True, backend='aot_eager'
    )
    for height, width in ((4, 6), (5, 3)):
        query = torch.randn(2, 4, 2 * height, 2 * width, requires_grad=True)
        key = torch.randn(2, 4, height, width, requires_grad=True)
        grads = []
        for function in (compiled, window_similarity):
            out = function(query, key, 3)
            grads.append(torch.autograd.grad(out.square().sum(), (query, key)))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize('narrow', ['query', 'key'])
def test_autocast_takes_the_wider_dtype(narrow):
    query, key = randn(1, 4, 4, 6).float(), randn(1, 4, 2, 3).float()
    if narrow == 'query':
        query = query.bfloat16()
    else:
        key = key.bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        out = window_similarity(query, key, 3)
    expected = window_similarity(query.float(), key.float(), 3)
    assert torch.equal(out, expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('requires_grad', [False, True])
def test_memory_has_no_unfolded_windows(requires_grad, dtype):
    """Unfolded, the key alone would be 6 times the query."""
    options = dict(dtype=dtype, requires_grad=requires_grad)
    query = torch.randn(1, 256, 32, 64, **options)
    key = torch.randn(1, 256, 16, 32, **options)

    def run():
        out = window_similarity(query, key, 5)
        if requires_grad:
            out.sum().backward()
        return out

    peak = peak_memory(run, query.device)
    # Gradients of both inputs and the result: 1.35 times the query.
    assert 0 < peak <= 1.8 * query.nbytes


@pytest.mark.parametrize(
    ('query', 'key', 'arguments', 'error', 'message'),
    [
        ((1, 4, 4, 6), (1, 4, 2, 3), (4,), ValueError, 'kernel_size is 4'),
        (
            (1, 5, 4, 6),
            (1, 4, 2, 3),
            (3,),
            ValueError,
            'query has 5 channels, expected C = 4',
        ),
        (
            (1, 4, 4, 5),
            (1, 4, 2, 3),
            (3,),
            ValueError,
            r'query has size \(4, 5\), expected \(S\*H, S\*W\) = \(4, 6\)',
        ),
        (
            (2, 4, 4, 6),
            (1, 4, 2, 3),
            (3,),
            ValueError,
            'query has batch size 2, expected 1, as key',
        ),
        (
            (1, 4, 4, 6),
            (1, 4, 2, 3),
            (3, 3),
            ValueError,
            'key has 4 channels, expected a multiple of group_size = 3',
        ),
        (
            (1, 4, 4, 6),
            (4, 2, 3),
            (3,),
            ValueError,
            'key has 3 dimensions',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_bad_shapes(query, key, arguments, error, message):
    with pytest.raises(error, match=message):
        window_similarity(torch.zeros(query), torch.zeros(key), *arguments)


def test_bad_dtypes():
    query, key = torch.zeros(1, 4, 4, 6), torch.zeros(1, 4, 2, 3)
    with pytest.raises(TypeError, match='query has dtype .*, as key'):
        window_similarity(query, key.double(), 3)
    with pytest.raises(TypeError, match='key has dtype torch.int64, expected'):
        window_similarity(query, key.long(), 3)
