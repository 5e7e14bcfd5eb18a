"""Put CARAFE into necks and heads that know only interpolation."""

from functools import partial

from mmengine.logging import print_log
from mmengine.model import ModuleDict
from torch import nn

from mmcarafe.models.top_down import TopDown, build_upsamplers
from mmcarafe.models.upsample import UPSAMPLE_CFG, build_upsampler
from mmcarafe.registry import HAS_MMDET, HAS_MMSEG, MODELS


def swap_upsample(model, upsample_cfg=UPSAMPLE_CFG):
    """Replace interpolation by a learned upsampler, in place.

    It is replaced in

    - mmdet's ``FPN`` and ``PAFPN`` and mmseg's ``FPN``, which from then on
      upsample as :class:`mmcarafe.CARAFEFPN` does;
    - mmdet's ``YOLOXPAFPN`` and ``CSPNeXtPAFPN``, with one upsampler for each
      number of channels; image sizes stay multiples of their strides;
    - ``nn.Upsample`` and mmseg's ``Upsample`` by a whole number, behind a
      convolution in the same ``nn.Sequential``, as in ``FPNHead``. A parent
      whose ``init_cfg`` names all convolutions initialises these upsamplers
      too; call their own ``init_weights`` after its.

    What a model interpolates otherwise, such as its logits to the size of the
    image, stays. All other parameters keep their names. The log says what was
    replaced. Call it before the optimizer is built.

    Args:
        model (nn.Module): a whole model or one of its modules.
        upsample_cfg (dict): see
            :func:`mmcarafe.models.upsample.build_upsampler`.

    Returns:
        nn.Module: ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing can be replaced, or ``upsample_cfg`` is wrong;
            ``model`` is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model is a {type(model).__name__}, expected an nn.Module'
        )
    # All upsamplers are built before the first one is put in place.
    swaps = []
    for name, module in model.named_modules():
        plan = _PLANS.get(type(module))
        if plan is None and isinstance(module, nn.Sequential):
            plan = _plan_sequential
        for new, replace in plan(module, upsample_cfg) if plan else []:
            like = next(module.parameters())  # for its device and dtype
            swaps.append((name or type(model).__name__, like, new, replace))
    if not swaps:
        known = ', '.join(
            f'{c.__module__.split(".")[0]}.{c.__name__}' for c in _PLANS
        )
        raise ValueError(
            f'{type(model).__name__} holds no upsampling that can be '
            f'replaced. Known are {known} (not their subclasses), and '
            'upsampling layers behind a convolution in an nn.Sequential. For '
            'a class that interpolates in its own forward, write a subclass '
            'that calls mmcarafe.models.upsample.build_upsampler there, as '
            'mmcarafe/models/fpn.py does.'
        )
    for name, like, new, replace in swaps:
        replace(new.to(like).train(model.training))
        print_log(f'mmcarafe: the upsampling in {name} is replaced', 'current')
    return model


@MODELS.register_module(name='swap_upsample')
def build_swapped(of, upsampler=UPSAMPLE_CFG, **kwargs):
    """Build a module of a config and replace its interpolation.

    In a config that inherits the rest of the neck or head::

        neck = dict(type='mmcarafe.swap_upsample', of='YOLOXPAFPN')

    Args:
        of (str): what ``type`` would be without this.
        upsampler (dict): ``upsample_cfg`` of :func:`swap_upsample`; some
            modules have an ``upsample_cfg`` of their own.
        **kwargs: arguments of the module.
    """
    return swap_upsample(MODELS.build(dict(type=of, **kwargs)), upsampler)


# A plan says which new modules serve a module that interpolates, and how each
# is put in place.


def _plan_top_down(cls):
    def plan(fpn, upsample_cfg):
        new = build_upsamplers(fpn, upsample_cfg)

        def replace(new):
            fpn.upsample_modules = new
            fpn.__class__ = cls  # a subclass with another forward

        return [(new, replace)]

    return plan


def _plan_yolox(pafpn, upsample_cfg):
    if not isinstance(pafpn.upsample, nn.Upsample):  # swapped before
        return []
    widths = pafpn.in_channels[:-1]
    new = ByChannels(
        {str(c): build_upsampler(upsample_cfg, c) for c in widths}
    )
    return [(new, partial(setattr, pafpn, 'upsample'))]


def _plan_sequential(layers, upsample_cfg):
    swaps = []
    channels = None
    for index, layer in enumerate(layers):
        scale_factor = _whole_scale_factor(layer)
        if channels and scale_factor:
            new = build_upsampler(upsample_cfg, channels, scale_factor)
            swaps.append((new, partial(layers.__setitem__, index)))
        # of a convolution, and of mmcv's ConvModule
        channels = getattr(layer, 'out_channels', channels)
        if isinstance(layer, _CHANGES_CHANNELS):
            channels = None
    return swaps


def _whole_scale_factor(layer):
    """S of an upsampling layer; None if it is none or S is no whole number."""
    if not isinstance(layer, _LAYERS) or layer.scale_factor is None:
        return None
    scale_factor = layer.scale_factor
    if not isinstance(scale_factor, tuple):
        scale_factor = (scale_factor, scale_factor)
    height, width = scale_factor
    return int(height) if height == width == int(height) else None


class ByChannels(ModuleDict):
    """Upsamplers for maps of several widths, where one module served all."""

    def forward(self, x):
        return self[str(int(x.shape[1]))](x)  # int: of a traced size


_PLANS = {}
_LAYERS = (nn.Upsample,)
# or may, so that how many leave them is not known
_CHANGES_CHANNELS = (nn.Sequential, nn.PixelShuffle, nn.PixelUnshuffle)
if HAS_MMDET:
    from mmdet.models import necks

    from mmcarafe.models.fpn import CARAFEFPN, CARAFEPAFPN

    _PLANS[necks.FPN] = _plan_top_down(CARAFEFPN)
    _PLANS[necks.PAFPN] = _plan_top_down(CARAFEPAFPN)
    _PLANS[necks.YOLOXPAFPN] = _plan_yolox
    _PLANS[necks.CSPNeXtPAFPN] = _plan_yolox
if HAS_MMSEG:
    from mmseg.models.necks import FPN
    from mmseg.models.utils import Upsample

    class SegFPN(TopDown, FPN):
        """mmseg's FPN after :func:`swap_upsample`."""

    _PLANS[FPN] = _plan_top_down(SegFPN)
    _LAYERS += (Upsample,)
