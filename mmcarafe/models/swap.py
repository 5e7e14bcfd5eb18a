"""Put CARAFE into OpenMMLab's necks and heads."""

from functools import partial

from torch import nn

from mmcarafe.models import fpn
from mmcarafe.registry import HAS_MMDET, HAS_MMSEG, MODELS
from mmcarafe.upsamplers import UPSAMPLE_CFG, build_upsampler, swap_upsample
from mmcarafe.upsamplers.swap import CONVOLUTIONS, LAYERS, PLANS, ByChannels


@MODELS.register_module(name='swap_upsample')
def build_swapped(of, upsample_cfg=UPSAMPLE_CFG, **kwargs):
    """Build a module of a config and replace its interpolation.

    In a config that inherits the rest of the neck or head::

        neck = dict(type='mmcarafe.swap_upsample', of='YOLOXPAFPN')

    Args:
        of (str): the ``type`` of the module.
        upsample_cfg (dict | str): see :func:`mmcarafe.swap_upsample`. A dict
            without a type, such as the ``dict(mode='nearest')`` of mmdet's
            FPN, goes to the module, whose interpolation CARAFE then replaces.
        **kwargs: arguments of the module.
    """
    if isinstance(upsample_cfg, dict) and {*upsample_cfg} <= _INTERPOLATION:
        kwargs['upsample_cfg'] = upsample_cfg
        upsample_cfg = UPSAMPLE_CFG
    return swap_upsample(MODELS.build(dict(type=of, **kwargs)), upsample_cfg)


# arguments of torch's interpolation
_INTERPOLATION = {'scale_factor', 'mode', 'align_corners'}


def _plan_top_down(cls):
    def plan(neck, upsample_cfg):
        new = fpn.build_upsamplers(neck, upsample_cfg)

        def replace(new):
            neck.upsample_modules = new
            neck.__class__ = cls  # a subclass with another forward

        return [(new, replace)]

    return plan


def _plan_mask_head(head, upsample_cfg):
    if head.upsample is None:
        return []
    channels = head.conv_out_channels if head.num_convs else head.in_channels
    if head.conv_logits.in_channels != channels:
        raise ValueError(
            f'FCNMaskHead has {channels} channels before its upsampling and '
            f'{head.conv_logits.in_channels} after it, expected as many'
        )
    new = build_upsampler(upsample_cfg, channels, head.scale_factor)

    def replace(new):
        head.upsample = new
        head.upsample_method = 'mmcarafe'  # 'deconv' would add a ReLU

    return [(new, replace)]


def _plan_yolox(pafpn, upsample_cfg):
    if not isinstance(pafpn.upsample, nn.Upsample):  # swapped already
        return []
    widths = pafpn.in_channels[:-1]
    new = ByChannels(
        {str(c): build_upsampler(upsample_cfg, c) for c in widths}
    )
    return [(new, partial(setattr, pafpn, 'upsample'))]


if HAS_MMDET or HAS_MMSEG:
    from mmcv.cnn import ConvModule

    CONVOLUTIONS.append(ConvModule)
if HAS_MMDET:
    from mmdet.models import necks
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    PLANS[necks.FPN] = _plan_top_down(fpn.CARAFEFPN)
    PLANS[necks.PAFPN] = _plan_top_down(fpn.CARAFEPAFPN)
    PLANS[necks.YOLOXPAFPN] = _plan_yolox
    PLANS[necks.CSPNeXtPAFPN] = _plan_yolox
    PLANS[FCNMaskHead] = _plan_mask_head
if HAS_MMSEG:
    from mmseg.models.necks import FPN
    from mmseg.models.utils import Upsample

    PLANS[FPN] = _plan_top_down(fpn.SegFPN)
    LAYERS.append(Upsample)
