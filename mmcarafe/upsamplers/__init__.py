"""Upsamplers for any PyTorch model. torch is all that they need."""

from mmcarafe.upsamplers.build import (
    COMPARED,
    UPSAMPLE_CFG,
    UPSAMPLERS,
    PixelShuffle,
    build_upsampler,
)
from mmcarafe.upsamplers.carafe import CARAFE
from mmcarafe.upsamplers.dynamic_filter import DynamicFilter
from mmcarafe.upsamplers.dysample import DySample
from mmcarafe.upsamplers.eucb import EUCB
from mmcarafe.upsamplers.freqfusion import FreqFusion
from mmcarafe.upsamplers.meet import match_size, upsample_to_meet
from mmcarafe.upsamplers.sapa import SAPA
from mmcarafe.upsamplers.swap import swap_upsample

__all__ = [
    'CARAFE',
    'COMPARED',
    'SAPA',
    'UPSAMPLE_CFG',
    'UPSAMPLERS',
    'DySample',
    'EUCB',
    'DynamicFilter',
    'FreqFusion',
    'PixelShuffle',
    'build_upsampler',
    'match_size',
    'swap_upsample',
    'upsample_to_meet',
]
