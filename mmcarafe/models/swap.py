"""Put CARAFE into necks and heads that know only interpolation."""

from functools import partial

from mmengine.logging import print_log
from mmengine.model import ModuleDict
from torch import nn

from mmcarafe.models import fpn
from mmcarafe.registry import HAS_MMDET, HAS_MMSEG, MODELS
from mmcarafe.upsamplers import CARAFE, UPSAMPLE_CFG, build_upsampler


def swap_upsample(model, upsample_cfg=UPSAMPLE_CFG):
    """Replace interpolation by a learned upsampler, in place.

    It is replaced in:

    - mmdet's ``FPN`` and ``PAFPN`` and mmseg's ``FPN``, which from then on
      upsample as :class:`mmcarafe.CARAFEFPN` does;
    - mmdet's ``YOLOXPAFPN`` and ``CSPNeXtPAFPN``, with one upsampler for each
      number of channels; image sizes must still be multiples of the strides;
    - mmdet's ``FCNMaskHead``, in place of its interpolation, or of its
      deconvolution with the ReLU after it;
    - ``nn.Upsample`` and mmseg's ``Upsample`` by a whole number, after a
      convolution in the same ``nn.Sequential``, as in ``FPNHead``; only
      PyTorch's layers that keep the channels may stand between the two.

    Other interpolation stays, such as that of the logits to the size of the
    image. So does the ``backbone``, which was pretrained as it is; to replace
    its layers (HRNet's), pass it as ``model``. All other parameters keep their
    names. The log says what was replaced. Call this before you build the
    optimizer and before you wrap the model in DistributedDataParallel.
    ``init_weights`` of the model reaches each new :class:`mmcarafe.CARAFE`.

    Args:
        model (nn.Module): a whole model or one of its modules.
        upsample_cfg (dict | str): see :func:`mmcarafe.build_upsampler`. The
            output has as many channels as the input.

    Returns:
        nn.Module: ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing can be replaced, or ``upsample_cfg`` is wrong;
            ``model`` is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model is a {type(model).__name__}, expected an nn.Module'
        )
    if isinstance(upsample_cfg, dict) and 'out_channels' in upsample_cfg:
        raise ValueError(
            f'upsample_cfg is {dict(upsample_cfg)}, expected no out_channels: '
            'the next layer takes as many channels as before'
        )
    # All upsamplers are built before the first one is put in place.
    swaps = []
    for name, module in model.named_modules():
        if 'backbone' in name.split('.'):
            continue
        plan = _PLANS.get(type(module))
        if plan is None and isinstance(module, nn.Sequential):
            plan = _plan_sequential
        for new, replace in plan(module, upsample_cfg) if plan else []:
            like = next(module.parameters())  # for its device and dtype
            swaps.append((name, like, new, replace))
    if not swaps:
        known = ', '.join(
            f'{c.__module__.split(".")[0]}.{c.__name__}' for c in _PLANS
        )
        raise ValueError(
            f'{type(model).__name__} holds no upsampling that can be '
            'replaced outside its backbone. Supported are '
            f'{known} (not their subclasses), and '
            'upsampling layers after a convolution in an nn.Sequential. For '
            'a class that interpolates in its own forward, write a subclass '
            'that calls mmcarafe.build_upsampler there, as '
            'mmcarafe/models/fpn.py does. UPerHead has one: '
            "type='mmcarafe.CARAFEUPerHead'."
        )
    for name, like, new, replace in swaps:
        replace(new.to(like).train(model.training))
        _pass_on_init(model, name)
        where = name or type(model).__name__
        print_log(
            f'mmcarafe: the upsampling in {where} is replaced', 'current'
        )
    return model


@MODELS.register_module(name='swap_upsample')
def build_swapped(of, upsample_cfg=UPSAMPLE_CFG, **kwargs):
    """Build a module of a config and replace its interpolation.

    In a config that inherits the rest of the neck or head::

        neck = dict(type='mmcarafe.swap_upsample', of='YOLOXPAFPN')

    Args:
        of (str): the ``type`` of the module.
        upsample_cfg (dict | str): see :func:`swap_upsample`. A dict without a
            type, such as the ``dict(mode='nearest')`` of mmdet's FPN, goes to
            the module, whose interpolation CARAFE then replaces.
        **kwargs: arguments of the module.
    """
    if isinstance(upsample_cfg, dict) and {*upsample_cfg} <= _INTERPOLATION:
        kwargs['upsample_cfg'] = upsample_cfg
        upsample_cfg = UPSAMPLE_CFG
    return swap_upsample(MODELS.build(dict(type=of, **kwargs)), upsample_cfg)


def _pass_on_init(model, name):
    """Let mmengine's init_weights get through PyTorch's own containers.

    mmengine initialises all convolutions below a module by its init_cfg, then
    calls init_weights of its children, which PyTorch's containers lack.
    """
    parts = name.split('.') if name else []
    for end in range(1, len(parts) + 1):
        container = model.get_submodule('.'.join(parts[:end]))
        if not hasattr(container, 'init_weights'):
            container.init_weights = partial(_init_carafes, container)


def _init_carafes(container):
    for module in container.modules():
        if isinstance(module, CARAFE):
            module.init_weights()


# A plan gives the new modules for a module that interpolates, each with the
# function that puts it in place.


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


def _plan_sequential(layers, upsample_cfg):
    swaps = []
    channels = None
    for index, layer in enumerate(layers):
        scale_factor = _whole_scale_factor(layer)
        if channels and scale_factor:
            new = build_upsampler(upsample_cfg, channels, scale_factor)
            swaps.append((new, partial(layers.__setitem__, index)))
        if isinstance(layer, _CONVOLUTIONS):
            channels = layer.out_channels
        elif not _keeps_channels(layer):
            channels = None
    return swaps


def _keeps_channels(layer):
    parent, _, name = type(layer).__module__.rpartition('.')
    if isinstance(layer, (nn.GLU, nn.MultiheadAttention)):
        return False
    return isinstance(layer, (nn.Identity, *_LAYERS)) or (
        parent == 'torch.nn.modules' and name in _KEEP_CHANNELS
    )


def _whole_scale_factor(layer):
    """S of a layer that upsamples by a whole number, else None."""
    if not isinstance(layer, _LAYERS) or layer.scale_factor is None:
        return None
    scale_factor = layer.scale_factor
    if not isinstance(scale_factor, tuple):
        scale_factor = (scale_factor, scale_factor)
    s = int(scale_factor[0])
    return s if s > 1 and scale_factor == (s, s) else None


class ByChannels(ModuleDict):
    """An upsampler per number of channels, where one module served all."""

    def forward(self, x):
        return self[str(int(x.shape[1]))](x)  # int: it may be traced


# arguments of torch's interpolation
_INTERPOLATION = {'scale_factor', 'mode', 'align_corners'}
_PLANS = {}
_LAYERS = (nn.Upsample,)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# files of torch.nn.modules whose layers keep the channels
_KEEP_CHANNELS = ('activation', 'batchnorm', 'dropout', 'instancenorm')
_KEEP_CHANNELS += ('normalization', 'padding', 'pooling')
if HAS_MMDET or HAS_MMSEG:
    from mmcv.cnn import ConvModule

    _CONVOLUTIONS += (ConvModule,)
if HAS_MMDET:
    from mmdet.models import necks
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    _PLANS[necks.FPN] = _plan_top_down(fpn.CARAFEFPN)
    _PLANS[necks.PAFPN] = _plan_top_down(fpn.CARAFEPAFPN)
    _PLANS[necks.YOLOXPAFPN] = _plan_yolox
    _PLANS[necks.CSPNeXtPAFPN] = _plan_yolox
    _PLANS[FCNMaskHead] = _plan_mask_head
if HAS_MMSEG:
    from mmseg.models.necks import FPN
    from mmseg.models.utils import Upsample

    _PLANS[FPN] = _plan_top_down(fpn.SegFPN)
    _LAYERS += (Upsample,)
