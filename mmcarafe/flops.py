"""What CARAFE costs, for mmengine's counter of operations.

Only the weighted sum over the K*K taps counts, a multiply-add as 1; the
normaliser does not, as no softmax does. torch's own counter needs none of
this: it knows the operator.
"""

import math

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape


def _multiply_adds(inputs, outputs):
    taps = get_shape(inputs[1])[2]  # [N, G, K*K, S, S, H, W]
    return taps * math.prod(get_shape(outputs[0]))


def enable() -> None:
    """Let mmengine's analyzers count the operator, if created from now on."""
    flops = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    activations = complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS
    flops['mmcarafe::reassemble'] = _multiply_adds
    activations['mmcarafe::reassemble'] = generic_activation_jit()
