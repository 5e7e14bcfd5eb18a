"""The three operators registered with torch, and what serves each device.

``torch.ops.mmcarafe.reassemble``, ``reassemble_grad_features`` and
``reassemble_grad_weights`` take ``scores (Tensor[N, G, K*K, S, S, H, W])``,
which is a view, never a copy, of masks or of logits; K, G and S are read off
its shape. Letters are those of :mod:`mmcarafe.ops.carafe`, whose public
functions check all arguments: nothing is checked here.

Without a normaliser all three are linear in each argument and are each
other's derivatives, so gradients of any order exist.
"""

import importlib.machinery
import math
import sys

import torch

from mmcarafe.ops import cpu, reference, triton

_OPS = torch.ops.mmcarafe


class _Meta:
    """Shapes, dtypes and strides alone, for meta and fake tensors."""

    @staticmethod
    def reassemble(features, scores, normalizer, border='zeros'):
        reference.check_options(normalizer, border)
        return reference.empty_map(
            features, features.shape[1], scores.shape[3]
        )

    @staticmethod
    def reassemble_grad_features(grad, scores, normalizer, border='zeros'):
        reference.check_options(normalizer, border)
        return reference.empty_map(grad, grad.shape[1], 1, scores.shape[-2:])

    @staticmethod
    def reassemble_grad_weights(
        grad, features, scores, normalizer, border='zeros'
    ):
        reference.check_options(normalizer, border)
        return torch.empty_like(scores)


class _BelowAutograd:
    """The operators for tensors that no gradient is wanted of.

    They skip one dispatch through Python, which takes as long as the kernel
    of a small map on a GPU.
    """

    @staticmethod
    def reassemble(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.reassemble.default(*args)

    @staticmethod
    def reassemble_grad_features(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.reassemble_grad_features.default(*args)

    @staticmethod
    def reassemble_grad_weights(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.reassemble_grad_weights.default(*args)


class _Reassemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, scores, normalizer, border):
        ctx.save_for_backward(features, scores)
        ctx.options = normalizer, border
        return _BelowAutograd.reassemble(features, scores, normalizer, border)

    @staticmethod
    def backward(ctx, grad):
        features, scores = ctx.saved_tensors
        to_features, to_scores, *_ = ctx.needs_input_grad
        ops = _OPS if torch.is_grad_enabled() else _BelowAutograd
        return (
            ops.reassemble_grad_features(grad, scores, *ctx.options)
            if to_features
            else None,
            ops.reassemble_grad_weights(grad, features, scores, *ctx.options)
            if to_scores
            else None,
            None,
            None,
        )


class _LinearGradFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weights):
        ctx.save_for_backward(grad, weights)
        return _BelowAutograd.reassemble_grad_features(grad, weights, None)

    @staticmethod
    def backward(ctx, grad_out):
        grad, weights = ctx.saved_tensors
        to_grad, to_weights = ctx.needs_input_grad
        return (
            _OPS.reassemble(grad_out, weights, None) if to_grad else None,
            _OPS.reassemble_grad_weights(grad, grad_out, weights, None)
            if to_weights
            else None,
        )


class _LinearGradWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, features, weights):
        ctx.save_for_backward(grad, features)
        return _BelowAutograd.reassemble_grad_weights(
            grad, features, weights, None
        )

    @staticmethod
    def backward(ctx, grad_out):
        grad, features = ctx.saved_tensors
        to_grad, to_features, _ = ctx.needs_input_grad
        return (
            _OPS.reassemble(features, grad_out, None) if to_grad else None,
            _OPS.reassemble_grad_features(grad, grad_out, None)
            if to_features
            else None,
            None,
        )


def _is_differentiated(*tensors):
    if torch.autograd.forward_ad._current_level >= 0:
        return True  # and autograd.Function says that it cannot
    if torch.is_grad_enabled():
        for x in tensors:  # any() takes twice as long
            if x.requires_grad:
                return True
    return False


class _Autograd:
    """A second derivative goes through the normaliser in plain PyTorch.

    So the operators need derivatives of their linear form only.
    """

    @staticmethod
    def reassemble(features, scores, normalizer, border='zeros'):
        if not _is_differentiated(features, scores):
            return _BelowAutograd.reassemble(
                features, scores, normalizer, border
            )
        return _Reassemble.apply(features, scores, normalizer, border)

    @staticmethod
    def reassemble_grad_features(grad, scores, normalizer, border='zeros'):
        if not _is_differentiated(grad, scores):
            return _BelowAutograd.reassemble_grad_features(
                grad, scores, normalizer, border
            )
        wide_grad, scores = map(reference.accumulable, (grad, scores))
        weights = reference.normalize(
            reference.exclude_outside(scores, border), normalizer
        )
        return _LinearGradFeatures.apply(wide_grad, weights).to(grad.dtype)

    @staticmethod
    def reassemble_grad_weights(
        grad, features, scores, normalizer, border='zeros'
    ):
        if not _is_differentiated(grad, features, scores):
            return _BelowAutograd.reassemble_grad_weights(
                grad, features, scores, normalizer, border
            )
        if normalizer is None:
            return _LinearGradWeights.apply(grad, features, scores)
        dtype = scores.dtype
        tensors = map(reference.accumulable, (grad, features, scores))
        grad, features, scores = tensors
        return reference.normalize_backward(
            _LinearGradWeights.apply(grad, features, scores),
            reference.exclude_outside(scores, border),
            normalizer,
        ).to(dtype)


def _autocast_to_widest(features, scores, normalizer, border='zeros'):
    # Sums over the window accumulate in fp32 in any case, so no input needs
    # widening; but features and scores may come in two dtypes.
    dtype = torch.promote_types(features.dtype, scores.dtype)
    with torch.autocast(features.device.type, enabled=False):
        return _OPS.reassemble(
            features.to(dtype), scores.to(dtype), normalizer, border
        )


# What torch's FlopCounterMode counts: K*K multiply-adds, as 2 each, for each
# value of the high map. Softmax is not counted.


def _flops(features, scores, *options, out_shape=None, **kwargs):
    return 2 * scores[2] * math.prod(out_shape)  # [N, G, K*K, S, S, H, W]


def _flops_grad_features(grad, scores, *options, **kwargs):
    return 2 * scores[2] * math.prod(grad)


def _flops_grad_weights(grad, features, scores, *options, **kwargs):
    return 2 * scores[2] * math.prod(grad)


_OPTIONS = 'str? normalizer, str border="zeros") -> Tensor'
OPERATORS = {
    'reassemble': (f'(Tensor features, Tensor scores, {_OPTIONS}', _flops),
    'reassemble_grad_features': (
        f'(Tensor grad, Tensor scores, {_OPTIONS}',
        _flops_grad_features,
    ),
    'reassemble_grad_weights': (
        f'(Tensor grad, Tensor features, Tensor scores, {_OPTIONS}',
        _flops_grad_weights,
    ),
}

# Dispatch key -> what serves it, with functions named as the operators are.
# To add a device, write such a module and add its row.
ANSWERS = {
    'CompositeExplicitAutograd': reference,  # every device without a row
    'CPU': cpu.LIBRARY or reference,
    'CUDA': triton,  # ROCm too
    'Meta': _Meta,
    'Autograd': _Autograd,
}
AUTOCAST_DEVICES = {'cpu': 'AutocastCPU', 'cuda': 'AutocastCUDA'}

_LIBRARY = torch.library.Library('mmcarafe', 'DEF')
for _name, (_schema, _) in OPERATORS.items():
    _LIBRARY.define(_name + _schema)
    for _key, _answers in ANSWERS.items():
        _LIBRARY.impl(_name, getattr(_answers, _name), _key)
for _key in AUTOCAST_DEVICES.values():
    _LIBRARY.impl('reassemble', _autocast_to_widest, _key)

_FLOP_COUNTER = 'torch.utils.flop_counter'


def _register_flops(flop_counter):
    for name, (_, count) in OPERATORS.items():
        if hasattr(flop_counter, 'register_flop_formula'):
            flop_counter.register_flop_formula(getattr(_OPS, name))(count)
        else:  # torch 2.1
            flop_counter.flop_mapping[getattr(_OPS, name)] = count


class _FlopCounterFinder:
    """Tells torch's counter of the operators when somebody imports it.

    It imports triton, which takes five times as long as all of this package.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _FLOP_COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register_flops(module)

            spec.loader.exec_module = execute_and_register
        return spec


if _FLOP_COUNTER in sys.modules:
    _register_flops(importlib.import_module(_FLOP_COUNTER))
else:
    sys.meta_path.insert(0, _FlopCounterFinder)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device that has a rule for it here."""
    if device_type not in AUTOCAST_DEVICES:
        return False
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.is_autocast_enabled(device_type)
    if device_type == 'cpu':
        return torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled()
