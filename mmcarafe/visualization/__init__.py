"""Kernels and features of trained models, to look at."""

from mmcarafe.visualization.kernels import (
    KernelRecorder,
    Record,
    center_of_mass,
    chains,
    entropy,
    principal_colors,
    trace,
)

__all__ = [
    'KernelRecorder',
    'Record',
    'center_of_mass',
    'chains',
    'entropy',
    'principal_colors',
    'trace',
]
