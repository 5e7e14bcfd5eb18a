"""FreqFusion: a coarser map is smoothed, and the finer one sharpened.

Letters are those of :mod:`mmcarafe.ops.carafe`. C is of the coarser map, C' of
the finer one, the guide. K is K_l for low-pass and K_h for high-pass kernels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcarafe.ops import carafe
from mmcarafe.ops.carafe import check_divides, check_int
from mmcarafe.ops.reference import accumulable
from mmcarafe.upsamplers.carafe import init_xavier
from mmcarafe.upsamplers.dysample import pixel_shuffle, sample
from mmcarafe.upsamplers.meet import check_guide

_NORM_CHANNELS = 8  # of a group in the resampler's norms
_DILATION = 2  # of the window of 3×3 pixels that the resampler compares
_NEIGHBOURS = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]


class FreqFusion(nn.Module):
    """Upsample with smooth kernels of two maps, and sharpen the finer one.

    `Frequency-aware Feature Fusion for Dense Image Prediction
    <https://arxiv.org/abs/2408.12879>`_: both maps are compressed to a few
    channels, from which convolutions predict scores of low-pass and high-pass
    kernels. The scores of the coarser map are upsampled with the low-pass
    kernels known so far and added to those of the finer map, the guide. A
    kernel is the softmax over the K×K window, times a Hamming window, divided
    by its sum. The low-pass kernels upsample the coarser map, as in CARAFE.
    The high-pass kernels smooth the guide, and what that takes away from it
    is added to it.

    With ``feature_resample``, the upsampled map is then read at predicted
    positions, as in DySample.

    Parameter names are those of the public implementation, so its state dicts
    load, without need for their buffers. For C = C' = 256 there are 52,514
    parameters, and 104,690 with ``feature_resample``.

    Args:
        in_channels (int): C.
        guide_channels (int, optional): C'; by default C.
        scale_factor (int): S.
        lowpass_kernel (int): K_l, odd.
        highpass_kernel (int): K_h, odd.
        up_group (int): G. Divides C, C' and ``compressed_channels``.
        encoder_kernel (int): odd kernel size of the content encoders.
        encoder_dilation (int): dilation of the content encoders.
        compressed_channels (int): of each map, for the content encoders.
        feature_resample (bool): read the upsampled map at other positions.
            ``compressed_channels`` is then a multiple of 8.
        feature_resample_group (int): number of groups of channels that are
            read at the same place. Divides C.
    """

    guided = True

    def __init__(
        self,
        in_channels,
        guide_channels=None,
        scale_factor=2,
        lowpass_kernel=5,
        highpass_kernel=3,
        up_group=1,
        encoder_kernel=3,
        encoder_dilation=1,
        compressed_channels=64,
        feature_resample=False,
        feature_resample_group=4,
    ):
        super().__init__()
        if guide_channels is None:
            guide_channels = in_channels
        check_int('in_channels', in_channels)
        check_int('guide_channels', guide_channels)
        check_int('scale_factor', scale_factor)
        check_int('lowpass_kernel', lowpass_kernel, odd=True)
        check_int('highpass_kernel', highpass_kernel, odd=True)
        check_int('up_group', up_group)
        check_int('encoder_kernel', encoder_kernel, odd=True)
        check_int('encoder_dilation', encoder_dilation)
        check_int('compressed_channels', compressed_channels)
        for name, channels in (
            ('in_channels', in_channels),
            ('guide_channels', guide_channels),
            ('compressed_channels', compressed_channels),
        ):
            check_divides('up_group', up_group, name, channels)
        self.in_channels = in_channels
        self.guide_channels = guide_channels
        self.scale_factor = scale_factor
        self.lowpass_kernel = lowpass_kernel
        self.highpass_kernel = highpass_kernel
        self.up_group = up_group
        self.hr_channel_compressor = nn.Conv2d(
            guide_channels, compressed_channels, 1
        )
        self.lr_channel_compressor = nn.Conv2d(
            in_channels, compressed_channels, 1
        )
        self.content_encoder, self.content_encoder2 = (
            nn.Conv2d(
                compressed_channels,
                up_group * kernel_size**2,
                encoder_kernel,
                padding=(encoder_kernel - 1) * encoder_dilation // 2,
                dilation=encoder_dilation,
            )
            for kernel_size in (lowpass_kernel, highpass_kernel)
        )
        self.dysampler = None
        if feature_resample:
            check_int('feature_resample_group', feature_resample_group)
            check_divides(
                'feature_resample_group',
                feature_resample_group,
                'in_channels',
                in_channels,
            )
            if compressed_channels % _NORM_CHANNELS:
                raise ValueError(
                    f'compressed_channels is {compressed_channels}, expected '
                    f'a multiple of {_NORM_CHANNELS} with feature_resample'
                )
            self.dysampler = _Resampler(
                compressed_channels, scale_factor, feature_resample_group
            )
        self._register_load_state_dict_pre_hook(_drop_constants)
        self.init_weights()

    def init_weights(self):
        """Start with kernels close to the Hamming window.

        A parent's ``init_weights`` calls this after its own ``init_cfg``.
        """
        for conv in (self.hr_channel_compressor, self.lr_channel_compressor):
            init_xavier(conv)
        for conv in (self.content_encoder, self.content_encoder2):
            _init_normal(conv)
        if self.dysampler is not None:
            self.dysampler.init_weights()

    def forward(self, x: Tensor, guide: Tensor) -> 'tuple[Tensor, Tensor]':
        """Upsample ``[N, C, H, W]`` to ``[N, C, S*H, S*W]``.

        The guide is ``[N, C', S*H, S*W]``. Returns the pair (sharpened guide,
        upsampled map).

        Raises:
            TypeError: an input is no floating-point tensor.
            ValueError: an input has the wrong shape.
        """
        check_guide(
            x,
            guide,
            self.in_channels,
            self.guide_channels,
            self.scale_factor,
        )
        fine = self.hr_channel_compressor(guide)
        coarse = self.lr_channel_compressor(x)
        high = self.content_encoder2(fine)
        high = self._add_window(high, self.highpass_kernel)
        fine = self._sharpen(fine, self._normalize(high))
        low = self.content_encoder(fine)
        low = self._add_window(low, self.lowpass_kernel)
        kernels = self._normalize(low)
        low = low + self._smooth(self.content_encoder(coarse), kernels)
        kernels = self._normalize(low)
        high = high + self._smooth(self.content_encoder2(coarse), kernels)
        upsampled = self._smooth(x, kernels)
        if self.dysampler is not None:
            upsampled = self.dysampler(upsampled, coarse, fine)
        return self._sharpen(guide, self._normalize(high)), upsampled

    def _add_window(self, scores, kernel_size):
        """Add the logarithm of the Hamming window to ``[N, G*K*K, H, W]``.

        With it, softmax makes the published kernels: the softmax of the
        scores, times the window, divided by the sum of that.
        """
        scores = accumulable(scores)
        steps = torch.arange(
            kernel_size, dtype=scores.dtype, device=scores.device
        )
        # Of a single tap, any window will do.
        steps = steps * (2 * math.pi / max(kernel_size - 1, 1))
        window = (0.54 - 0.46 * steps.cos()).log()  # [K]
        window = (window[:, None] + window).flatten()  # [K*K]
        return scores + window.repeat(self.up_group)[:, None, None]

    def _normalize(self, scores):
        # Sizes one by one: torch's older ONNX exporter would take those of an
        # unflattened map for constants.
        _, channels, height, width = scores.shape
        taps = scores.reshape(
            -1, channels // self.up_group, height, width
        )  # [N*G, K*K, S*H, S*W]
        # [N, G*K*K, S*H, S*W]
        return taps.softmax(1).reshape(-1, channels, height, width)

    def _smooth(self, x, kernels):
        """Upsample x of any number of channels, with low-pass kernels."""
        return carafe(
            x,
            kernels.to(x.dtype),
            self.lowpass_kernel,
            self.up_group,
            self.scale_factor,
        )

    def _sharpen(self, x, kernels):
        """Add what is lost where x is smoothed with high-pass kernels."""
        smooth = carafe(
            x, kernels.to(x.dtype), self.highpass_kernel, self.up_group, 1
        )
        return x + (x - smooth)

    def extra_repr(self):
        return (
            f'scale_factor={self.scale_factor}, '
            f'lowpass_kernel={self.lowpass_kernel}, '
            f'highpass_kernel={self.highpass_kernel}, '
            f'up_group={self.up_group}'
        )


class _Resampler(nn.Module):
    """Reads an upsampled map where it may fit the guide better.

    The positions come from both compressed maps and from how similar their
    pixels are to their neighbours.
    """

    def __init__(self, channels, scale_factor, groups):
        super().__init__()
        self.scale_factor = scale_factor
        self.groups = groups
        self.norm_hr, self.norm_lr = (
            nn.GroupNorm(channels // _NORM_CHANNELS, channels)
            for _ in range(2)
        )
        channels = channels + len(_NEIGHBOURS)
        # The coarser map predicts for all subpixels of its pixels.
        self.offset, self.direct_scale = (
            nn.Conv2d(channels, 2 * groups * scale_factor**2, 3, padding=1)
            for _ in range(2)
        )
        self.hr_offset, self.hr_direct_scale = (
            nn.Conv2d(channels, 2 * groups, 3, padding=1) for _ in range(2)
        )

    def init_weights(self):
        """Start with offsets of almost zero."""
        for norm in (self.norm_hr, self.norm_lr):
            norm.reset_parameters()
        for conv in (self.offset, self.hr_offset):
            _init_normal(conv)
        for conv in (self.direct_scale, self.hr_direct_scale):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, x, coarse, fine):
        """Sample ``x [N, C, S*H, S*W]``.

        The compressed maps are ``coarse [N, C_m, H, W]`` and
        ``fine [N, C_m, S*H, S*W]``.
        """
        s = self.scale_factor
        coarse = _with_similarities(self.norm_lr(coarse))
        fine = _with_similarities(self.norm_hr(fine))
        offset, scope = (
            pixel_shuffle(of_coarse(coarse), s) + of_fine(fine)
            for of_coarse, of_fine in (
                (self.offset, self.hr_offset),
                (self.direct_scale, self.hr_direct_scale),
            )
        )  # [N, 2*groups, S*H, S*W]
        # in pixels of the coarser map, of which each is S of those of x
        offset = accumulable(offset) * s * scope.sigmoid()
        return sample(x, offset, self.groups)


def _with_similarities(x):
    """Append each pixel's cosines with its neighbours to its channels.

    From ``[N, C, H, W]`` to ``[N, C+8, H, W]``; outside the map they are zero.
    """
    height, width = x.shape[2:]
    unit = accumulable(x)
    # A map of zeros has no direction, and its gradients need a bound.
    squares = unit.square().sum(1, keepdim=True).clamp(min=1e-6)
    unit = unit * squares.rsqrt()
    padded = F.pad(unit, (_DILATION,) * 4)
    cosines = []
    for i, j in _NEIGHBOURS:
        top, left = _DILATION * i, _DILATION * j
        neighbour = padded[..., top : top + height, left : left + width]
        cosines.append((unit * neighbour).sum(1, keepdim=True).to(x.dtype))
    return torch.cat([x, *cosines], 1)


def _init_normal(conv):
    nn.init.normal_(conv.weight, std=0.001)
    nn.init.zeros_(conv.bias)


def _drop_constants(state_dict, prefix, *_):
    # They follow from K and S: they are no parameters.
    for name in ('hamming_lowpass', 'hamming_highpass', 'dysampler.init_pos'):
        state_dict.pop(f'{prefix}{name}', None)
