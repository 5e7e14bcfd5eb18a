from itertools import product

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import init_default_scope
from mmseg.models.backbones import ResNetV1c
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS

from mmcarafe import CARAFE, CARAFEUPerHead

# mmseg's own warning, whenever one of its heads is built
pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
]

PLACES = ('ppm', 'fpn', 'fuse')
BN = dict(type='BN')
COMBINATIONS = list(product((False, True), repeat=3))


@pytest.fixture(autouse=True)
def scope():
    """The losses' names are looked up where another test may have said."""
    init_default_scope('mmseg')


def name_of(combination):
    places = [place for place, on in zip(PLACES, combination) if on]
    return '+'.join(places) or 'none'


def arguments(**kwargs):
    return {
        **dict(
            in_channels=[8, 16, 32, 64],
            in_index=[0, 1, 2, 3],
            channels=8,
            num_classes=5,
            dropout_ratio=0,
            norm_cfg=BN,
        ),
        **kwargs,
    }


def upsample_cfgs(combination, **cfg):
    cfg = cfg or dict(type='mmcarafe.CARAFE', compressed_channels=8)
    return {
        f'{place}_upsample_cfg': cfg if on else None
        for place, on in zip(PLACES, combination)
    }


def levels(height=128, width=192, batch=2):
    return [
        torch.randn(batch, c, -(-height // stride), -(-width // stride))
        for c, stride in ((8, 4), (16, 8), (32, 16), (64, 32))
    ]


@pytest.mark.parametrize('combination', COMBINATIONS, ids=name_of)
@pytest.mark.parametrize(
    'size',
    [(512, 512), (341, 512), (500, 364), (97, 131)],
    ids='{0[0]}x{0[1]}'.format,
)
@pytest.mark.parametrize('batch', [1, 2], ids=['single', 'batch'])
def test_every_combination_trains_at_every_size(combination, size, batch):
    backbone = ResNetV1c(
        depth=18, base_channels=8, stem_channels=8, norm_cfg=BN
    )
    head = CARAFEUPerHead(**arguments(**upsample_cfgs(combination)))
    # BN cannot learn from the one pixel that PPM pools from a single image.
    for module in (backbone, head):
        module.train(batch > 1)

    scores = head(backbone(torch.randn(batch, 3, *size)))
    scores.square().mean().backward()

    assert scores.shape == (batch, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert scores.isfinite().all()
    for module in (backbone, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


# mmseg's advice on sizes, which these do not follow
@pytest.mark.filterwarnings('ignore:When align_corners=True')
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(129, 193), (97, 131)], ids=str)
def test_all_none_is_uper_head_to_the_bit(align_corners, size):
    kwargs = arguments(align_corners=align_corners, dropout_ratio=0.1)
    torch.manual_seed(1)
    theirs = UPerHead(**kwargs)
    theirs.init_weights()
    torch.manual_seed(1)
    ours = CARAFEUPerHead(**kwargs, **upsample_cfgs([False] * 3))
    ours.init_weights()

    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        assert value.equal(expected[name]), name
    inputs = levels(*size)
    for training in (True, False):
        scores = []
        for head in (theirs, ours):
            torch.manual_seed(2)  # for the dropout
            scores.append(head.train(training)(inputs))
        assert scores[0].equal(scores[1])
    scores[0].sum().backward()
    scores[1].sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters()):
        assert a.grad.equal(b.grad)


@pytest.mark.parametrize('combination', COMBINATIONS, ids=name_of)
def test_uper_head_checkpoint_loads(combination):
    head = CARAFEUPerHead(**arguments(**upsample_cfgs(combination)))
    missing, unexpected = head.load_state_dict(
        UPerHead(**arguments()).state_dict(), strict=False
    )
    assert not unexpected
    assert {name.split('.')[0] for name in missing} == {
        f'{place}_upsample_modules'
        for place, on in zip(PLACES, combination)
        if on
    }


def test_default_is_carafe_in_all_three_places():
    head = CARAFEUPerHead(**arguments())
    assert [m.channels for m in head.ppm_upsample_modules] == [8, 8, 8, 8]
    assert [m.channels for m in head.fpn_upsample_modules] == [8, 8, 8]
    assert [m.channels for m in head.fuse_upsample_modules] == [24, 16, 8]
    assert sum(isinstance(m, CARAFE) for m in head.modules()) == 10
    assert head.fpn_bottleneck.in_channels == 4 * 8


def test_parameters_added():
    def carafe(channels):
        return (channels + 1) * 64 + (64 * 3**2 + 1) * 2**2 * 5**2

    def count(head):
        return sum(p.numel() for p in head.parameters())

    kwargs = arguments(channels=32)
    extra = count(CARAFEUPerHead(**kwargs)) - count(UPerHead(**kwargs))
    assert extra == 8 * carafe(32) + carafe(2 * 32) + carafe(3 * 32)


def test_init_weights_of_the_head_leave_carafe_its_own():
    head = CARAFEUPerHead(
        **arguments(init_cfg=dict(type='Xavier', layer='Conv2d'))
    )
    head.init_weights()
    carafes = [m for m in head.modules() if isinstance(m, CARAFE)]
    assert len(carafes) == 10
    for carafe in carafes:
        weight = carafe.content_encoder.weight
        assert weight.std().item() == pytest.approx(0.001, rel=0.05)
    # the head's own init_cfg did its work elsewhere
    assert head.fpn_bottleneck.conv.weight.std() > 0.01


def test_bilinear_upsamplers_in_fpn_are_uper_head_at_even_sizes():
    theirs = UPerHead(**arguments())
    ours = CARAFEUPerHead(
        **arguments(**upsample_cfgs((False, True, False), type='bilinear'))
    )
    ours.load_state_dict(theirs.state_dict())
    inputs = levels()
    torch.testing.assert_close(ours(inputs), theirs(inputs))


def test_ppm_goes_through_half_the_size():
    head = CARAFEUPerHead(
        **arguments(**upsample_cfgs((True, False, False), type='nearest'))
    ).eval()
    x = torch.randn(2, 64, 7, 10)
    outs = [x]
    for pool in head.psp_modules:
        half = F.interpolate(pool(x), (4, 5), mode='bilinear')
        outs.append(F.interpolate(half, scale_factor=2)[:, :, :7])
    expected = head.bottleneck(torch.cat(outs, dim=1))
    assert head.psp_forward([x]).equal(expected)


def test_fuse_step_by_step_is_nearest_at_once():
    head = CARAFEUPerHead(
        **arguments(**upsample_cfgs((False, False, True), type='nearest'))
    )
    maps = [
        torch.randn(2, 8, 25 * 32 // s, 17 * 32 // s) for s in (4, 8, 16, 32)
    ]
    expected = [F.interpolate(x, size=maps[0].shape[2:]) for x in maps]
    assert head._fuse(maps).equal(torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    'kind', ['nearest', 'bilinear', 'deconv', 'pixel_shuffle']
)
def test_upsamplers_of_mmcv(kind):
    kwargs = dict(upsample_kernel=3) if kind == 'pixel_shuffle' else {}
    head = CARAFEUPerHead(
        **arguments(**upsample_cfgs([True] * 3, type=kind, **kwargs))
    )
    assert head(levels(97, 131)).shape == (2, 5, 25, 33)


def test_levels_of_equal_size_after_a_dilated_backbone():
    head = CARAFEUPerHead(**arguments())
    inputs = levels()
    inputs[3] = torch.randn(2, 64, *inputs[2].shape[2:])
    assert head(inputs).shape == (2, 5, 32, 48)


def test_built_by_prefix_from_mmseg():
    head = MODELS.build(dict(type='mmcarafe.CARAFEUPerHead', **arguments()))
    assert type(head) is CARAFEUPerHead


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize(
    'cfg, error',
    [
        (['mmcarafe.CARAFE'], TypeError),
        (dict(up_kernel=5), ValueError),
        (dict(type='mmcarafe.CARAFFE'), ValueError),
        (dict(type='mmcarafe.CARAFE', up_kernel=4), ValueError),
        (dict(type='mmcarafe.CARAFE', kernel=5), ValueError),
    ],
    ids=['list', 'no type', 'unknown type', 'even kernel', 'typo'],
)
def test_bad_config_is_named(place, cfg, error):
    name = f'{place}_upsample_cfg'
    with pytest.raises(error, match=name):
        CARAFEUPerHead(**arguments(**{name: cfg}))
