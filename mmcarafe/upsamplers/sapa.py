"""SAPA: similarity-aware point affiliation.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import math

import torch
from torch import Tensor, nn

from mmcarafe.ops import carafe, window_similarity
from mmcarafe.ops.carafe import check_int
from mmcarafe.upsamplers.meet import check_guide


class SAPA(nn.Module):
    """Upsample with kernels that compare a finer map, the guide, with x.

    `SAPA: Similarity-Aware Point Affiliation for Feature Upsampling
    <https://arxiv.org/abs/2209.12866>`_: both maps are normalised and
    projected to a few channels; the weight of a tap is the softmax over the
    K×K window of the product of an output pixel's projection of the guide with
    the tap's projection of x. x itself is reassembled with these weights.

    Parameter names are those of the public implementation, so its state dicts
    load.

    Args:
        in_channels (int): C, of x.
        guide_channels (int, optional): of the guide; by default C.
        scale_factor (int): S.
        up_kernel (int): K, odd.
        embedding_channels (int, optional): of the projections. None compares
            the normalised maps themselves ("SAPA-I"), which then need equal
            channels.
    """

    guided = True

    def __init__(
        self,
        in_channels,
        guide_channels=None,
        scale_factor=2,
        up_kernel=5,
        embedding_channels=32,
    ):
        super().__init__()
        if guide_channels is None:
            guide_channels = in_channels
        check_int('in_channels', in_channels)
        check_int('guide_channels', guide_channels)
        check_int('scale_factor', scale_factor)
        check_int('up_kernel', up_kernel, odd=True)
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.norm_y = _norm(guide_channels)
        self.norm_x = _norm(in_channels)
        if embedding_channels is None:
            if guide_channels != in_channels:
                raise ValueError(
                    f'guide_channels is {guide_channels} and '
                    'embedding_channels None, expected as many as '
                    f'in_channels = {in_channels}'
                )
            self.q = self.k = None
        else:
            check_int('embedding_channels', embedding_channels)
            self.q = nn.Conv2d(guide_channels, embedding_channels, 1)
            self.k = nn.Conv2d(in_channels, embedding_channels, 1)
        self.init_weights()

    def init_weights(self):
        """Projections of N(0, 0.02), norms of scale one."""
        for norm in (self.norm_y, self.norm_x):
            norm.reset_parameters()
        if self.q is not None:
            for conv in (self.q, self.k):
                nn.init.normal_(conv.weight, std=0.02)
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """Upsample ``[N, C, H, W]`` to ``[N, C, S*H, S*W]``.

        The guide is ``[N, guide_channels, S*H, S*W]``.

        Raises:
            TypeError: an input is no floating-point tensor.
            ValueError: an input has the wrong shape.
        """
        check_guide(
            x,
            guide,
            self.norm_x.num_channels,
            self.norm_y.num_channels,
            self.scale_factor,
        )
        q, k = _normalize(self.norm_y, guide), _normalize(self.norm_x, x)
        if self.q is not None:
            q, k = self.q(q), self.k(k)
        scores = window_similarity(
            q, k, self.up_kernel, scale_factor=self.scale_factor
        )
        return carafe(
            x,
            scores.softmax(1).to(x.dtype),
            self.up_kernel,
            scale_factor=self.scale_factor,
        )

    def extra_repr(self):
        return f'scale_factor={self.scale_factor}, up_kernel={self.up_kernel}'


def _normalize(norm, x):
    # Not by the module, which refuses groups of a single value.
    return torch.group_norm(
        x, norm.num_groups, norm.weight, norm.bias, norm.eps
    )


def _norm(channels):
    """In 32 groups, or as many as can be."""
    return nn.GroupNorm(math.gcd(32, channels), channels)
