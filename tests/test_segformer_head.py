import pytest
import torch
import torch.nn.functional as F
from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.decode_heads import SegformerHead
from mmseg.registry import MODELS
from torch import nn

from mmcarafe import CARAFE, SAPA, CARAFESegformerHead, DySample
from mmcarafe.registry import MODELS as OURS

# mmseg's own warnings, whenever one of its heads is built
pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
]

C = 16
SIZES = [(64, 96), (65, 91)]  # the second has levels of odd sizes
CARAFE_CFG = dict(type='mmcarafe.CARAFE', compressed_channels=8)


def arguments(**kwargs):
    return {
        **dict(
            in_channels=[8, 12, 16, 20],
            in_index=[0, 1, 2, 3],
            channels=C,
            num_classes=5,
            dropout_ratio=0,
            norm_cfg=dict(type='BN'),
        ),
        **kwargs,
    }


def maps_of(height, width, batch=2):
    return [
        torch.randn(batch, c, -(-height // stride), -(-width // stride))
        for c, stride in ((8, 4), (12, 8), (16, 16), (20, 32))
    ]


def crop(x, like):
    return x[:, :, : like.shape[2], : like.shape[3]]


def fused(head, levels):
    return head.cls_seg(head.fusion_conv(torch.cat(levels, dim=1)))


def test_odd_levels():
    sizes = [tuple(x.shape[2:]) for x in maps_of(*SIZES[1])]
    assert sizes == [(17, 23), (9, 12), (5, 6), (3, 3)]


# mmseg's advice on sizes, which these do not follow
@pytest.mark.filterwarnings('ignore:When align_corners=True')
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(align_corners=False),
        dict(align_corners=True),
        dict(interpolate_mode='nearest', align_corners=None),
    ],
    ids=['bilinear', 'align_corners', 'nearest'],
)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_none_is_segformer_head_to_the_bit(kwargs, size):
    kwargs = arguments(**kwargs, dropout_ratio=0.1)
    torch.manual_seed(1)
    theirs = SegformerHead(**kwargs)
    theirs.init_weights()
    torch.manual_seed(1)
    ours = CARAFESegformerHead(**kwargs, upsample_cfg=None)
    ours.init_weights()

    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        assert value.equal(expected[name]), name
    inputs = maps_of(*size)
    for training in (False, True):
        scores = []
        for head in (theirs, ours):
            torch.manual_seed(2)  # for the dropout
            scores.append(head.train(training)(inputs))
        assert scores[0].equal(scores[1])
    weight = torch.randn_like(scores[0])
    for each in scores:
        (each * weight).sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters()):
        assert a.grad.any()
        assert a.grad.equal(b.grad)


def test_segformer_head_checkpoint_loads():
    theirs = SegformerHead(**arguments())
    head = CARAFESegformerHead(**arguments())
    missing, unexpected = head.load_state_dict(
        theirs.state_dict(), strict=False
    )
    assert not unexpected
    assert {name.split('.')[0] for name in missing} == {'upsample_modules'}


def test_default_is_carafe_in_all_six_steps():
    head = CARAFESegformerHead(**arguments())
    assert [len(step) for step in head.upsample_modules] == [3, 2, 1]
    assert sum(isinstance(m, CARAFE) for m in head.modules()) == 6
    assert head.fusion_conv.in_channels == 4 * C


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_nearest_step_by_step(size):
    head = CARAFESegformerHead(**arguments(), upsample_cfg='nearest').eval()
    inputs = maps_of(*size)
    levels = [conv(x) for conv, x in zip(head.convs, inputs)]
    expected = []
    for i, x in enumerate(levels):
        for finer in reversed(levels[:i]):
            x = crop(F.interpolate(x, scale_factor=2), finer)
        expected.append(x)
    assert head(inputs).equal(fused(head, expected))


def test_order_of_the_upsamplers():
    """Each differs from the others, and each level passes its own."""
    head = CARAFESegformerHead(**arguments(), upsample_cfg=CARAFE_CFG).eval()
    for name, parameter in head.named_parameters():
        if 'content_encoder' in name:
            nn.init.normal_(parameter)
    inputs = maps_of(*SIZES[1])
    levels = [conv(x) for conv, x in zip(head.convs, inputs)]
    expected = []
    for level, x in enumerate(levels):
        for i in reversed(range(level)):
            upsample = head.upsample_modules[i][level - i - 1]
            x = crop(upsample(x), levels[i])
        expected.append(x)
    assert head(inputs).equal(fused(head, expected))


class Exchange(nn.Module):
    """A guide and a map that become the sum of both."""

    guided = True

    def __init__(self, in_channels, guide_channels):
        super().__init__()
        assert in_channels == guide_channels == C

    def forward(self, x, guide):
        both = F.interpolate(x, scale_factor=2) + guide
        return both, both


def test_later_steps_see_what_a_guide_was_changed_to():
    head = CARAFESegformerHead(
        **arguments(), upsample_cfg=dict(type=Exchange)
    ).eval()
    inputs = maps_of(*SIZES[1])
    levels = [conv(x) for conv, x in zip(head.convs, inputs)]
    coarse = levels[3:]
    for finer in (levels[2], levels[1], levels[0]):
        changed = [
            crop(F.interpolate(x, scale_factor=2), finer) + finer
            for x in coarse
        ]
        coarse = [torch.stack(changed).mean(0), *changed]
    torch.testing.assert_close(head(inputs), fused(head, coarse))


@pytest.mark.parametrize(
    'cfg',
    [
        CARAFE_CFG,
        dict(type='mmcarafe.DySample', style='pl', dyscope=True),
        dict(type='mmcarafe.SAPA'),
        dict(type='deconv'),
    ],
    ids=lambda cfg: cfg['type'],
)
@pytest.mark.parametrize('size', [(64, 96), (97, 131)], ids=str)
def test_trains_after_its_backbone(cfg, size):
    backbone = MixVisionTransformer(
        embed_dims=4, num_layers=[1] * 4, num_heads=[1, 2, 2, 4]
    )
    head = CARAFESegformerHead(
        **arguments(in_channels=[4, 8, 8, 16]), upsample_cfg=cfg
    )
    scores = head(backbone(torch.randn(2, 3, *size)))
    assert scores.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    (scores * torch.randn_like(scores)).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    'cfg, kind, layer, std',
    [
        (CARAFE_CFG, CARAFE, 'content_encoder', 0.001),
        (dict(type='mmcarafe.DySample'), DySample, 'offset', 0.001),
        (dict(type='mmcarafe.SAPA'), SAPA, 'q', 0.02),
    ],
    ids=['CARAFE', 'DySample', 'SAPA'],
)
def test_init_weights_of_the_head_leave_upsamplers_their_own(
    cfg, kind, layer, std
):
    head = CARAFESegformerHead(
        **arguments(init_cfg=dict(type='Xavier', layer='Conv2d')),
        upsample_cfg=cfg,
    )
    head.init_weights()
    modules = [m for m in head.modules() if isinstance(m, kind)]
    assert len(modules) == 6
    for module in modules:
        weight = getattr(module, layer).weight
        assert weight.std().item() == pytest.approx(std, rel=0.15)
    # the head's own init_cfg did its work elsewhere
    assert head.conv_seg.weight.std() > 0.1


@pytest.mark.parametrize('count', [1, 2, 5])
def test_any_number_of_levels(count):
    head = CARAFESegformerHead(
        **arguments(in_channels=[8] * count, in_index=list(range(count))),
        upsample_cfg=CARAFE_CFG,
    )
    inputs = [torch.randn(2, 8, 32 >> i, 48 >> i) for i in range(count)]
    assert head(inputs).shape == (2, 5, 32, 48)
    steps = count * (count - 1) // 2
    assert sum(isinstance(m, CARAFE) for m in head.modules()) == steps


@pytest.mark.parametrize('cfg', [CARAFE_CFG, 'mmcarafe.SAPA'], ids=str)
def test_levels_of_equal_size_after_a_dilated_backbone(cfg):
    head = CARAFESegformerHead(**arguments(), upsample_cfg=cfg)
    inputs = maps_of(64, 96)
    inputs[3] = torch.randn(2, 20, *inputs[2].shape[2:])
    assert head(inputs).shape == (2, 5, 16, 24)


def test_built_by_prefix_from_mmseg():
    head = MODELS.build(
        dict(type='mmcarafe.CARAFESegformerHead', **arguments())
    )
    assert type(head) is CARAFESegformerHead
    # mmengine would also find it by import, which takes the whole name
    assert OURS.get('CARAFESegformerHead') is CARAFESegformerHead


def test_wrong_level_is_named():
    head = CARAFESegformerHead(**arguments())
    inputs = maps_of(64, 96)
    inputs[1] = inputs[1][:, :7]
    with pytest.raises(ValueError, match=r'inputs\[1\] has 7 channels'):
        head(inputs)


@pytest.mark.parametrize(
    'cfg, error',
    [
        (['mmcarafe.CARAFE'], TypeError),
        (dict(up_kernel=5), ValueError),
        (dict(type='mmcarafe.CARAFFE'), ValueError),
        (dict(type='mmcarafe.CARAFE', up_kernel=4), ValueError),
    ],
    ids=['list', 'no type', 'unknown type', 'even kernel'],
)
def test_bad_config_is_named(cfg, error):
    with pytest.raises(error, match='upsample_cfg'):
        CARAFESegformerHead(**arguments(), upsample_cfg=cfg)
