"""swap_upsample, against the modules whose interpolation it replaces."""

import copy

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.testing import assert_close

import mmcarafe
from mmcarafe import CARAFE, swap_upsample

CHANNELS = [8, 16, 32]
CARAFE_CFG = dict(type='mmcarafe.CARAFE', compressed_channels=4)


def levels(sizes=((16, 24), (8, 12), (4, 6)), channels=CHANNELS):
    return tuple(torch.randn(2, c, *s) for c, s in zip(channels, sizes))


def build(scope, **cfg):
    pytest.importorskip(scope)
    init_default_scope(scope)
    return MODELS.build(cfg).eval()


def fpn(scope='mmdet', **cfg):
    defaults = dict(
        type='FPN', in_channels=CHANNELS, out_channels=8, num_outs=5
    )
    return build(scope, **{**defaults, **cfg})


def pafpn(**cfg):
    return fpn(type='PAFPN', **cfg)


def yolox(**cfg):
    defaults = dict(
        type='YOLOXPAFPN',
        in_channels=CHANNELS,
        out_channels=8,
        num_csp_blocks=1,
    )
    return build('mmdet', **{**defaults, **cfg})


def fpn_head():
    return build(
        'mmseg',
        type='FPNHead',
        in_channels=CHANNELS,
        in_index=[0, 1, 2],
        feature_strides=[4, 8, 16],
        channels=8,
        num_classes=3,
    )


NEAREST = {
    'fpn': fpn,
    'fpn_relu': lambda: fpn(
        add_extra_convs='on_input', relu_before_extra_convs=True
    ),
    'pafpn': pafpn,
    'pafpn_on_input': lambda: pafpn(
        add_extra_convs='on_input', relu_before_extra_convs=True
    ),
    'pafpn_on_lateral': lambda: pafpn(add_extra_convs='on_lateral'),
    'pafpn_on_output': lambda: pafpn(
        add_extra_convs='on_output', start_level=1, num_outs=4
    ),
    'yolox': yolox,
    'cspnext': lambda: yolox(type='CSPNeXtPAFPN'),
    'seg_fpn': lambda: fpn('mmseg'),
    'seg_fpn_on_output': lambda: fpn('mmseg', add_extra_convs='on_output'),
}


@pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated')
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False')
@pytest.mark.parametrize('name', [*NEAREST, 'fpn_head'])
def test_only_the_upsampling_changes(name):
    """With the interpolation that was there, all is as it was."""
    model = NEAREST.get(name, fpn_head)()
    mode = 'bilinear' if name == 'fpn_head' else 'nearest'
    inputs = levels()
    with torch.no_grad():
        expected = model(inputs)
        names = set(model.state_dict())
        assert swap_upsample(model, dict(type=mode)) is model
        assert_close(model(inputs), expected, rtol=0, atol=0)
    assert set(model.state_dict()) == names


@pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated')
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False')
@pytest.mark.parametrize('name', [*NEAREST, 'fpn_head'])
def test_carafe_learns(name):
    model = NEAREST.get(name, fpn_head)().train()
    names = set(model.state_dict())
    swap_upsample(model, CARAFE_CFG)
    model.init_weights()
    added = [m for m in model.modules() if isinstance(m, CARAFE)]
    assert added
    for module in added:
        assert module.training
        std = module.content_encoder.weight.std().item()
        assert std == pytest.approx(0.001, rel=0.1)
    assert names < set(model.state_dict())
    outs = model(levels())
    sum(x.sum() for x in outs).backward()
    for parameter in (p for m in added for p in m.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize('name', ['fpn', 'pafpn', 'seg_fpn'])
def test_odd_sizes(name):
    model = swap_upsample(NEAREST[name](), CARAFE_CFG)
    outs = model(levels([(25, 33), (13, 17), (7, 9)]))
    assert [tuple(x.shape[2:]) for x in outs[:3]] == [
        (25, 33),
        (13, 17),
        (7, 9),
    ]


def test_fpn_becomes_carafe_fpn():
    model = swap_upsample(fpn(), CARAFE_CFG)
    assert type(model) is mmcarafe.CARAFEFPN
    assert type(swap_upsample(pafpn())) is mmcarafe.CARAFEPAFPN


def test_pafpn_of_a_config():
    cfg = dict(type='mmcarafe.CARAFEPAFPN', upsample_cfg=dict(type='nearest'))
    plain = pafpn()
    model = fpn(**cfg)
    model.load_state_dict(plain.state_dict())
    inputs = levels()
    assert_close(model(inputs), plain(inputs), rtol=0, atol=0)


def test_upsampling_layers_in_a_sequence():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Upsample(None, 4.0)),
        nn.Conv2d(6, 6, 1),
        nn.Upsample(scale_factor=(2, 2)),
        nn.Upsample(scale_factor=1.5),
        nn.Upsample(size=(7, 7)),
        nn.Upsample(scale_factor=1),
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.Upsample(scale_factor=(1, 2))),
    ).double()
    swap_upsample(model, CARAFE_CFG)
    inner, outer = model[1][2], model[3]
    assert (inner.channels, inner.scale_factor) == (6, 4)
    assert (outer.channels, outer.scale_factor) == (6, 2)
    assert inner.content_encoder.weight.dtype == torch.float64
    assert isinstance(model[4], nn.Upsample)
    assert isinstance(model[5], nn.Upsample)
    assert isinstance(model[6], nn.Upsample)
    assert isinstance(model[7][1], nn.Upsample)
    x = torch.randn(1, 3, 2, 5, dtype=torch.float64)
    assert model(x).shape == (1, 6, 7, 14)


def test_a_whole_model(capfd):
    MMLogger.get_instance('test_swap', log_level='INFO')
    model = nn.ModuleDict(dict(neck=pafpn(), head=nn.Conv2d(8, 1, 1)))
    swap_upsample(model, CARAFE_CFG)
    assert len(model.neck.upsample_modules) == 2
    assert 'the upsampling in neck is replaced' in ''.join(capfd.readouterr())


@pytest.mark.parametrize('build', [yolox, pafpn])
def test_what_was_swapped_stays(build):
    model = swap_upsample(build(), CARAFE_CFG)
    before = list(model.modules())
    with pytest.raises(ValueError, match='holds no upsampling'):
        swap_upsample(model, dict(type='nearest'))
    assert list(model.modules()) == before


def test_channels_that_are_not_known():
    """Behind a layer that is no convolution and may change them."""
    from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule

    up = nn.Upsample(scale_factor=2)
    conv = nn.Conv2d(3, 8, 1)
    for before in (
        [conv, nn.PixelShuffle(2)],
        [conv, nn.Sequential(nn.Conv2d(8, 4, 1))],
        [conv, DepthwiseSeparableConvModule(8, 16, 1)],
        [conv, nn.GLU(1)],
        [conv, nn.Flatten(0, 1)],
        [nn.Conv1d(3, 8, 1)],
    ):
        with pytest.raises(ValueError, match='holds no upsampling'):
            swap_upsample(nn.Sequential(*before, up))
    keeps = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout2d()
    keeps += nn.Identity(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.SiLU()
    model = swap_upsample(nn.Sequential(conv, *keeps, up))
    assert model[-1].channels == 8
    assert model(torch.zeros(2, 3, 4, 6)).shape == (2, 8, 8, 10)
    # its offsets are predicted by another convolution, inside
    deformable = ConvModule(3, 8, 3, padding=1, conv_cfg=dict(type='DCNv2'))
    model = swap_upsample(nn.Sequential(deformable, up), CARAFE_CFG)
    assert model[1].channels == 8


@pytest.mark.parametrize(
    'upsample_cfg, kernel_size',
    [
        # the module's own upsample_cfg, as in the base config
        (dict(scale_factor=2, mode='nearest'), 5),
        (dict(type='mmcarafe.CARAFE', up_kernel=3), 3),
        ('mmcarafe.CARAFE', 5),
    ],
    ids=str,
)
def test_in_a_config(upsample_cfg, kernel_size):
    neck = yolox(
        type='mmcarafe.swap_upsample',
        of='YOLOXPAFPN',
        upsample_cfg=upsample_cfg,
    )
    new = [m for m in neck.modules() if isinstance(m, CARAFE)]
    assert {m.channels for m in new} == {8, 16}
    assert {m.up_kernel for m in new} == {kernel_size}


def test_in_a_config_that_merges_into_the_modules_own():
    cfg = dict(mode='nearest', type='mmcarafe.CARAFE')
    with pytest.raises(ValueError, match=r'upsample_cfg=dict\(_delete_=True'):
        yolox(type='mmcarafe.swap_upsample', of='YOLOXPAFPN', upsample_cfg=cfg)


@pytest.mark.parametrize(
    'upsample_cfg',
    [
        dict(type='deconv', scale_factor=2),
        dict(type='bilinear', scale_factor=2),
    ],
    ids=str,
)
def test_mask_head(upsample_cfg):
    """Step by step; the deconvolution's ReLU goes with it."""
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    def build():
        return FCNMaskHead(
            num_convs=2,
            in_channels=6,
            conv_out_channels=8,
            num_classes=3,
            upsample_cfg=upsample_cfg,
        )

    plain, head = build(), swap_upsample(build(), 'mmcarafe.CARAFE')
    missing, unexpected = head.load_state_dict(
        plain.state_dict(), strict=False
    )
    assert all(name.startswith('upsample.') for name in missing + unexpected)
    head.init_weights()
    assert 0.0009 < head.upsample.content_encoder.weight.std() < 0.0011
    x = torch.randn(2, 6, 7, 7)
    convolved = head.convs[1](head.convs[0](x))
    expected = head.conv_logits(head.upsample(convolved))
    assert torch.equal(head(x), expected)
    assert expected.shape == (2, 3, 14, 14)


def test_the_backbone_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layers = nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2)
            self.backbone = nn.ModuleList([nn.Sequential(*layers)])
            self.head = nn.Sequential(*layers)

    model = swap_upsample(Model(), CARAFE_CFG)
    assert isinstance(model.head[1], CARAFE)
    assert isinstance(model.backbone[0][1], nn.Upsample)
    with pytest.raises(ValueError, match='replaced outside its backbone'):
        swap_upsample(nn.ModuleDict(dict(student=model)), CARAFE_CFG)
    swap_upsample(model.backbone, CARAFE_CFG)
    assert isinstance(model.backbone[0][1], CARAFE)


def test_initialised_behind_a_parent_that_names_all_convolutions():
    """As in SOLOv2's mask head: plain containers in a module of mmengine."""

    def stage():
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2))

    named = dict(type='Normal', layer='Conv2d', std=1.0)
    head, inner = BaseModule(named), BaseModule(named)
    inner.stage = stage()
    head.levels = nn.ModuleList([inner, nn.Sequential(*stage(), *stage())])
    swap_upsample(head, dict(type='bilinear'))
    model = copy.deepcopy(swap_upsample(head, CARAFE_CFG))
    model.init_weights()
    plain = [m for m in model.modules() if type(m) is nn.Sequential]
    assert all(layers[0].weight.std() > 0.5 for layers in plain)
    added = [m for m in model.modules() if isinstance(m, CARAFE)]
    assert len(added) == 3
    for module in added:
        std = module.content_encoder.weight.std().item()
        assert std == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize('of', ['SSDNeck', 'YOLOV3Neck'])
def test_what_is_unknown(of):
    cfg = dict(
        SSDNeck=dict(
            in_channels=[8, 16],
            out_channels=[8, 16, 16],
            level_strides=[2],
            level_paddings=[1],
        ),
        YOLOV3Neck=dict(
            num_scales=2, in_channels=[16, 8], out_channels=[8, 4]
        ),
    )[of]
    with pytest.raises(
        ValueError,
        match=f'{of} holds no upsampling .* mmdet.YOLOXPAFPN.* write a '
        'subclass that calls mmcarafe.build_upsampler',
    ):
        swap_upsample(build('mmdet', type=of, **cfg))


def test_subclasses_are_unknown():
    """They may interpolate elsewhere."""
    model = pafpn()
    model.__class__ = type('Mine', (type(model),), {})
    with pytest.raises(ValueError, match='Mine holds no upsampling'):
        swap_upsample(model)


def test_a_wrong_config_leaves_the_model():
    """The first upsampler can be built, the second cannot."""
    model = nn.Sequential(
        *(nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2)),
        *(nn.Conv2d(8, 6, 1), nn.Upsample(scale_factor=2)),
    )
    before = list(model)
    with pytest.raises(ValueError, match='up_group is 4'):
        swap_upsample(model, dict(type='mmcarafe.CARAFE', up_group=4))
    assert list(model) == before
    with pytest.raises(ValueError, match='expected no out_channels'):
        swap_upsample(model, dict(type='mmcarafe.CARAFE', out_channels=4))
    assert list(model) == before
    with pytest.raises(TypeError, match='model is a dict, expected an nn.Mod'):
        swap_upsample(dict())
