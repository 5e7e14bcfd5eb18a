"""CARAFE as a module. Letters are those of :mod:`mmcarafe.ops.carafe`."""

import torch
from torch import Tensor, nn

from mmcarafe.ops import carafe_from_logits
from mmcarafe.ops.carafe import check_divides, check_int, check_normalizer
from mmcarafe.ops.reference import NORMALIZERS, unknown

INITS = ('uniform', 'bilinear')
#: What the bilinear start adds to every tap's weight, so that the gradient
#: reaches all of them: together, 2.4 % of a 5×5 reassembly kernel.
FLOOR = 1e-3


class CARAFE(nn.Module):
    """Upsample with reassembly kernels predicted from the features.

    Sections 3.1 to 3.3 of the `paper <https://arxiv.org/abs/1905.02188>`_:
    a 1×1 convolution compresses the channels, a convolution encodes them into
    G*K*K*S*S logits per source pixel, and
    :func:`mmcarafe.ops.carafe_from_logits` normalises these and reassembles
    the features.

    Arguments, parameter names and the default initialisation are those of
    mmcv's ``CARAFEPack``, so its state dicts load.

    Args:
        channels (int): C.
        scale_factor (int): S.
        up_kernel (int): K, odd.
        up_group (int): G. Divides C.
        encoder_kernel (int): odd kernel size of the content encoder. The
            paper's rule is K - 2.
        encoder_dilation (int): dilation of the content encoder.
        compressed_channels (int | float): channels between the convolutions.
            A float is a share of ``channels``.
        normalizer (str, optional): see
            :func:`mmcarafe.ops.carafe_from_logits`.
        out_channels (int, optional): adds a 1×1 convolution to this many
            channels after the upsampling.
        border (str): ``'zeros'``, as in mmcv, or ``'renormalize'``, which
            keeps the border of a map as bright as the rest: see
            :func:`mmcarafe.ops.carafe_from_logits`. Adds no parameters.
        init (str): the reassembly kernels at the start. ``'uniform'``, as in
            mmcv: the mean of the window, which blurs; ``'bilinear'``, for
            K >= 3: those of bilinear interpolation, with :data:`FLOOR` added
            to each tap.
    """

    def __init__(
        self,
        channels,
        scale_factor=2,
        up_kernel=5,
        up_group=1,
        encoder_kernel=3,
        encoder_dilation=1,
        compressed_channels=64,
        normalizer='softmax',
        out_channels=None,
        border='zeros',
        init='uniform',
    ):
        super().__init__()
        check_int('channels', channels)
        check_int('scale_factor', scale_factor)
        check_int('up_kernel', up_kernel, odd=True)
        check_int('up_group', up_group)
        check_int('encoder_kernel', encoder_kernel, odd=True)
        check_int('encoder_dilation', encoder_dilation)
        check_normalizer(normalizer, border)
        if init not in INITS:
            raise unknown('init', init, INITS)
        if init == 'bilinear' and up_kernel < 3:
            raise ValueError(
                f"init is 'bilinear' and up_kernel {up_kernel}, expected >= 3"
            )
        check_divides('up_group', up_group, 'channels', channels)
        if isinstance(compressed_channels, float):
            compressed_channels = round(compressed_channels * channels)
        check_int('compressed_channels', compressed_channels)
        self.channels = channels
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.normalizer = normalizer
        self.border = border
        self.init = init
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_group * up_kernel**2 * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        if out_channels is not None:
            check_int('out_channels', out_channels)
            self.out_conv = nn.Conv2d(channels, out_channels, 1)
        else:
            self.out_conv = None
        self.init_weights()

    def init_weights(self):
        """Start with the reassembly kernels of ``init``, and little noise.

        The encoder's bias sets them; its weights are N(0, 0.001). A parent's
        ``init_weights`` calls this after its own ``init_cfg``.
        """
        init_xavier(self.channel_compressor)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        if self.init == 'bilinear':
            self._init_bilinear()
        elif self.init == 'uniform':
            nn.init.zeros_(self.content_encoder.bias)
        else:
            raise unknown('init', self.init, INITS)
        if self.out_conv is not None:
            init_xavier(self.out_conv)

    @torch.no_grad()
    def _init_bilinear(self):
        weights = bilinear_weights(self.up_kernel, self.scale_factor) + FLOOR
        if self.normalizer == 'softmax':
            logits = weights.log()
        elif self.normalizer == 'sigmoid_normalized':
            # any multiple of the weights will do, but a sigmoid is below one
            logits = (weights / 2).logit()
        elif self.normalizer == 'sigmoid':
            logits = weights.clamp(max=1 - FLOOR).logit()
        elif self.normalizer is None:
            logits = weights
        else:
            raise unknown('normalizer', self.normalizer, NORMALIZERS)
        bias = logits.expand(self.up_group, *logits.shape)
        self.content_encoder.bias.copy_(bias.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``[N, C, H, W]`` to ``[N, C, S*H, S*W]``.

        With ``out_channels`` the result has that many channels.
        """
        compressed = self.channel_compressor(x)
        logits = self.content_encoder(compressed)  # [N, G*K*K*S*S, H, W]
        x = carafe_from_logits(
            x,
            logits,
            self.up_kernel,
            self.up_group,
            self.scale_factor,
            self.normalizer,
            self.border,
        )
        return x if self.out_conv is None else self.out_conv(x)

    def extra_repr(self):
        return (
            f'scale_factor={self.scale_factor}, up_kernel={self.up_kernel}, '
            f'up_group={self.up_group}, normalizer={self.normalizer!r}, '
            f'border={self.border!r}, init={self.init!r}'
        )


def bilinear_weights(kernel_size: int, scale_factor: int) -> Tensor:
    """Bilinear interpolation's kernels (``align_corners=False``).

    Returns:
        Tensor[K*K, S, S]: of each tap and subpixel; they sum to one.
    """
    subpixel = (torch.arange(scale_factor) + 0.5) / scale_factor - 0.5
    tap = torch.arange(kernel_size) - kernel_size // 2
    distance = (tap[:, None] - subpixel).abs()  # [K, S], in source pixels
    weights = (1 - distance).clamp(min=0)
    return torch.einsum('ai,bj->abij', weights, weights).flatten(0, 1)


def init_xavier(conv: nn.Conv2d) -> None:
    """Xavier's uniform weights and a zero bias, as mmcv initialises it."""
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
