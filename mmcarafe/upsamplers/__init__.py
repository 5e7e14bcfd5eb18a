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

__all__ = [
    'CARAFE',
    'COMPARED',
    'UPSAMPLE_CFG',
    'UPSAMPLERS',
    'DynamicFilter',
    'PixelShuffle',
    'build_upsampler',
    'match_size',
]
