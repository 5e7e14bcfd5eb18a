"""Upsamplers for any PyTorch model. torch is all that they need."""

from mmcarafe.upsamplers.build import (
    COMPARED,
    UPSAMPLE_CFG,
    UPSAMPLERS,
    PixelShuffle,
    build_upsampler,
    match_size,
)
from mmcarafe.upsamplers.carafe import CARAFE
from mmcarafe.upsamplers.dynamic_filter import DynamicFilter
from mmcarafe.upsamplers.dysample import DySample

__all__ = [
    'CARAFE',
    'COMPARED',
    'UPSAMPLE_CFG',
    'UPSAMPLERS',
    'DySample',
    'DynamicFilter',
    'PixelShuffle',
    'build_upsampler',
    'match_size',
]
