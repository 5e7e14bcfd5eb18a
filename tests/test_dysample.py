"""DySample against the published formulation, in fp64."""

import pytest
import torch
from cases import all_16_bits
from torch import nn
from torch.nn import functional as F

from mmcarafe import DySample
from mmcarafe.upsamplers import build_upsampler

VARIANTS = {
    'lp': dict(),
    'lp+': dict(dyscope=True),
    'pl': dict(style='pl'),
    'pl+': dict(style='pl', dyscope=True),
    'times-3': dict(scale_factor=3, dyscope=True),
    'times-3-pl': dict(scale_factor=3, style='pl'),
    'one-group': dict(groups=1),
}
all_variants = pytest.mark.parametrize(
    'arguments', VARIANTS.values(), ids=VARIANTS
)


def far(arguments, channels=36, dtype=torch.float64):
    """A module that reads up to some pixels away, also beyond the border."""
    module = DySample(channels, **arguments).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def published(module, x):
    """Offsets of all subpixels as channels, and a grid of source pixels."""
    s, g = module.scale_factor, module.groups
    source = F.pixel_shuffle(x, s) if module.style == 'pl' else x
    offset = module.offset(source) * 0.25
    if module.dyscope:
        offset = 2 * offset * module.scope(source).sigmoid()
    if module.style == 'pl':
        offset = F.pixel_unshuffle(offset, s)
    return sampled(x, offset, s, g)


def sampled(x, offset, s, g):
    """Read ``x`` where the offsets ``[N, 2*G*S*S, H, W]`` say.

    They are in pixels of a map of H×W; x may have another size.
    """
    n, _, h, w = offset.shape
    offset = offset.view(n, 2, g, s, s, h, w)
    steps = (torch.arange(s) - (s - 1) / 2).to(x) / s
    px = torch.arange(w).to(x) + steps.view(s, 1, 1) + offset[:, 0]
    py = torch.arange(h).to(x).view(h, 1) + steps.view(s, 1, 1, 1)
    py = py + offset[:, 1]
    # [N, G, S, S, H, W] -> [N*G, S*H, S*W]
    px, py = (
        p.permute(0, 1, 4, 2, 5, 3).reshape(n * g, s * h, s * w)
        for p in (px, py)
    )
    grid = torch.stack(((2 * px + 1) / w - 1, (2 * py + 1) / h - 1), -1)
    maps = x.reshape(n * g, -1, *x.shape[2:])
    out = F.grid_sample(maps, grid, 'bilinear', 'border', False)
    return out.view(n, -1, s * h, s * w)


@all_variants
@pytest.mark.parametrize('size', [(5, 7), (1, 1), (1, 9)], ids=str)
def test_output_and_gradients_are_the_published_ones(arguments, size):
    module = far(arguments)
    x = torch.randn(2, 36, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    outs = module(x), published(module, x)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-10)
    grad = torch.randn_like(outs[0])
    for ours, theirs in zip(
        *(torch.autograd.grad(out, inputs, grad) for out in outs)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@all_variants
def test_reading_is_sampling(arguments, monkeypatch):
    """What is exported, and what runs on a GPU that must be deterministic."""
    module = far(arguments)
    x = torch.randn(2, 36, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    outs = [module(x)]
    monkeypatch.setattr(torch.onnx, 'is_in_onnx_export', lambda: True)
    outs.append(module(x))
    assert 'Gather' not in str(outs[0].grad_fn.next_functions)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-10)
    grad = torch.randn_like(outs[0])
    for sampled, read in zip(
        *(torch.autograd.grad(out, inputs, grad) for out in outs)
    ):
        torch.testing.assert_close(sampled, read, rtol=0, atol=1e-8)


@pytest.mark.usefixtures('one_thread')
@all_variants
def test_gradients_of_first_and_second_order(arguments):
    # the fewest that 4 groups and, in style 'pl', all subpixels divide
    channels = 4 if arguments != VARIANTS['times-3-pl'] else 36
    module = far(arguments, channels)
    x = torch.randn(1, channels, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize(
    ('arguments', 'count'),
    [
        (dict(), 8_224),
        (dict(dyscope=True), 16_416),
        (dict(style='pl'), 520),
    ],
    ids=str,
)
def test_parameters_are_the_papers(arguments, count):
    module = DySample(256, **arguments)
    assert sum(p.numel() for p in module.parameters()) == count


@all_variants
def test_starts_close_to_bilinear(arguments):
    """On a map whose neighbours differ by at most 1/20."""
    module = DySample(36, **arguments)
    y, x = torch.meshgrid(
        torch.linspace(0, 1, 21), torch.linspace(0, 1, 31), indexing='ij'
    )
    maps = torch.stack([y * (c + 1) + x * (36 - c) for c in range(36)]) / 37
    s = module.scale_factor
    expected = F.interpolate(maps[None], scale_factor=s, mode='bilinear')
    torch.testing.assert_close(module(maps[None]), expected, rtol=0, atol=1e-3)


# As the public implementation names and shapes them, with 64 channels.
PUBLISHED = {
    'lp': {
        'init_pos': (1, 32, 1, 1),
        'offset.weight': (32, 64, 1, 1),
        'offset.bias': (32,),
    },
    'lp+': {
        'init_pos': (1, 32, 1, 1),
        'offset.weight': (32, 64, 1, 1),
        'offset.bias': (32,),
        'scope.weight': (32, 64, 1, 1),
    },
    'pl+': {
        'init_pos': (1, 32, 1, 1),
        'offset.weight': (8, 16, 1, 1),
        'offset.bias': (8,),
        'scope.weight': (8, 16, 1, 1),
        'scope.bias': (8,),
    },
}


@pytest.mark.parametrize('variant', PUBLISHED)
def test_published_state_dicts_load(variant):
    module = nn.Sequential(DySample(64, **VARIANTS[variant]))
    state = {f'0.{k}': torch.randn(v) for k, v in PUBLISHED[variant].items()}
    module.load_state_dict(state, strict=True)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[name])
    assert len(state) == len(list(module.parameters())) + 1
    module(torch.randn(1, 64, 3, 5))


@all_16_bits
def test_positions_keep_their_digits(dtype):
    """In bf16, column 299.75 would be 300."""
    module = far(dict(), 8, dtype)
    x = torch.randn(1, 8, 2, 300).to(dtype)
    # The offsets are of the features' dtype, hence taken as they are.
    exact = far(dict(), 8, torch.float32)
    exact.offset = nn.Sequential(Cast(dtype), module.offset, Cast(torch.float))
    expected = exact(x.float()).to(dtype)
    assert torch.equal(module(x), expected)


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@all_16_bits
def test_autocast(dtype):
    module = DySample(8, dyscope=True)
    x = torch.randn(2, 8, 65, 91, requires_grad=True)
    with torch.autocast('cpu', dtype):
        out = module(x)
    out.float().square().sum().backward()
    assert out.shape == (2, 8, 130, 182)
    for tensor in (x, *module.parameters()):
        assert tensor.grad.isfinite().all()


def test_channels_last():
    module = far(dict(dyscope=True), 8)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    other = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(other), module(x))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            dict(in_channels=6),
            'groups is 4, expected a divisor of in_channels',
        ),
        (dict(in_channels=8, style='ls'), "style is 'ls'"),
        (
            dict(in_channels=12, style='pl', scale_factor=3),
            "style is 'pl' and in_channels 12, expected a multiple of scale",
        ),
        (dict(in_channels=8, groups=0), 'groups'),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DySample(**arguments)


def test_by_its_name():
    module = build_upsampler(dict(type='mmcarafe.DySample', groups=2), 6)
    assert isinstance(module, DySample)
    assert module.groups == 2
