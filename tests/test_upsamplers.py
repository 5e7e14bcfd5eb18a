import pytest
import torch
from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS as ROOT
from torch import nn
from torch.nn import functional as F

import mmcarafe
from mmcarafe.ops import reference
from mmcarafe.upsamplers import (
    CARAFE,
    COMPARED,
    build_upsampler,
)
from mmcarafe.upsamplers.carafe import FLOOR


@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(scale_factor=3, up_kernel=3, up_group=4, encoder_kernel=1),
        dict(encoder_kernel=5, encoder_dilation=2, compressed_channels=7),
        dict(scale_factor=1, up_kernel=7, normalizer='sigmoid_normalized'),
        dict(out_channels=5),
    ],
    ids=str,
)
@pytest.mark.parametrize('size', [(1, 1), (3, 7), (16, 10)], ids=str)
def test_any_size_and_arguments(arguments, size):
    module = CARAFE(8, **arguments)
    x = torch.randn(2, 8, *size, requires_grad=True)
    out = module(x)
    scale = arguments.get('scale_factor', 2)
    channels = arguments.get('out_channels', 8)
    assert out.shape == (2, channels, scale * size[0], scale * size[1])
    out.square().sum().backward()
    for tensor in (x, *module.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.any()


def test_forward_is_the_three_steps_of_the_paper():
    module = CARAFE(6, up_group=2, encoder_dilation=2).double()
    nn.init.normal_(module.content_encoder.weight)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    logits = F.conv2d(
        module.channel_compressor(x),
        module.content_encoder.weight,
        module.content_encoder.bias,
        padding=2,
        dilation=2,
    )
    masks = F.pixel_shuffle(logits, 2).view(2, 2, 25, 10, 14).softmax(2)
    masks = masks.view(2, 50, 10, 14)
    expected = reference.carafe(x, masks, 5, 2, 2)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


def test_parameters_are_the_papers_and_mmcvs():
    """74,148 for C=256 (section 3.4), under the names of CARAFEPack."""
    module = CARAFE(256)
    assert sum(p.numel() for p in module.parameters()) == 74_148
    pack = pytest.importorskip('mmcv.ops.carafe').CARAFEPack
    theirs = pack(256, 2).state_dict()
    module.load_state_dict(theirs, strict=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, theirs[name])


def test_a_float_is_a_share_of_the_channels():
    module = CARAFE(512, compressed_channels=0.25)
    assert module.channel_compressor.out_channels == 128


def test_initialisation_survives_a_parents_init_cfg():
    class Parent(BaseModule):
        def __init__(self):
            super().__init__(
                dict(type='Xavier', layer='Conv2d', distribution='uniform')
            )
            self.ups = ModuleList([CARAFE(16)])

    parent = Parent()
    parent.init_weights()
    weight = parent.ups[0].content_encoder.weight
    assert weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not parent.ups[0].content_encoder.bias.any()


def test_starts_as_a_box_filter():
    module = CARAFE(4)
    inner = module(torch.ones(1, 4, 9, 9))[:, :, 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_constants_stay_constant_with_a_renormalised_border():
    """On the smallest maps too, as PPM has them."""
    module = CARAFE(4, border='renormalize')
    nn.init.normal_(module.content_encoder.weight)
    for size in ((1, 1), (2, 2), (4, 4), (9, 7)):
        out = module(torch.ones(1, 4, *size))
        assert (out - 1).abs().max() <= 1e-6


@pytest.mark.parametrize('normalizer', ['softmax', 'sigmoid_normalized'])
@pytest.mark.parametrize('scale_factor', [1, 2, 3, 4])
@pytest.mark.parametrize('kernel_size', [3, 5, 7])
def test_starts_as_bilinear(kernel_size, scale_factor, normalizer):
    """Up to the floor of each tap, at the border too."""
    module = CARAFE(
        4,
        scale_factor,
        kernel_size,
        up_group=2,
        normalizer=normalizer,
        border='renormalize',
        init='bilinear',
    )
    x = torch.rand(1, 4, 9, 12)
    bilinear = F.interpolate(
        x, scale_factor=scale_factor, mode='bilinear', align_corners=False
    )
    # of values between 0 and 1: the floors' share of the weights
    share = kernel_size**2 * FLOOR / (1 + kernel_size**2 * FLOOR)
    noise = 0.003  # the encoder's weights are N(0, 0.001)
    assert (module(x) - bilinear).abs().max() <= share + noise
    nn.init.zeros_(module.content_encoder.weight)
    r = scale_factor * (kernel_size // 2)
    mean = F.avg_pool2d(x, kernel_size, 1)  # what all floors together read
    mean = mean.repeat_interleave(scale_factor, 2)
    mean = mean.repeat_interleave(scale_factor, 3)
    inner = bilinear[:, :, r:-r, r:-r]
    expected = (1 - share) * inner + share * mean
    torch.testing.assert_close(module(x)[:, :, r:-r, r:-r], expected)


@pytest.mark.parametrize('normalizer', ['sigmoid', None])
def test_starts_as_bilinear_without_a_sum(normalizer):
    """Such weights need not sum to one, so those inside are compared."""
    module = CARAFE(4, normalizer=normalizer, init='bilinear')
    nn.init.zeros_(module.content_encoder.weight)
    x = torch.rand(1, 4, 9, 12)
    bilinear = F.interpolate(x, scale_factor=2, mode='bilinear')
    difference = (module(x) - bilinear)[:, :, 4:-4, 4:-4]
    assert difference.abs().max() <= 25 * FLOOR


def test_bilinear_start_survives_a_parents_init_cfg():
    class Parent(BaseModule):
        def __init__(self):
            super().__init__(
                dict(type='Normal', layer='Conv2d', std=1, bias=5)
            )
            self.ups = ModuleList([CARAFE(16, init='bilinear')])

    parent = Parent()
    parent.init_weights()
    encoder = parent.ups[0].content_encoder
    bias = encoder.bias.view(25, 4)
    centre, corner = bias[12], bias[0]
    assert bias.softmax(0)[12].allclose(torch.tensor(0.5635 / 1.025))
    assert (centre - corner).allclose(torch.tensor(563.5).log())
    assert encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)


def test_bilinear_start_reaches_every_tap():
    """The floor lets a gradient through to taps that bilinear leaves out."""
    module = CARAFE(4, border='renormalize', init='bilinear')
    x = torch.randn(1, 4, 9, 9)
    module(x).square().sum().backward()
    gradient = module.content_encoder.bias.grad.view(25, 4).abs()
    assert gradient.min() > 1e-5 * gradient.max()


def test_channels_last_goes_through():
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    module = CARAFE(8).to(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_autocast():
    module, x = CARAFE(8), torch.randn(1, 8, 5, 6)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = module(x)
    torch.testing.assert_close(
        out, module(x), rtol=1e-2, atol=1e-2, check_dtype=False
    )


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(channels=0), 'channels is 0, expected an int >= 1'),
        (dict(up_kernel=4), 'up_kernel is 4, expected an odd int'),
        (dict(encoder_kernel=2), 'encoder_kernel is 2, expected an odd int'),
        (dict(up_group=3), 'up_group is 3, expected a divisor of channels'),
        (dict(scale_factor=2.0), 'scale_factor is a float'),
        (dict(compressed_channels=0.01), 'compressed_channels is 0, expected'),
        (dict(normalizer='relu'), "normalizer is 'relu', expected one of"),
        (dict(out_channels=-2), 'out_channels is -2, expected'),
        (dict(border='mirror'), "border is 'mirror', expected one of"),
        (
            dict(border='renormalize', normalizer='sigmoid'),
            "border is 'renormalize' and normalizer 'sigmoid', expected",
        ),
        (dict(init='zeros'), "init is 'zeros', expected one of"),
        (
            dict(init='bilinear', up_kernel=1),
            "init is 'bilinear' and up_kernel 1, expected >= 3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CARAFE(**{'channels': 8, **arguments})


# build_upsampler

# With few channels; and other ways to write them.
UPSAMPLERS = [
    *COMPARED.values(),
    'nearest',
    dict(type='CARAFE', up_kernel=3),
    dict(type=CARAFE),
    dict(type='bilinear', align_corners=False),
    dict(type='deconv', kernel_size=2),
    dict(type='deconv', kernel_size=4),
]


@pytest.mark.parametrize('cfg', UPSAMPLERS, ids=str)
@pytest.mark.parametrize('scale_factor', [2, 3])
def test_builds_every_upsampler(cfg, scale_factor):
    module = build_upsampler(cfg, 8, scale_factor, guide_channels=6)
    size = 3 * scale_factor, 5 * scale_factor
    guide = [torch.randn(1, 6, *size)] if hasattr(module, 'guided') else []
    out = module(torch.randn(1, 8, 3, 5), *guide)
    if isinstance(out, tuple):
        changed_guide, out = out
        assert changed_guide.shape == guide[0].shape
    assert out.shape == (1, 8, *size)


@pytest.mark.parametrize('cfg', UPSAMPLERS, ids=str)
def test_empty_batch(cfg):
    module = build_upsampler(cfg, 8, guide_channels=6)
    x = torch.zeros(0, 8, 3, 5, requires_grad=True)
    guide = [torch.zeros(0, 6, 6, 10)] if hasattr(module, 'guided') else []
    if isinstance(module, mmcarafe.EUCB):
        module.eval()  # there is no variance of nothing
    out = module(x, *guide)
    out = out[-1] if isinstance(out, tuple) else out
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_none_is_filled_in():
    cfg = dict(type='SAPA', guide_channels=None)
    module = build_upsampler(cfg, 8, guide_channels=6)
    assert module.norm_y.num_channels == 6


def test_pixel_shuffle_is_mmcvs():
    """Names, shapes, initialisation and output."""
    upsample = pytest.importorskip('mmcv.cnn.bricks.upsample')
    torch.manual_seed(1)
    theirs = upsample.PixelShufflePack(6, 6, scale_factor=2, upsample_kernel=3)
    torch.manual_seed(1)
    ours = build_upsampler('pixel_shuffle', 6)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(1, 6, 3, 5)
    assert torch.equal(ours(x), theirs(x))


class Twice(nn.Module):
    """An upsampler of somebody else, with a frozen norm inside."""

    def __init__(self, channels, small=0):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels).eval()
        self.small = small

    def forward(self, x):
        if self.small:
            raise RuntimeError('made for a GPU')
        return F.interpolate(self.norm(x), scale_factor=2)


def test_any_registered_module():
    ROOT.register_module(name='Twice', module=Twice, force=True)
    module = build_upsampler(dict(type='Twice'), 6)
    assert module.training and not module.norm.training


def test_a_module_that_cannot_be_tried_out():
    with pytest.warns(UserWarning, match='not tried out, because made for a'):
        build_upsampler(dict(type=Twice, small=1), 6)


def test_a_module_that_returns_no_map():
    class Pair(Twice):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match='it makes tuple from a map of'):
        build_upsampler(dict(type=Pair), 6)


@pytest.mark.parametrize(
    'cfg, message',
    [
        (['nearest'], 'upsample_cfg is a list, expected a dict'),
        (None, 'upsample_cfg is a NoneType, expected a dict'),
        (dict(mode='nearest'), "upsample_cfg is .*, expected a 'type'"),
        (dict(type='CARAFF'), "has type 'CARAFF', expected a registered"),
        (dict(type='mmcarafe.CARAFF'), "has type 'mmcarafe.CARAFF', expected"),
        (dict(type=7), 'has type 7, expected a registered upsampler'),
        (
            dict(type='CARAFE', kernel=5),
            "unexpected keyword argument 'kernel'",
        ),
        (dict(type='CARAFE', up_kernel=6), 'up_kernel is 6, expected an odd'),
        ('mmcarafe.CARAFFE', "expected a registered .* did you mean 'CARAFE'"),
        # what a child config inherits from mmdet's FPN
        (
            dict(type='CARAFE', mode='nearest'),
            r"'mode'; if that was inherited .* write "
            r'upsample_cfg=dict\(_delete_=True, type=...\)',
        ),
        (dict(mode='nearest'), r'upsample_cfg=dict\(_delete_=True, type'),
        (
            dict(type='nearest', mode='bilinear'),
            "has type 'nearest' and mode 'bilinear', expected no mode",
        ),
        (dict(type='CARAFE', channels=6), 'has channels 6, expected 8'),
        (
            dict(type='deconv', out_channels=4),
            'has out_channels 4, expected 8',
        ),
        (
            dict(type='CARAFE', scale_factor=3),
            'has scale_factor 3, expected 2',
        ),
        # modules that do not upsample, or not by 2
        (
            dict(type=nn.ReLU),
            r'makes \(1, 8, 8, 12\) from a .*, expected \(1, 8, 16, 24\)',
        ),
        (
            dict(type=nn.Conv2d, kernel_size=1),
            r'makes \(1, 8, 8, 12\) .* expected \(1, 8, 16, 24\)',
        ),
        (
            dict(type='deconv', stride=3, output_padding=0),
            r'makes \(1, 8, 22, 34\) .* expected \(1, 8, 16, 24\)',
        ),
    ],
    ids=str,
)
def test_bad_upsample_cfg(cfg, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build_upsampler(cfg, 8)


def test_the_prefix_is_enough_for_any_registry():
    assert isinstance(
        ROOT.build(dict(type='mmcarafe.CARAFE', channels=4)), CARAFE
    )
    assert mmcarafe.CARAFE is CARAFE
    with pytest.raises(AttributeError, match="no attribute 'CARAFFE'"):
        mmcarafe.CARAFFE  # noqa: B018


def test_every_upsampler_of_ours_is_exported():
    for kind, row in mmcarafe.upsamplers.UPSAMPLERS.items():
        if kind == row.cls.__name__:
            assert getattr(mmcarafe, kind) is row.cls
