"""EUCB: nearest interpolation, then a separable convolution.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmcarafe.ops.carafe import check_int


class EUCB(nn.Module):
    """The "efficient up-convolution block" of EMCAD.

    `EMCAD: Efficient Multi-scale Convolutional Attention Decoding
    <https://arxiv.org/abs/2405.06880>`_: each pixel is repeated S*S times;
    then follow a 3×3 convolution of each channel, batch normalisation, ReLU
    and a 1×1 convolution. Parameter names are not those of the public code.

    Args:
        in_channels (int): of the input.
        out_channels (int): of the output.
        scale_factor (int): S.
    """

    def __init__(self, in_channels, out_channels, scale_factor=2):
        super().__init__()
        check_int('in_channels', in_channels)
        check_int('out_channels', out_channels)
        check_int('scale_factor', scale_factor)
        self.scale_factor = scale_factor
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels,
            3,
            padding=1,
            groups=in_channels,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def init_weights(self):
        """Start as PyTorch starts convolutions."""
        for layer in (self.depthwise, self.norm, self.pointwise):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``[N, C_in, H, W]`` to ``[N, C_out, S*H, S*W]``."""
        x = F.interpolate(x, scale_factor=self.scale_factor)
        return self.pointwise(self.norm(self.depthwise(x)).relu())
