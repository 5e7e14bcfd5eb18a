"""What CARAFE costs, for mmengine's counter of operations.

Counted is the weighted sum over K*K taps, a multiply-add as 1. The normaliser
is not, as softmax is nowhere. torch's counter knows the operator anyhow.
"""

import math

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape


def _multiply_adds(inputs, outputs):
    taps = get_shape(inputs[1])[2]  # [N, G, K*K, S, S, H, W]
    return taps * math.prod(get_shape(outputs[0]))


def enable() -> None:
    """Let mmengine's analyzers count the operator, those made from now on."""
    flops = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    activations = complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS
    flops['mmcarafe::reassemble'] = _multiply_adds
    activations['mmcarafe::reassemble'] = generic_activation_jit()
