"""Run mmcv's own CARAFE on this package's operator.

Importing this module is enough, in any config::

    custom_imports = dict(imports=['mmcarafe.drop_in'])

mmcv's ``carafe``, ``carafe_naive``, ``CARAFE``, ``CARAFENaive`` and
``CARAFEPack`` (``type='carafe'``) then work on every device, in every dtype
and for all strides, even where they were imported earlier; so do mmdet's
``FPN_CARAFE`` and its mask heads. Parameters and state dicts stay mmcv's.

:func:`disable` undoes this and :func:`enable` redoes it; call neither between
a forward pass and its backward pass. torch's old ONNX exporter can export
``CARAFEPack`` only, the new one all of them.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch
from mmengine.logging import print_log

from mmcarafe import flops
from mmcarafe.ops import carafe, carafe_from_logits, reference
from mmcarafe.ops.export import is_compiling

if find_spec('mmcv') is None or find_spec('mmcv._ext') is None:
    raise ImportError(
        'mmcarafe.drop_in replaces the CARAFE of mmcv.ops, but '
        + (
            'mmcv is not installed'
            if find_spec('mmcv') is None
            else 'this mmcv was built without its ops (mmcv-lite?)'
        )
    )

from mmcv.ops.carafe import (  # noqa: E402
    CARAFEFunction,
    CARAFENaiveFunction,
    CARAFEPack,
)


@lru_cache(maxsize=None)
def _announce():
    # Not at import: the run's log does not exist yet.
    print_log("mmcv's CARAFE runs on mmcarafe's operator", 'current')


def _forward(ctx, features, masks, kernel_size, group_size, scale_factor):
    if not is_compiling():
        _announce()
    ctx.save_for_backward(features, masks)
    ctx.arguments = kernel_size, group_size, scale_factor
    return carafe(features, masks, kernel_size, group_size, scale_factor)


def _backward(ctx, grad):
    features, masks = ctx.saved_tensors
    # Under autocast their dtypes may differ; grad has the one that was used.
    weights = reference.scores_from_masks(masks.to(grad.dtype), *ctx.arguments)
    grad_features = grad_masks = None
    if ctx.needs_input_grad[0]:
        grad_features = torch.ops.mmcarafe.reassemble_grad_features(
            grad, weights, None
        ).to(features.dtype)
    if ctx.needs_input_grad[1]:
        grad_weights = torch.ops.mmcarafe.reassemble_grad_weights(
            grad, features.to(grad.dtype), weights, None
        )
        grad_masks = reference.masks_from_scores(grad_weights).to(masks.dtype)
    return grad_features, grad_masks, None, None, None


def _pack_forward(self, x):
    for step in ('kernel_normalizer', 'feature_reassemble'):
        inherited = getattr(type(self), step) is getattr(CARAFEPack, step)
        if not inherited or step in self.__dict__:
            # a subclass or an instance has its own step
            return _ORIGINALS[CARAFEPack, 'forward'](self, x)
    if not is_compiling():
        _announce()
    logits = self.content_encoder(self.channel_compressor(x))
    return carafe_from_logits(
        x, logits, self.up_kernel, self.up_group, self.scale_factor
    )


# `carafe` is a bound `CARAFEFunction.apply`, which looks forward and backward
# up when called, so replacing them also reaches names imported earlier.
_REPLACEMENTS = {
    (CARAFEFunction, 'forward'): staticmethod(_forward),
    (CARAFEFunction, 'backward'): staticmethod(_backward),
    (CARAFENaiveFunction, 'forward'): staticmethod(_forward),
    (CARAFENaiveFunction, 'backward'): staticmethod(_backward),
    (CARAFEPack, 'forward'): _pack_forward,
}
_ORIGINALS = {
    (owner, name): vars(owner)[name] for owner, name in _REPLACEMENTS
}


def enable():
    """Replace mmcv's CARAFE. Importing this module already does so."""
    flops.enable()
    for (owner, name), function in _REPLACEMENTS.items():
        setattr(owner, name, function)


def disable():
    """Restore mmcv's own CARAFE."""
    for (owner, name), function in _ORIGINALS.items():
        setattr(owner, name, function)


enable()
