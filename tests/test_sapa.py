"""SAPA against a plain formulation, in fp64."""

import copy

import pytest
import torch
from _measure import peak_memory
from cases import all_16_bits
from test_window_similarity import plain
from torch import nn
from torch.nn import functional as F

from mmcarafe import SAPA
from mmcarafe.upsamplers import build_upsampler

VARIANTS = {
    'paper': dict(),
    'times-3': dict(scale_factor=3, up_kernel=3),
    'no-projection': dict(guide_channels=12, embedding_channels=None),
}
all_variants = pytest.mark.parametrize(
    'arguments', VARIANTS.values(), ids=VARIANTS
)


def sharp(arguments, dtype=torch.float64):
    """A module whose weights differ from tap to tap, and its inputs."""
    module = SAPA(12, **{'guide_channels': 6, **arguments}).to(dtype)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean='norm' in name, std=0.5)
    s, guide = module.scale_factor, module.norm_y.num_channels
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64).to(dtype)
    y = torch.randn(2, guide, 5 * s, 7 * s, dtype=torch.float64).to(dtype)
    return module, x.requires_grad_(), y.requires_grad_()


def unfolded(module, x, y):
    """The paper's equations on windows that are copied."""
    s, k = module.scale_factor, module.up_kernel
    groups = module.norm_y.num_groups, module.norm_x.num_groups
    q = F.group_norm(y, groups[0], module.norm_y.weight, module.norm_y.bias)
    p = F.group_norm(x, groups[1], module.norm_x.weight, module.norm_x.bias)
    if module.q is not None:
        q = F.conv2d(q, module.q.weight, module.q.bias)
        p = F.conv2d(p, module.k.weight, module.k.bias)
    weights = plain(q, p, k, 1, s).softmax(1)  # [N, K*K, S*H, S*W]
    windows = F.unfold(x, k, padding=k // 2).view(
        *x.shape[:2], k * k, *x.shape[2:]
    )
    for dim in (-2, -1):
        windows = windows.repeat_interleave(s, dim)
    return (windows * weights[:, None]).sum(2)


@all_variants
def test_output_and_gradients_are_the_papers(arguments):
    module, x, y = sharp(arguments)
    inputs = [x, y, *module.parameters()]
    outs = module(x, y), unfolded(module, x, y)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-10)
    grad = torch.randn_like(outs[0])
    for ours, theirs in zip(
        *(torch.autograd.grad(out, inputs, grad) for out in outs)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_second_order():
    module = SAPA(4, up_kernel=3, embedding_channels=2).double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, (x, y))


# As the public implementation names and shapes them.
PUBLISHED = {
    'norm_y.weight': (256,),
    'norm_y.bias': (256,),
    'norm_x.weight': (128,),
    'norm_x.bias': (128,),
    'q.weight': (32, 256, 1, 1),
    'q.bias': (32,),
    'k.weight': (32, 128, 1, 1),
    'k.bias': (32,),
}


def test_published_state_dicts_load():
    module = SAPA(128, 256)
    assert module.norm_y.num_groups == module.norm_x.num_groups == 32
    state = {name: torch.randn(shape) for name, shape in PUBLISHED.items()}
    module.load_state_dict(state, strict=True)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[name])


def test_parameters():
    module = SAPA(256)
    assert sum(p.numel() for p in module.parameters()) == 17_472


@all_16_bits
@pytest.mark.parametrize('autocast', [False, True])
def test_16_bits(dtype, autocast):
    """As exact as the plain formulation in the same dtype."""
    module, x, y = sharp(dict(), dtype)
    exact = unfolded(copy.deepcopy(module).double(), x.double(), y.double())
    if autocast:
        module, x, y = module.float(), x.float(), y.float()
    with torch.autocast('cpu', dtype, enabled=autocast):
        out, reference = module(x, y), unfolded(module, x, y)
    error = (out - exact).abs().max()
    assert error <= 2 * (reference - exact).abs().max()
    inputs = [*module.parameters(), x, y]
    for grad in torch.autograd.grad(out.float().sum(), inputs):
        assert grad.isfinite().all() and grad.any()


def test_channels_last_goes_through():
    module, x, y = sharp(dict())
    last = dict(memory_format=torch.channels_last)
    out = module(x.contiguous(**last), y.contiguous(**last))
    assert out.is_contiguous(**last)
    torch.testing.assert_close(out, module(x, y))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    module, x, y = sharp(dict())
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x, y), module(x, y))


def test_memory_has_no_unfolded_features():
    """Unfolded to the output's size, they would be 25 times the output."""
    module = SAPA(256)
    x, y = torch.randn(1, 256, 16, 32), torch.randn(1, 256, 32, 64)
    x.requires_grad_(), y.requires_grad_()
    peak = peak_memory(lambda: module(x, y).sum().backward(), x.device)
    assert 0 < peak < 5 * y.nbytes


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(up_kernel=4), 'up_kernel is 4, expected an odd int'),
        (dict(scale_factor=0), 'scale_factor is 0'),
        (dict(embedding_channels=0), 'embedding_channels is 0'),
        (
            dict(guide_channels=6, embedding_channels=None),
            'guide_channels is 6 and embedding_channels None, expected',
        ),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAPA(8, **arguments)


@pytest.mark.parametrize(
    ('x', 'guide', 'message'),
    [
        ((1, 8, 3, 3), (1, 8, 5, 6), r'guide has shape \(1, 8, 5, 6\), exp'),
        ((1, 8, 3, 3), (1, 6, 6, 6), r'guide has shape \(1, 6, 6, 6\), exp'),
        ((1, 6, 3, 3), (1, 8, 6, 6), 'x has 6 channels, expected in_channels'),
        ((8, 3, 3), (1, 8, 6, 6), 'x has 3 dimensions'),
    ],
    ids=str,
)
def test_bad_inputs(x, guide, message):
    with pytest.raises(ValueError, match=message):
        SAPA(8)(torch.zeros(x), torch.zeros(guide))


def test_one_pixel():
    """Also where a group of the norm has one channel: it becomes zero."""
    x = torch.randn(1, 8, 1, 1)
    out = SAPA(8)(x, torch.randn(1, 8, 2, 2))
    # All taps have the same score, and only one of 25 is inside.
    torch.testing.assert_close(out, (x / 25).expand(1, 8, 2, 2))


def test_by_its_name():
    module = build_upsampler('mmcarafe.SAPA', 8, guide_channels=6)
    assert isinstance(module, SAPA)
    assert module.norm_y.num_channels == 6
    with pytest.raises(ValueError, match='wants a guide, .* none here'):
        build_upsampler('mmcarafe.SAPA', 8, name='fpn_upsample_cfg')
