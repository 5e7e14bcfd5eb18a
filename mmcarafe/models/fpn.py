"""Feature pyramids with any upsampler in their top-down path."""

import torch.nn.functional as F
from mmengine.model import ModuleList

from mmcarafe.ops.carafe import check_int
from mmcarafe.registry import HAS_MMDET, HAS_MMSEG, MODELS
from mmcarafe.upsamplers import (
    UPSAMPLE_CFG,
    build_upsampler,
    upsample_to_meet,
)


class TopDown:
    """Mixin that replaces ``forward`` of mmdet's or mmseg's FPN.

    The class that it is mixed into must have what both have: ``num_ins``,
    ``in_channels``, ``start_level``, ``backbone_end_level``, ``num_outs``,
    ``lateral_convs`` (one for each used level), ``fpn_convs`` (as many, then
    the extra ones), ``add_extra_convs`` and ``relu_before_extra_convs``; and
    ``upsample_modules``, as :func:`build_upsamplers` makes them.
    """

    def forward(self, inputs):
        """Merge the backbone's levels top-down.

        Args:
            inputs (tuple[Tensor[N, C_i, H_i, W_i]]): one map per entry of
                ``in_channels``, finest first.

        Returns:
            tuple[Tensor[N, C, H_i, W_i]]: ``num_outs`` maps, finest first.

        Raises:
            ValueError: the number of maps, or of the channels of one, is not
                that of ``in_channels``.
        """
        used = slice(self.start_level, self.backbone_end_level)
        check_levels(inputs, self.in_channels, used)
        used = inputs[used]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, used)]
        for i in range(len(laterals) - 1, 0, -1):
            finer, (upsampled,) = upsample_to_meet(
                [self.upsample_modules[i - 1]], [laterals[i]], laterals[i - 1]
            )
            laterals[i - 1] = finer + upsampled

        outs = self.convolve(laterals)
        extra_convs = self.fpn_convs[len(laterals) :]
        if self.add_extra_convs:
            source = {
                'on_input': used[-1],
                'on_lateral': laterals[-1],
                'on_output': outs[-1],
            }[self.add_extra_convs]
            for i, conv in enumerate(extra_convs):
                if i > 0 and self.relu_before_extra_convs:
                    source = F.relu(source)
                source = conv(source)
                outs.append(source)
        else:
            while len(outs) < self.num_outs:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)

    def convolve(self, laterals):
        """Convolve the merged levels into outputs."""
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals)]


def build_upsamplers(fpn, upsample_cfg):
    """One upsampler for each step from a level to the next finer one."""
    return ModuleList(
        build_upsampler(
            upsample_cfg, fpn.out_channels, guide_channels=fpn.out_channels
        )
        for _ in fpn.lateral_convs[1:]
    )


def check_levels(inputs, in_channels, used=slice(None)):
    """Raise unless there is one map per entry and the used ones fit it."""
    if len(inputs) != len(in_channels):
        raise ValueError(
            f'inputs has {len(inputs)} levels, expected {len(in_channels)}, '
            'one per entry of in_channels'
        )
    for i in range(len(inputs))[used]:
        x, channels = inputs[i], in_channels[i]
        if x.shape[1] != channels:
            raise ValueError(
                f'inputs[{i}] has {x.shape[1]} channels, expected {channels}, '
                f'as in_channels = {list(in_channels)} says'
            )


if HAS_MMDET:
    from mmdet.models.necks import FPN, PAFPN

    @MODELS.register_module()
    class CARAFEFPN(TopDown, FPN):
        """mmdet's FPN with CARAFE where it upsamples (paper, section 4.1).

        ``upsample_modules[i]`` upsamples the merged level ``i + 1``, guided
        by the lateral of level ``i`` where it wants a guide; the result is
        cropped to that lateral, so any input size works.
        All other parameters keep FPN's names, so a plain FPN's weights load.

        Args:
            in_channels (list[int]): of each level of the backbone.
            out_channels (int): C, of each output.
            *args: see mmdet's ``FPN``, which also takes ``**kwargs``.
            upsample_cfg (dict | str): any ×2 upsampler, see
                :func:`mmcarafe.build_upsampler`.
        """

        def __init__(
            self,
            in_channels,
            out_channels,
            *args,
            upsample_cfg=UPSAMPLE_CFG,
            **kwargs,
        ):
            check_int('out_channels', out_channels)
            super().__init__(in_channels, out_channels, *args, **kwargs)
            self.upsample_cfg = upsample_cfg
            self.upsample_modules = build_upsamplers(self, upsample_cfg)

    @MODELS.register_module()
    class CARAFEPAFPN(CARAFEFPN, PAFPN):
        """mmdet's PAFPN with CARAFE where it upsamples.

        See :class:`CARAFEFPN`.
        """

        def convolve(self, laterals):
            levels = super().convolve(laterals)
            for i, conv in enumerate(self.downsample_convs):
                levels[i + 1] = levels[i + 1] + conv(levels[i])
            return [
                levels[0],
                *(conv(x) for conv, x in zip(self.pafpn_convs, levels[1:])),
            ]


if HAS_MMSEG:
    from mmseg.models.necks import FPN as MMSegFPN

    class SegFPN(TopDown, MMSegFPN):
        """mmseg's FPN after :func:`mmcarafe.swap_upsample`."""
