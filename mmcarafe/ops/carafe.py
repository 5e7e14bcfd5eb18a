r"""The CARAFE operator: contract, checks and registration with torch.

Letters, here and everywhere in the project:

``N`` batch · ``C`` channels · ``H W`` source size · ``K`` kernel_size ·
``G`` groups · ``S`` scale

Content-aware reassembly (Wang et al., `CARAFE: Content-Aware ReAssembly of
FEatures <https://arxiv.org/abs/1905.02188>`_, ICCV 2019, section 3.2) makes
each output pixel the weighted sum of the K×K window around the source pixel
it lies in. For output pixel (S*h + i, S*w + j) of a channel c of group g:

.. math::
    y_{c, Sh+i, Sw+j} = \sum_{k=0}^{K^2-1} weight_{g,k,i,j,h,w} \cdot
        x_{c,\; h + \lfloor k/K \rfloor - \lfloor K/2 \rfloor,\;
           w + k \bmod K - \lfloor K/2 \rfloor}

Taps outside the map read zero, and the other weights stay as they are.

Three operators are registered, ``torch.ops.mmcarafe.carafe``,
``carafe_grad_features`` and ``carafe_grad_weights``. They take the weights as
``Tensor[N, G, K*K, S, S, H, W]``, which is a view, never a copy, of both masks
and logits; K, G and S are read off its shape. Without a normaliser all three
are linear in each argument and are each other's derivatives, so gradients of
any order exist.
"""

import math

import torch
from torch import Tensor
from torch.utils import flop_counter

from mmcarafe.ops import export, reference

NORMALIZERS = ('softmax', 'sigmoid_normalized', 'sigmoid', None)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def carafe(
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 2,
) -> Tensor:
    """Upsample features with ready reassembly weights.

    The contract is that of ``mmcv.ops.carafe``, on any device, for any
    strides. fp16 and bf16 accumulate in fp32. Gradients of any order exist.
    The formula stands at the top of this module (section 3.2 of the paper).

    Args:
        features (Tensor[N, C, H, W]): floating-point feature map. N may be 0.
        masks (Tensor[N, G*K*K, S*H, S*W]): normalised reassembly weights,
            group-major, then row-major over the K×K window. Same dtype and
            device as features (under autocast the wider dtype of both wins).
        kernel_size (int): K, odd, in source pixels.
        group_size (int): G, the number of channel groups with weights of
            their own. Divides C.
        scale_factor (int): S >= 1.

    Returns:
        Tensor[N, C, S*H, S*W]: upsampled features, in the dtype and memory
        format of ``features``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    k2 = _check_hyperparameters(kernel_size, group_size, scale_factor) ** 2
    _check_features(features, group_size)
    _check_weights(
        'masks',
        masks,
        features,
        ('G*K*K', group_size * k2),
        ('S*H, S*W', scale_factor),
    )
    weights = reference.weights_from_masks(
        masks, kernel_size, group_size, scale_factor
    )
    return _reassemble(
        features, weights, None, kernel_size, group_size, scale_factor
    )


def carafe_from_logits(
    features: Tensor,
    logits: Tensor,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 2,
    normalizer: 'str | None' = 'softmax',
) -> Tensor:
    """Upsample features with the weights that a network predicts.

    Pixel shuffle, normalisation over the K*K taps (section 3.2 of the paper,
    "kernel normalizer") and :func:`carafe` in one operator. Training keeps
    features and logits alone for backward.

    Args:
        features (Tensor[N, C, H, W]): as in :func:`carafe`.
        logits (Tensor[N, G*K*K*S*S, H, W]): channel
            ``(g*K*K + k)*S*S + i*S + j`` is tap k of group g for output pixel
            (S*h + i, S*w + j), which is what ``pixel_shuffle`` expects.
        kernel_size (int): as in :func:`carafe`.
        group_size (int): as in :func:`carafe`.
        scale_factor (int): as in :func:`carafe`.
        normalizer (str, optional): ``'softmax'``, ``'sigmoid_normalized'``
            (sigmoids divided by their sum), ``'sigmoid'``, or None for
            logits that are used as they are.

    Returns:
        Tensor[N, C, S*H, S*W]: as in :func:`carafe`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    k2 = _check_hyperparameters(kernel_size, group_size, scale_factor) ** 2
    check_normalizer(normalizer)
    _check_features(features, group_size)
    _check_weights(
        'logits',
        logits,
        features,
        ('G*K*K*S*S', group_size * k2 * scale_factor**2),
        ('H, W', 1),
    )
    weights = reference.weights_from_logits(
        logits, kernel_size, group_size, scale_factor
    )
    return _reassemble(
        features, weights, normalizer, kernel_size, group_size, scale_factor
    )


def _reassemble(features, weights, normalizer, *hyperparameters):
    if torch.onnx.is_in_onnx_export():
        # whose exporters may trace shapes, hence K, G and S as plain ints
        return export.reassemble(
            features, weights, normalizer, *hyperparameters
        )
    return torch.ops.mmcarafe.carafe(features, weights, normalizer)


# Checks: once, here; the operators and their kernels assume validity.


def check_int(name: str, value: int, odd: bool = False) -> None:
    """Raise unless ``value`` is an int >= 1 (and odd, where asked for)."""
    expected = 'an odd int >= 1' if odd else 'an int >= 1'
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f'{name} is a {type(value).__name__}, expected {expected}'
        )
    if value < 1 or (odd and value % 2 == 0):
        raise ValueError(f'{name} is {value}, expected {expected}')


def check_normalizer(normalizer) -> None:
    """Raise unless ``normalizer`` is one of :data:`NORMALIZERS`."""
    if normalizer not in NORMALIZERS:
        raise ValueError(
            f'normalizer is {normalizer!r}, expected one of {NORMALIZERS}'
        )


def _check_hyperparameters(kernel_size, group_size, scale_factor):
    check_int('kernel_size', kernel_size, odd=True)
    check_int('group_size', group_size)
    check_int('scale_factor', scale_factor)
    return kernel_size


def _check_map(name, x):
    if not isinstance(x, Tensor):
        raise TypeError(f'{name} is a {type(x).__name__}, expected a Tensor')
    if x.dim() != 4:
        raise ValueError(
            f'{name} has {x.dim()} dimensions {tuple(x.shape)}, expected 4'
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f'{name} has dtype {x.dtype}, expected one of {DTYPES}'
        )


def _check_features(features, group_size):
    _check_map('features', features)
    _, channels, height, width = features.shape
    # torch.export takes min() of sizes for a fact about them
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(
            f'features has shape {tuple(features.shape)}, '
            'expected C, H and W >= 1'
        )
    if channels % group_size:
        raise ValueError(
            f'features has {channels} channels, '
            f'expected a multiple of group_size = {group_size}'
        )


def _check_weights(name, weights, features, channels, size):
    _check_map(name, weights)
    if weights.device != features.device:
        raise ValueError(
            f'{name} is on {weights.device}, '
            f'expected {features.device}, where features is'
        )
    if weights.dtype != features.dtype and not _autocast_enabled(
        features.device.type
    ):
        raise TypeError(
            f'{name} has dtype {weights.dtype}, '
            f'expected {features.dtype}, as features'
        )
    n, _, height, width = features.shape
    if weights.shape[0] != n:
        raise ValueError(
            f'{name} has batch size {weights.shape[0]}, '
            f'expected {n}, as features'
        )
    letters, expected = channels
    if weights.shape[1] != expected:
        raise ValueError(
            f'{name} has {weights.shape[1]} channels, '
            f'expected {letters} = {expected}'
        )
    letters, scale = size
    expected = (scale * height, scale * width)
    if tuple(weights.shape[2:]) != expected:
        raise ValueError(
            f'{name} has size {tuple(weights.shape[2:])}, '
            f'expected ({letters}) = {expected}'
        )


def _autocast_enabled(device_type):
    if device_type not in ('cpu', 'cuda'):  # where the rule is registered
        return False
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.is_autocast_enabled(device_type)
    if device_type == 'cpu':
        return torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled()


# Registration. Any device gets the reference; a kernel registers itself for
# its own device and takes precedence there.

_LIBRARY = torch.library.Library('mmcarafe', 'DEF')
_LIBRARY.define(
    'carafe(Tensor features, Tensor weights, str? normalizer) -> Tensor'
)
_LIBRARY.define(
    'carafe_grad_features'
    '(Tensor grad, Tensor weights, str? normalizer) -> Tensor'
)
_LIBRARY.define(
    'carafe_grad_weights'
    '(Tensor grad, Tensor features, Tensor weights, str? normalizer) -> Tensor'
)
_OPS = torch.ops.mmcarafe


def _fake(features, weights, normalizer):
    return reference.empty_map(features, features.shape[1], weights.shape[3])


def _fake_grad_features(grad, weights, normalizer):
    return reference.empty_map(grad, grad.shape[1], 1, weights.shape[-2:])


def _fake_grad_weights(grad, features, weights, normalizer):
    return torch.empty_like(weights)


def _autocast_to_widest(features, weights, normalizer):
    # Sums over the window accumulate in fp32 in any case, so no input needs
    # widening; but features and logits may come in two dtypes.
    dtype = torch.promote_types(features.dtype, weights.dtype)
    with torch.autocast(features.device.type, enabled=False):
        return _OPS.carafe(features.to(dtype), weights.to(dtype), normalizer)


class _Carafe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weights, normalizer):
        ctx.save_for_backward(features, weights)
        ctx.normalizer = normalizer
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.carafe(features, weights, normalizer)

    @staticmethod
    def backward(ctx, grad):
        features, weights = ctx.saved_tensors
        to_features, to_weights, _ = ctx.needs_input_grad
        return (
            _OPS.carafe_grad_features(grad, weights, ctx.normalizer)
            if to_features
            else None,
            _OPS.carafe_grad_weights(grad, features, weights, ctx.normalizer)
            if to_weights
            else None,
            None,
        )


class _GradFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weights):
        ctx.save_for_backward(grad, weights)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.carafe_grad_features(grad, weights, None)

    @staticmethod
    def backward(ctx, grad_out):
        grad, weights = ctx.saved_tensors
        return (
            _OPS.carafe(grad_out, weights, None),
            _OPS.carafe_grad_weights(grad, grad_out, weights, None),
        )


class _GradWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, features, weights):
        ctx.save_for_backward(grad, features)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.carafe_grad_weights(grad, features, weights, None)

    @staticmethod
    def backward(ctx, grad_out):
        grad, features = ctx.saved_tensors
        return (
            _OPS.carafe(features, grad_out, None),
            _OPS.carafe_grad_features(grad, grad_out, None),
            None,
        )


# A second derivative goes through the normaliser in plain PyTorch, so that the
# operators need derivatives of their linear form only.


def _autograd_grad_features(grad, weights, normalizer):
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.carafe_grad_features(grad, weights, normalizer)
    # autocast may widen what is normalised here
    weights = reference.normalize(weights, normalizer).to(grad.dtype)
    return _GradFeatures.apply(grad, weights)


def _autograd_grad_weights(grad, features, weights, normalizer):
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.carafe_grad_weights(
                grad, features, weights, normalizer
            )
    grad_weights = _GradWeights.apply(grad, features, weights)
    return reference.normalize_backward(grad_weights, weights, normalizer)


_KERNELS = {
    'carafe': (reference.reassemble, _fake, _Carafe.apply),
    'carafe_grad_features': (
        reference.grad_features,
        _fake_grad_features,
        _autograd_grad_features,
    ),
    'carafe_grad_weights': (
        reference.grad_weights,
        _fake_grad_weights,
        _autograd_grad_weights,
    ),
}
for _name, (_plain, _meta, _autograd) in _KERNELS.items():
    _LIBRARY.impl(_name, _plain, 'CompositeExplicitAutograd')
    _LIBRARY.impl(_name, _meta, 'Meta')
    _LIBRARY.impl(_name, _autograd, 'Autograd')
for _key in ('AutocastCPU', 'AutocastCUDA'):
    _LIBRARY.impl('carafe', _autocast_to_widest, _key)


# What torch's FlopCounterMode counts: K*K multiply-adds, as 2 each, for each
# value of the large map. Softmax counts nowhere.


def _flops(features, weights, normalizer, *, out_shape=None, **kwargs):
    return 2 * weights[2] * math.prod(out_shape)  # [N, G, K*K, S, S, H, W]


def _flops_of_gradient(grad, *others, **kwargs):
    weights = others[-2]  # the last but the normalizer
    return 2 * weights[2] * math.prod(grad)


for _name in _KERNELS:
    _operator = getattr(_OPS, _name)
    _formula = _flops if _name == 'carafe' else _flops_of_gradient
    if hasattr(flop_counter, 'register_flop_formula'):
        flop_counter.register_flop_formula(_operator)(_formula)
    else:  # torch 2.1
        flop_counter.flop_mapping[_operator] = _formula
