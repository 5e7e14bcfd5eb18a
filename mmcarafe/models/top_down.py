"""The top-down path of a feature pyramid, with any upsampler."""

import torch.nn.functional as F
from mmengine.model import ModuleList

from mmcarafe.models.upsample import build_upsampler, fit


def build_upsamplers(fpn, upsample_cfg):
    """One upsampler for each step from a level to the next finer one."""
    return ModuleList(
        build_upsampler(upsample_cfg, fpn.out_channels)
        for _ in fpn.lateral_convs[1:]
    )


class TopDown:
    """Mixin that replaces ``forward`` of mmdet's or mmseg's FPN."""

    def forward(self, inputs):
        """Merge the backbone's levels top-down.

        Args:
            inputs (tuple[Tensor[N, C_i, H_i, W_i]]): one map per entry of
                ``in_channels``, finest first.

        Returns:
            tuple[Tensor[N, C, H_i, W_i]]: ``num_outs`` maps, finest first.
        """
        if len(inputs) != self.num_ins:
            raise ValueError(
                f'inputs has {len(inputs)} levels, expected {self.num_ins}, '
                'one per entry of in_channels'
            )
        used = inputs[self.start_level : self.backbone_end_level]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, used)]
        for i in range(len(laterals) - 1, 0, -1):
            upsampled = self.upsample_modules[i - 1](laterals[i])
            size = laterals[i - 1].shape[2:]
            laterals[i - 1] = laterals[i - 1] + fit(upsampled, size)

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
        """The outputs of the merged levels."""
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
