"""What CARAFE costs, for torch's and mmengine's counters of operations.

Importing this module registers the operators with both; ``mmcarafe.models``
does so. Counted is the weighted sum over K*K taps. The normaliser is not, as
softmax is nowhere. torch counts a multiply-add as 2, mmengine as 1.
"""

import math

import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape
from torch.utils import flop_counter

import mmcarafe.ops  # noqa: F401  (registers the operators counted here)


def _carafe(features, weights, normalizer, *, out_shape=None, **kwargs):
    return 2 * weights[2] * math.prod(out_shape)  # [N, G, K*K, S, S, H, W]


def _grad_features(grad, weights, normalizer, **kwargs):
    return 2 * weights[2] * math.prod(grad)


def _grad_weights(grad, features, weights, normalizer, **kwargs):
    return 2 * weights[2] * math.prod(grad)


def _multiply_adds(inputs, outputs):
    taps = get_shape(inputs[1])[2]  # [N, G, K*K, S, S, H, W]
    return taps * math.prod(get_shape(outputs[0]))


for _operator, _formula in (
    (torch.ops.mmcarafe.carafe, _carafe),
    (torch.ops.mmcarafe.carafe_grad_features, _grad_features),
    (torch.ops.mmcarafe.carafe_grad_weights, _grad_weights),
):
    if hasattr(flop_counter, 'register_flop_formula'):
        flop_counter.register_flop_formula(_operator)(_formula)
    else:  # torch 2.1
        flop_counter.flop_mapping[_operator] = _formula
# Each analyzer copies these tables when it is made.
for _table, _handle in (
    (complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS, _multiply_adds),
    (complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS, generic_activation_jit()),
):
    _table['mmcarafe::carafe'] = _handle
