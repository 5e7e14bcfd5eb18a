"""What CARAFE costs, for mmengine's counter of operations.

Importing this module registers the operator; ``mmcarafe.models`` does so.
Counted is the weighted sum over K*K taps, a multiply-add as 1. The normaliser
is not, as softmax is nowhere. torch's counter knows the operator anyhow.
"""

import math

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape


def _multiply_adds(inputs, outputs):
    taps = get_shape(inputs[1])[2]  # [N, G, K*K, S, S, H, W]
    return taps * math.prod(get_shape(outputs[0]))


# Each analyzer copies these tables when it is made.
for _table, _handle in (
    (complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS, _multiply_adds),
    (complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS, generic_activation_jit()),
):
    _table['mmcarafe::carafe'] = _handle
