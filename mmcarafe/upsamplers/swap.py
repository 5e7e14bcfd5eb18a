"""Put a learned upsampler wherever a model interpolates.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import sys
from functools import partial
from typing import Callable, NamedTuple

import torch
from torch import nn

from mmcarafe.upsamplers.build import (
    UPSAMPLE_CFG,
    UPSAMPLERS,
    build_upsampler,
)
from mmcarafe.upsamplers.dry_run import dry_run
from mmcarafe.upsamplers.redirect import hide_inner, is_fpn, redirect

# What is known without a dry run; mmcarafe.models.swap adds OpenMMLab's.
# A plan takes a module and upsample_cfg, and gives the new modules, each with
# the function that puts it in place.
PLANS = {}  # class -> plan
LAYERS = [nn.Upsample]  # their whole forward is one interpolation
CONVOLUTIONS = [nn.Conv2d, nn.ConvTranspose2d]

KEPT = ('backbone', 'encoder')  # names of modules that stay as they are
GREATEST_FACTOR = 4  # for 8, CARAFE would predict 25 * 64 weights per pixel
MODES = ('nearest', 'nearest-exact', 'bilinear', 'bicubic')


def swap_upsample(
    model: nn.Module, upsample_cfg=UPSAMPLE_CFG, example_input=None
) -> nn.Module:
    """Replace interpolation by a learned upsampler, in place.

    With ``example_input``, in any model. It is run once with that input, and
    of what it interpolates with ``nn.Upsample`` or ``F.interpolate``, all is
    replaced that

    - lies between layers: one with parameters comes before it, and one after.
      What resizes the image, or the logits to the size of the image, stays;
    - makes maps larger by a whole factor, the same in both directions, from 2
      to 4. A map that was halved from an odd size fits too: the upsampled one
      is cropped to the size that is asked for. What adaptive pooling brought
      to a fixed size stays;
    - is ``'nearest'``, ``'nearest-exact'``, ``'bilinear'`` or ``'bicubic'``;
    - is in no module that is called ``backbone`` or ``encoder``, which was
      pretrained as it is, except torchvision's ``FeaturePyramidNetwork``.

    A layer is replaced as a whole, and what others stored on it is kept, such
    as a YOLO's ``i``, ``f`` and ``type``. One that served maps of several
    numbers of channels becomes one upsampler for each number. A module that
    calls ``F.interpolate`` in its own forward, as the decoder blocks of
    segmentation_models.pytorch do, gets ``upsample_modules``, one for each
    call. It must make the same calls in training, in the same order, and not
    from a function that ``torch.utils.checkpoint`` runs. torchvision's
    ``FeaturePyramidNetwork`` also takes upsamplers that want a guide.
    ``example_input`` should have the size of the images to come: it shows the
    factors of maps that are resized to the size of another one.

    Without ``example_input``, in these (with it, those of mmdet and mmseg are
    replaced in the same way, and first):

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
    names. The log says what was replaced and, with ``example_input``, what was
    left alone and why. Call this before you build the optimizer, compile the
    model or wrap it in DistributedDataParallel. mmengine's ``init_weights``
    reaches each new upsampler.

    Args:
        model (nn.Module): a whole model or one of its modules.
        upsample_cfg (dict | str): see :func:`mmcarafe.build_upsampler`. The
            output has as many channels as the input.
        example_input (Tensor | tuple | list | dict, optional): the argument,
            the arguments, or the arguments by keyword of ``model``. The one
            argument that is itself a tuple or a dict goes into a tuple.

    Returns:
        nn.Module: ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``example_input`` is nothing
            that can be passed on.
        ValueError: nothing can be replaced, ``upsample_cfg`` is wrong, or
            ``model`` fails with ``example_input``; ``model`` is as it was.
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
    if example_input is None:
        swaps, left, inner = _plan_known(model, upsample_cfg, True), [], []
    else:
        found = dry_run(model, example_input)
        swaps, left, inner = _plan_found(model, upsample_cfg, found)
    lines = [
        f'the interpolation in {_where(model, name)} is left alone: {reason}'
        for name, reason in left
    ]
    if not swaps and example_input is None:
        raise ValueError(_nothing_known(model))
    if not swaps:
        why = '; '.join(lines) or 'it interpolates nothing with example_input'
        raise ValueError(
            f'{type(model).__name__} holds no upsampling that can be '
            f'replaced: {why}'
        )
    for swap in swaps:
        new = swap.new.to(swap.device, swap.dtype)
        swap.replace(new.train(model.training))
        _pass_on_init(model, swap.name)
        _say(f'the upsampling in {_where(model, swap.name)} is replaced')
    hide_inner(model, inner)
    for line in lines:
        _say(line)
    return model


class _Swap(NamedTuple):
    name: str  # of the module that interpolated
    new: nn.Module
    replace: Callable
    device: torch.device
    dtype: torch.dtype


def _where(model, name):
    return name or type(model).__name__


def _say(message):
    """To mmengine's current log where mmengine is loaded, else to stdout."""
    logging = sys.modules.get('mmengine.logging')
    if logging:
        logging.print_log(f'mmcarafe: {message}', 'current')
    else:
        print(f'mmcarafe: {message}')


def _nothing_known(model):
    known = [f'{c.__module__.split(".")[0]}.{c.__name__}' for c in PLANS]
    known = f'{", ".join(known)} (not their subclasses), and ' if known else ''
    return (
        f'{type(model).__name__} holds no upsampling that can be '
        f'replaced outside its backbone. Supported are {known}'
        'upsampling layers after a convolution in an nn.Sequential. Pass '
        'example_input, with which all interpolation between layers is found. '
        'Or, for a class that interpolates in its own forward, write a '
        'subclass that calls mmcarafe.build_upsampler there, as '
        'mmcarafe/models/fpn.py does. UPerHead has one: '
        "type='mmcarafe.CARAFEUPerHead'."
    )


def _pass_on_init(model, name):
    """Let mmengine's init_weights get through PyTorch's own containers.

    mmengine initialises all convolutions below a module by its init_cfg, then
    calls init_weights of its children, which PyTorch's containers lack.
    """
    if 'mmengine' not in sys.modules:
        return
    parts = name.split('.') if name else []
    for end in range(1, len(parts) + 1):
        container = model.get_submodule('.'.join(parts[:end]))
        if not hasattr(container, 'init_weights'):
            container.init_weights = partial(_init_upsamplers, container)


def _init_upsamplers(container):
    for module in container.modules():
        if isinstance(module, _INITIALISED):
            module.init_weights()


_INITIALISED = tuple(
    row.cls for row in UPSAMPLERS.values() if hasattr(row.cls, 'init_weights')
)


class Upsamplers(nn.ModuleDict):
    """Upsamplers, for init_weights of mmengine to get through."""

    def init_weights(self):
        _init_upsamplers(self)


class ByChannels(Upsamplers):
    """An upsampler per number of channels, where one module served all."""

    def forward(self, x):
        return self[str(int(x.shape[1]))](x)  # int: it may be traced


# Known classes


def _plan_known(model, upsample_cfg, sequences):
    swaps = []
    for name, module in model.named_modules():
        if 'backbone' in name.split('.'):
            continue
        plan = PLANS.get(type(module))
        if plan is None and sequences and isinstance(module, nn.Sequential):
            plan = _plan_sequential
        for new, replace in plan(module, upsample_cfg) if plan else []:
            like = next(module.parameters())
            swaps.append(_Swap(name, new, replace, like.device, like.dtype))
    return swaps


def _plan_sequential(layers, upsample_cfg):
    swaps = []
    channels = None
    for index, layer in enumerate(layers):
        scale_factor = _whole_scale_factor(layer)
        if channels and scale_factor:
            new = build_upsampler(upsample_cfg, channels, scale_factor)
            swaps.append((new, partial(layers.__setitem__, index)))
        if isinstance(layer, tuple(CONVOLUTIONS)):
            channels = layer.out_channels
        elif not _keeps_channels(layer):
            channels = None
    return swaps


def _keeps_channels(layer):
    parent, _, name = type(layer).__module__.rpartition('.')
    if isinstance(layer, (nn.GLU, nn.MultiheadAttention)):
        return False
    return isinstance(layer, (nn.Identity, *LAYERS)) or (
        parent == 'torch.nn.modules' and name in _KEEP_CHANNELS
    )


# files of torch.nn.modules whose layers keep the channels
_KEEP_CHANNELS = ('activation', 'batchnorm', 'dropout', 'instancenorm')
_KEEP_CHANNELS += ('normalization', 'padding', 'pooling')


def _whole_scale_factor(layer):
    """S of a layer that upsamples by a whole number, else None."""
    if not isinstance(layer, tuple(LAYERS)) or layer.scale_factor is None:
        return None
    scale_factor = layer.scale_factor
    if not isinstance(scale_factor, tuple):
        scale_factor = (scale_factor, scale_factor)
    s = int(scale_factor[0])
    return s if s > 1 and scale_factor == (s, s) else None


# What a dry run has found


def _plan_found(model, upsample_cfg, found):
    """Plan what to do with what a dry run has found.

    Returns:
        tuple: the swaps; for all that is left alone, the name of the module
        and the reason; and the modules that may interpolate afterwards.
    """
    modules = dict(model.named_modules())
    swaps = _plan_known(model, upsample_cfg, False)
    known = tuple(f'{swap.name}.' if swap.name else '' for swap in swaps)
    runs = {}  # name of a module -> number of the call -> each time it ran
    for call in found:
        calls = runs.setdefault(call.name, {})
        calls.setdefault(call.number, []).append(call)
    left = []
    for name, module in modules.items():
        if known and f'{name}.'.startswith(known):
            continue
        if isinstance(module, tuple(LAYERS)) and name not in runs:
            left.append((name, 'the dry run does not see it'))
        chosen = {}
        for number, calls in runs.get(name, {}).items():
            reason = _why_not(module, calls)
            if reason:
                left.append((name, reason))
            else:
                chosen[number] = calls
        if chosen:
            swaps.append(_plan_module(model, name, upsample_cfg, chosen))
    inner = [modules[name] for name in runs]
    for swap in swaps:
        is_layer = isinstance(modules[swap.name], tuple(LAYERS))
        inner.append(swap.new if is_layer else modules[swap.name])
    return swaps, left, inner


def _plan_module(model, name, upsample_cfg, chosen):
    """The swap of a module's chosen calls, given by their numbers."""
    module = model.get_submodule(name)
    build = partial(_build, upsample_cfg, _where(model, name), is_fpn(module))
    if isinstance(module, tuple(LAYERS)):
        new = build(chosen[0])
        replace = partial(_replace_layer, model, module)
    else:
        new = Upsamplers({str(n): build(chosen[n]) for n in chosen})
        factors = {str(n): _scale_factor(chosen[n][0]) for n in chosen}
        replace = partial(redirect, module, factors)
    device = next(iter(chosen.values()))[0].device
    # not of the map: autocast may be on
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return _Swap(name, new, replace, device, dtype)


def _why_not(module, calls):
    """Why calls of the same number are left alone; None if they are not."""
    for part in calls[0].name.split('.'):
        if part in KEPT and not is_fpn(module):
            return f'it is in the {part}'
    if 'forward' in vars(module):
        return 'somebody set another forward on this instance'
    if hasattr(module, 'upsample_modules'):
        return 'the module has upsample_modules already'
    if isinstance(module, tuple(LAYERS)) and module.scale_factor is None:
        return f'its size is fixed: {module.size}'
    for call in calls:
        size, out_size = call.shape[2:], call.out_shape[2:]
        if len(size) != 2:
            return f'it takes {len(call.shape)} dimensions, not 4'
        if call.mode not in MODES:
            return f'its mode is {call.mode!r}'
        if not call.before:
            return 'it resizes the input: no layer with parameters precedes it'
        if not call.after:
            return 'it resizes the output: no layer with parameters follows it'
        sizes = f'from {size[0]}x{size[1]} to {out_size[0]}x{out_size[1]}'
        if call.pooled:
            return 'its input was pooled to a fixed size'
        if call.to_size and 1 in size:
            return f'{sizes} does not tell the factor'
        scale_factor = _scale_factor(call)
        if scale_factor is None:
            return f'{sizes} is no whole factor above 1 in both directions'
        if scale_factor > GREATEST_FACTOR:
            return f'its factor {scale_factor} is above {GREATEST_FACTOR}'
    factors = sorted({_scale_factor(call) for call in calls})
    if len(factors) > 1:
        return f'its factor is one of {factors}'
    return None


def _scale_factor(call):
    """S of a call that upsamples by a whole factor, else None."""
    sizes = list(zip(call.shape[2:], call.out_shape[2:]))
    s = -(-sizes[0][1] // sizes[0][0])
    too_large = [s * length - out for length, out in sizes]
    # a size may be that of a map that was halved from an odd size
    allowed = range(s if call.to_size else 1)
    return s if s > 1 and all(t in allowed for t in too_large) else None


def _build(upsample_cfg, where, guided, calls):
    """An upsampler for calls of the same number."""
    upsamplers = {
        str(channels): build_upsampler(
            upsample_cfg,
            channels,
            _scale_factor(calls[0]),
            f'upsample_cfg for {where}',
            guide_channels=channels if guided else None,
        )
        for channels in sorted({call.shape[1] for call in calls})
    }
    if len(upsamplers) > 1:
        return ByChannels(upsamplers)
    return next(iter(upsamplers.values()))


def _replace_layer(model, layer, new):
    own = vars(nn.Upsample())
    for key, value in vars(layer).items():
        # The same dicts of hooks, so that their handles still remove them.
        if key.startswith(('_forward', '_backward')) or (
            key not in own and key not in vars(new)
        ):
            vars(new)[key] = value
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is layer:
                setattr(parent, key, new)
