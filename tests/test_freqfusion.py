"""FreqFusion against the published formulation, step by step, in fp64."""

import pytest
import torch
from cases import all_16_bits
from test_dysample import sampled
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmcarafe import FreqFusion
from mmcarafe.upsamplers import (
    build_upsampler,
    freqfusion,
    upsample_to_meet,
)

VARIANTS = {
    'plain': dict(),
    'resampled': dict(feature_resample=True, feature_resample_group=2),
    'other-guide': dict(guide_channels=6, feature_resample=True),
    'two-groups': dict(up_group=2, feature_resample=True),
    'times-3': dict(scale_factor=3, feature_resample=True),
    'times-1': dict(scale_factor=1, feature_resample=True),
    'other-kernels': dict(lowpass_kernel=3, highpass_kernel=5),
    'one-tap': dict(lowpass_kernel=1, highpass_kernel=1),
    'wide-encoder': dict(encoder_kernel=5, encoder_dilation=2),
}
all_variants = pytest.mark.parametrize(
    'arguments', VARIANTS.values(), ids=VARIANTS
)
both_kinds = pytest.mark.parametrize(
    'feature_resample', [False, True], ids=['plain', 'resampled']
)
HAMMING = {
    1: [1.0],
    3: [0.08, 1.0, 0.08],
    5: [0.08, 0.54, 1.0, 0.54, 0.08],
}


def far(arguments, dtype=torch.float64):
    """Kernels that differ between pixels, and positions some pixels away."""
    module = FreqFusion(
        **{'in_channels': 8, 'compressed_channels': 16, **arguments}
    )
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.1 if 'dysampler' in name else 0.4)
    return module.to(dtype)


def inputs_of(module, size, n=2, dtype=torch.float64):
    s = module.scale_factor
    x = torch.randn(n, module.lr_channel_compressor.in_channels, *size)
    guide = torch.randn(n, module.guide_channels, s * size[0], s * size[1])
    return [t.to(dtype).requires_grad_() for t in (x, guide)]


def published(module, x, guide):
    s, g = module.scale_factor, module.up_group
    k_l, k_h = module.lowpass_kernel, module.highpass_kernel
    fine = module.hr_channel_compressor(guide)
    coarse = module.lr_channel_compressor(x)

    fine_high = module.content_encoder2(fine)
    smooth = reassemble(fine, kernels(fine_high, k_h, g), k_h, g, 1)
    fine = 2 * fine - smooth

    low = module.content_encoder(fine)
    low = low + reassemble(
        module.content_encoder(coarse), kernels(low, k_l, g), k_l, g, s
    )
    low = kernels(low, k_l, g)
    coarse_high = module.content_encoder2(coarse)
    high = fine_high + reassemble(coarse_high, low, k_l, g, s)
    high = kernels(high, k_h, g)

    out = reassemble(x, low, k_l, g, s)
    if module.dysampler is not None:
        out = resample(module.dysampler, out, coarse, fine)
    return guide + (guide - reassemble(guide, high, k_h, g, 1)), out


def kernels(scores, k, g):
    n, _, h, w = scores.shape
    window = scores.new_tensor(HAMMING[k])
    window = torch.outer(window, window).view(k * k, 1, 1)
    out = scores.view(n, g, k * k, h, w).softmax(2) * window
    return out / out.sum(2, keepdim=True)


def reassemble(x, weights, k, g, s):
    n, c, h, w = x.shape
    windows = F.unfold(x, k, padding=k // 2).view(n, g, -1, k * k, h, w)
    windows = windows.repeat_interleave(s, 4).repeat_interleave(s, 5)
    return (windows * weights[:, :, None]).sum(3).view(n, c, s * h, s * w)


def resample(sampler, x, coarse, fine):
    """Offsets of all subpixels as channels, and a grid of source pixels."""
    s, g = sampler.scale_factor, sampler.groups
    coarse, fine = (
        with_similarities(
            F.group_norm(each, each.shape[1] // 8, norm.weight, norm.bias)
        )
        for each, norm in ((coarse, sampler.norm_lr), (fine, sampler.norm_hr))
    )
    offset = sampler.offset(coarse)
    offset = offset + F.pixel_unshuffle(sampler.hr_offset(fine), s)
    scope = sampler.direct_scale(coarse)
    scope = scope + F.pixel_unshuffle(sampler.hr_direct_scale(fine), s)
    return sampled(x, offset * scope.sigmoid(), s, g)


def with_similarities(x):
    n, c, h, w = x.shape
    windows = F.unfold(x, 3, dilation=2, padding=2).view(n, c, 9, h, w)
    cosines = F.cosine_similarity(x[:, :, None], windows, 1)
    return torch.cat([x, cosines[:, [0, 1, 2, 3, 5, 6, 7, 8]]], 1)


@all_variants
@pytest.mark.parametrize('size', [(5, 7), (1, 1), (1, 9)], ids=str)
def test_output_and_gradients_are_the_published_ones(arguments, size):
    module = far(arguments)
    maps = inputs_of(module, size)
    inputs = [*maps, *module.parameters()]
    ours, theirs = module(*maps), published(module, *maps)
    grads = [torch.randn_like(out) for out in ours]
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-10)
    for our, their in zip(
        *(torch.autograd.grad(outs, inputs, grads) for outs in (ours, theirs))
    ):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-8)


@both_kinds
def test_gradients_of_first_and_second_order(feature_resample):
    module = far(
        dict(
            in_channels=2,
            compressed_channels=8,
            lowpass_kernel=3,
            feature_resample=feature_resample,
            feature_resample_group=1,
        )
    )
    maps = inputs_of(module, (1, 2), n=1)
    assert torch.autograd.gradcheck(module, maps)
    assert torch.autograd.gradgradcheck(module, maps)


@both_kinds
def test_maps_of_zeros_have_gradients_of_any_order(feature_resample):
    """Where the cosines would be 0 / 0."""
    module = FreqFusion(8, feature_resample=feature_resample)
    maps = [
        torch.zeros(1, 8, *size, requires_grad=True)
        for size in ((3, 5), (6, 10))
    ]
    total = sum((1 - out).square().sum() for out in module(*maps))
    grads = torch.autograd.grad(total, maps, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), maps)
    for grad in (*grads, *second):
        assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize(
    ('arguments', 'count'),
    [(dict(), 52_514), (dict(feature_resample=True), 104_690)],
    ids=str,
)
def test_parameters_are_counted_in_the_docstring(arguments, count):
    module = FreqFusion(256, 256, **arguments)
    assert sum(p.numel() for p in module.parameters()) == count
    assert f'{count:,}' in FreqFusion.__doc__


# As the public implementation names and shapes them, with 64 channels.
PUBLISHED = {
    'hamming_lowpass': (1, 1, 5, 5),
    'hamming_highpass': (1, 1, 3, 3),
    'hr_channel_compressor.weight': (64, 64, 1, 1),
    'hr_channel_compressor.bias': (64,),
    'lr_channel_compressor.weight': (64, 64, 1, 1),
    'lr_channel_compressor.bias': (64,),
    'content_encoder.weight': (25, 64, 3, 3),
    'content_encoder.bias': (25,),
    'content_encoder2.weight': (9, 64, 3, 3),
    'content_encoder2.bias': (9,),
}
PUBLISHED_RESAMPLER = {
    'dysampler.init_pos': (1, 32, 1, 1),
    'dysampler.offset.weight': (32, 72, 3, 3),
    'dysampler.offset.bias': (32,),
    'dysampler.direct_scale.weight': (32, 72, 3, 3),
    'dysampler.direct_scale.bias': (32,),
    'dysampler.hr_offset.weight': (8, 72, 3, 3),
    'dysampler.hr_offset.bias': (8,),
    'dysampler.hr_direct_scale.weight': (8, 72, 3, 3),
    'dysampler.hr_direct_scale.bias': (8,),
    'dysampler.norm_hr.weight': (64,),
    'dysampler.norm_hr.bias': (64,),
    'dysampler.norm_lr.weight': (64,),
    'dysampler.norm_lr.bias': (64,),
}


@both_kinds
def test_published_state_dicts_load(feature_resample):
    shapes, buffers = dict(PUBLISHED), 2
    if feature_resample:
        shapes, buffers = {**shapes, **PUBLISHED_RESAMPLER}, 3
    module = nn.Sequential(FreqFusion(64, feature_resample=feature_resample))
    state = {f'0.{name}': torch.randn(v) for name, v in shapes.items()}
    module.load_state_dict(state, strict=True)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[name])
    assert len(state) == len(list(module.parameters())) + buffers
    assert len(module.state_dict()) == len(list(module.parameters()))


@all_16_bits
@both_kinds
def test_low_precision(feature_resample, dtype):
    """Not more than twice as far off as the same steps in that precision."""
    try:
        ones = torch.ones(1, 1, 2, 2, dtype=dtype)
        F.grid_sample(ones, ones, align_corners=False)
    except RuntimeError as error:  # torch 2.4 and older, on a CPU
        if feature_resample:
            pytest.skip(str(error))
    module = far(dict(feature_resample=feature_resample), dtype)
    maps = inputs_of(module, (9, 11), dtype=dtype)
    ours, theirs = module(*maps), published(module, *maps)
    module.double()
    exact = published(module, *(each.double() for each in maps))
    for our, their, want in zip(ours, theirs, exact):
        assert our.dtype == dtype
        error, allowed = ((o - want).square().mean() for o in (our, their))
        assert error <= 4 * allowed


def test_the_window_keeps_its_digits():
    """In bf16, its logarithm of -5.05 would be off by up to 1/64."""
    module = FreqFusion(8)
    nn.init.zeros_(module.content_encoder.weight)
    x = torch.zeros(1, 8, 5, 5)
    x[:, :, 2, 2] = 1
    window = torch.tensor(HAMMING[5])
    window = torch.outer(window, window) / window.sum() ** 2
    _, out = module.bfloat16()(
        x.bfloat16(), torch.zeros(1, 8, 10, 10).bfloat16()
    )
    want = window.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(
        out[0].float(), want.expand(8, 10, 10), rtol=2**-8, atol=0
    )


@all_16_bits
def test_cosines_keep_their_digits(dtype):
    x = torch.randn(1, 64, 5, 6).to(dtype)
    torch.testing.assert_close(
        freqfusion._with_similarities(x).double(),
        with_similarities(x.double()),
        rtol=torch.finfo(dtype).eps,
        atol=1e-6,
    )


@all_16_bits
@pytest.mark.parametrize('mixed', ['neither', 'x', 'guide'])
@both_kinds
def test_autocast(feature_resample, mixed, dtype):
    """Also where the maps come in two dtypes; each keeps its own."""
    module = FreqFusion(8, feature_resample=feature_resample)
    maps = inputs_of(module, (33, 46), dtype=torch.float32)
    given = [
        each.to(dtype) if name == mixed else each
        for name, each in zip(('x', 'guide'), maps)
    ]
    with torch.autocast('cpu', dtype):
        guide, out = module(*given)
    assert [out.dtype, guide.dtype] == [each.dtype for each in given]
    (guide.float().square().mean() + out.float().square().mean()).backward()
    for tensor in (*maps, *module.parameters()):
        assert tensor.grad.isfinite().all()
    for low, full in zip((guide, out), module(*maps)):
        torch.testing.assert_close(
            low, full, rtol=0, atol=0.1, check_dtype=False
        )


@both_kinds
def test_channels_last(feature_resample):
    module = far(dict(feature_resample=feature_resample))
    maps = inputs_of(module, (5, 7))
    last = [
        each.contiguous(memory_format=torch.channels_last) for each in maps
    ]
    outs = module(*last)
    for out, want in zip(outs, module(*maps)):
        torch.testing.assert_close(out, want)
    assert outs[0].is_contiguous(memory_format=torch.channels_last)


@both_kinds
def test_empty_batch(feature_resample):
    module = FreqFusion(8, feature_resample=feature_resample)
    maps = torch.zeros(0, 8, 3, 4), torch.zeros(0, 8, 6, 8)
    assert [out.shape for out in module(*maps)] == [(0, 8, 6, 8)] * 2


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


@both_kinds
def test_makes_no_tensor_larger_than_its_outputs(feature_resample):
    """Not one of the features' K*K-fold, nor one of the compressed maps'."""
    module = FreqFusion(128, feature_resample=feature_resample)
    maps = [torch.randn(1, 128, 8, 10), torch.randn(1, 128, 16, 20)]
    with torch.no_grad(), Largest() as largest:
        module(*maps)
    assert largest.numel == 128 * 16 * 20


@both_kinds
def test_starts_with_the_hamming_window(feature_resample):
    """Constants stay constant, and details are sharpened from the start."""
    module = FreqFusion(8, feature_resample=feature_resample)
    x = torch.ones(1, 8, 11, 12)
    guide = torch.randn(1, 8, 22, 24)
    sharpened, out = module(x, guide)
    inner = out[..., 5:-5, 5:-5]
    torch.testing.assert_close(inner, torch.ones_like(inner))
    window = torch.tensor([0.08, 1.0, 0.08])
    window = torch.outer(window, window) / window.sum() ** 2
    smooth = F.conv2d(guide, window.expand(8, 1, 3, 3), padding=1, groups=8)
    difference = (sharpened - (2 * guide - smooth)).abs()
    assert 0 < difference.max() < 0.05


def test_initialisation_survives_a_parents_init_cfg():
    model = pytest.importorskip('mmengine.model')

    class Parent(model.BaseModule):
        def __init__(self):
            super().__init__(
                dict(
                    type='Normal', layer=['Conv2d', 'GroupNorm'], std=1, bias=5
                )
            )
            self.ups = nn.ModuleList([FreqFusion(64, feature_resample=True)])
            self.up = self.ups[0]

    parent = Parent()
    parent.init_weights()
    up = parent.up
    for conv in (up.hr_channel_compressor, up.lr_channel_compressor):
        bound = (6 / 128) ** 0.5
        assert 0.9 * bound < conv.weight.abs().max() <= bound
    sampler = up.dysampler
    for conv in (
        up.content_encoder,
        up.content_encoder2,
        sampler.offset,
        sampler.hr_offset,
    ):
        assert conv.weight.std().item() == pytest.approx(0.001, rel=0.05)
    for conv in (sampler.direct_scale, sampler.hr_direct_scale):
        assert not conv.weight.any()
    for norm in (sampler.norm_hr, sampler.norm_lr):
        assert (norm.weight == 1).all()
    assert not any(
        p.any() for name, p in up.named_parameters() if name.endswith('bias')
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(in_channels=0), 'in_channels is 0, expected an int >= 1'),
        (dict(guide_channels=2.0), 'guide_channels is a float, expected'),
        (dict(scale_factor=0), 'scale_factor is 0, expected'),
        (dict(lowpass_kernel=4), 'lowpass_kernel is 4, expected an odd int'),
        (dict(highpass_kernel=2), 'highpass_kernel is 2, expected an odd'),
        (dict(encoder_kernel=2), 'encoder_kernel is 2, expected an odd int'),
        (dict(encoder_dilation=0), 'encoder_dilation is 0, expected'),
        (dict(compressed_channels=0), 'compressed_channels is 0, expected'),
        (dict(up_group=0), 'up_group is 0, expected'),
        (
            dict(up_group=3),
            'up_group is 3, expected a divisor of in_channels = 8',
        ),
        (
            dict(up_group=4, guide_channels=6),
            'up_group is 4, expected a divisor of guide_channels = 6',
        ),
        (
            dict(up_group=4, compressed_channels=6),
            'up_group is 4, expected a divisor of compressed_channels = 6',
        ),
        (
            dict(feature_resample=True, feature_resample_group=3),
            'feature_resample_group is 3, expected a divisor of in_channels',
        ),
        (
            dict(feature_resample=True, feature_resample_group=0),
            'feature_resample_group is 0, expected',
        ),
        (
            dict(feature_resample=True, compressed_channels=12),
            'compressed_channels is 12, expected a multiple of 8 with feature',
        ),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FreqFusion(**{'in_channels': 8, **arguments})


@pytest.mark.parametrize(
    'shape', [(2, 8, 6, 10), (1, 4, 6, 10), (1, 8, 5, 10), (1, 8, 3, 5)]
)
def test_a_guide_that_does_not_fit(shape):
    module = FreqFusion(8)
    with pytest.raises(ValueError) as error:
        module(torch.zeros(1, 8, 3, 5), torch.zeros(shape))
    assert f'guide has shape {shape}, expected' in str(error.value)
    assert str(error.value).endswith('= (1, 8, 6, 10)')


def test_by_its_name_at_an_odd_size():
    module = build_upsampler(
        dict(type='mmcarafe.FreqFusion', lowpass_kernel=3),
        6,
        guide_channels=4,
    )
    assert isinstance(module, FreqFusion)
    assert module.lowpass_kernel == 3
    x, fine = torch.randn(1, 6, 3, 4), torch.randn(1, 4, 5, 8)
    changed, (out,) = upsample_to_meet([module], [x], fine)
    assert changed.shape == fine.shape
    assert out.shape == (1, 6, 5, 8)
