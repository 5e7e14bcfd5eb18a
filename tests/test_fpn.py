import pytest
import torch

pytest.importorskip('mmdet', reason='the neck is a subclass of mmdet FPN')
from mmdet.models.necks import FPN  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from test_upsamplers import UPSAMPLERS  # noqa: E402

from mmcarafe import CARAFEFPN  # noqa: E402

CHANNELS = [4, 6, 8, 10]


def maps(height, width, floor=False):
    """C2..C5 of an image, halved with rounding up as ResNet's are."""
    sizes = [(height, width)]
    for _ in CHANNELS[1:]:
        sizes.append(tuple((x + (not floor)) // 2 for x in sizes[-1]))
    return [torch.randn(2, c, *size) for c, size in zip(CHANNELS, sizes)]


@pytest.mark.parametrize(
    'arguments',
    [
        dict(num_outs=4),
        dict(num_outs=5),
        dict(num_outs=3, start_level=1),
        dict(num_outs=3, start_level=0, end_level=2),
        dict(num_outs=6, add_extra_convs=True),
        dict(num_outs=5, start_level=1, add_extra_convs='on_input'),
        dict(num_outs=6, add_extra_convs='on_lateral'),
        dict(
            num_outs=6,
            add_extra_convs='on_output',
            relu_before_extra_convs=True,
        ),
        dict(num_outs=4, norm_cfg=dict(type='BN'), no_norm_on_lateral=True),
        dict(num_outs=4, act_cfg=dict(type='ReLU')),
    ],
    ids=str,
)
def test_with_nearest_it_is_mmdets_fpn(arguments):
    """Every argument of FPN; sizes at which nearest is the same ×2."""
    plain = FPN(CHANNELS, 8, **arguments).eval()
    neck = CARAFEFPN(
        CHANNELS, 8, upsample_cfg=dict(type='nearest'), **arguments
    ).eval()
    neck.load_state_dict(plain.state_dict(), strict=True)
    inputs = maps(32, 48)
    for ours, theirs in zip(neck(inputs), plain(inputs)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    'size, floor',
    [
        ((1, 1), False),
        ((25, 42), False),
        ((31, 7), False),
        ((25, 42), True),
        ((33, 50), True),
    ],
)
@pytest.mark.parametrize('cfg', UPSAMPLERS, ids=str)
def test_any_size(cfg, size, floor):
    neck = CARAFEFPN(CHANNELS, 8, num_outs=5, upsample_cfg=cfg)
    inputs = maps(*size, floor=floor)
    outs = neck(inputs)
    for out, x in zip(outs, inputs):
        assert out.shape == (2, 8, *x.shape[2:])
    sum(out.square().sum() for out in outs).backward()
    for name, parameter in neck.named_parameters():
        # On one pixel, it does not matter where DySample reads.
        nowhere = '.offset.' in name and size == (1, 1)
        if (
            '.conv.bias' not in name
            and '_encoder.' not in name
            and not nowhere
        ):
            assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name


def test_plain_fpn_checkpoint_loads():
    plain = FPN(CHANNELS, 8, num_outs=5)
    neck = CARAFEFPN(CHANNELS, 8, num_outs=5)
    missing, unexpected = neck.load_state_dict(
        plain.state_dict(), strict=False
    )
    assert unexpected == []
    assert missing == [
        f'upsample_modules.{i}.{name}.{kind}'
        for i in range(3)
        for name in ('channel_compressor', 'content_encoder')
        for kind in ('weight', 'bias')
    ]


def test_upsamples_the_merged_level():
    """Top-down by hand, on the module's own parts."""
    neck = CARAFEFPN(CHANNELS, 8, num_outs=4)
    inputs = maps(9, 13)
    x = neck.lateral_convs[3](inputs[3])
    outs = [neck.fpn_convs[3](x)]
    for i in (2, 1, 0):
        lateral = neck.lateral_convs[i](inputs[i])
        up = neck.upsample_modules[i](x)
        x = lateral + up[:, :, : lateral.shape[2], : lateral.shape[3]]
        outs.insert(0, neck.fpn_convs[i](x))
    for ours, by_hand in zip(neck(inputs), outs):
        assert torch.equal(ours, by_hand)


def test_built_by_mmdet_with_its_initialisation():
    neck = MODELS.build(
        dict(
            type='mmcarafe.CARAFEFPN',
            in_channels=CHANNELS,
            out_channels=8,
            num_outs=5,
            upsample_cfg=dict(type='mmcarafe.CARAFE', up_kernel=3),
        )
    )
    neck.init_weights()
    for module in neck.upsample_modules:
        assert module.up_kernel == 3
        assert 0.0009 < module.content_encoder.weight.std() < 0.0011
    assert neck.lateral_convs[0].conv.weight.std() > 0.1


def test_bad_input():
    with pytest.raises(ValueError, match="upsample_cfg has type 'CARAFFE'"):
        CARAFEFPN(CHANNELS, 8, 4, upsample_cfg=dict(type='CARAFFE'))
    with pytest.raises(ValueError, match="upsample_cfg .* expected a 'type'"):
        CARAFEFPN(CHANNELS, 8, 4, upsample_cfg=dict(mode='nearest'))
    with pytest.raises(ValueError, match='inputs has 3 levels, expected 4'):
        CARAFEFPN(CHANNELS, 8, 4)(maps(8, 8)[:3])
    message = (
        r'inputs\[1\] has 6 channels, expected 7, as in_channels = \[4, 7'
    )
    with pytest.raises(ValueError, match=message):
        CARAFEFPN([4, 7, 8, 10], 8, 4)(maps(8, 8))
    # a level that is not used may be anything, as in FPN
    unused = CARAFEFPN([99, 6, 8, 10], 8, 3, start_level=1)
    assert len(unused(maps(8, 8))) == 3
    with pytest.raises(TypeError, match='out_channels is a str, expected an'):
        CARAFEFPN(CHANNELS, '8', 4)
