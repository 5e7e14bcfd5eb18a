"""UPerNet's head with any upsampler in PPM, FPN and FUSE."""

import torch
from mmengine.model import ModuleList
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize

from mmcarafe.models.fpn import check_levels
from mmcarafe.registry import MODELS
from mmcarafe.upsamplers import (
    UPSAMPLE_CFG,
    build_upsampler,
    upsample_to_meet,
)


@MODELS.register_module()
class CARAFEUPerHead(UPerHead):
    """mmseg's ``UPerHead`` with learned upsampling in PPM, FPN and FUSE.

    The segmentation model of the `CARAFE paper
    <https://arxiv.org/abs/1905.02188>`_, section 5.3. P2 is the finest of the
    head's levels, P5 the coarsest; C is the head's ``channels``.

    - PPM: each pooled map is resized bilinearly to half the size of its
      level, rounded up, then upsampled by 2. ``UPerHead`` resizes to the full
      size bilinearly.
    - FPN: every level is upsampled by 2 before it is added to the next finer
      one.
    - FUSE: P5 is upsampled by 2 and concatenated to P4, both together are
      upsampled by 2 and concatenated to P3, and so on down to P2.
      ``UPerHead`` resizes every level to P2 at once. Nothing is reduced in
      between, so maps of C, 2C and 3C channels are upsampled, and
      ``fpn_bottleneck`` gets the levels in ``UPerHead``'s order, 4C channels
      together: its weights keep their shape and their meaning, and the only
      new parameters are the upsamplers'.

    Images of any size work. Where a level has an odd size, the map upsampled
    by 2 is one row or column larger, and the last one is cropped; where the
    next level is not about twice as large, as after a dilated backbone, the
    upsampled map is resized to it bilinearly: see
    :func:`~mmcarafe.upsamplers.match_size`.

    A guided upsampler's guide is the finer map that its own will meet: in PPM
    the level itself, in FPN the lateral of the next finer level, in FUSE the
    convolved one. What it changes the guide to takes the guide's place; of
    the four in PPM, which share a guide, the mean does.

    All parameters of ``UPerHead`` keep their names. The upsamplers are
    ``ppm_upsample_modules``, one for each pool scale, and
    ``fpn_upsample_modules`` and ``fuse_upsample_modules``, whose entry i
    leads to the level of ``lateral_convs[i]``. With all three configs None
    the head computes what ``UPerHead`` does.

    Args:
        *args: see ``UPerHead``.
        ppm_upsample_cfg (dict | str, optional): config of the upsampler in
            PPM, see :func:`mmcarafe.build_upsampler`. None resizes
            bilinearly, as ``UPerHead`` does.
        fpn_upsample_cfg (dict | str, optional): the same in FPN.
        fuse_upsample_cfg (dict | str, optional): the same in FUSE.
        **kwargs: see ``UPerHead``.
    """

    def __init__(
        self,
        *args,
        ppm_upsample_cfg=UPSAMPLE_CFG,
        fpn_upsample_cfg=UPSAMPLE_CFG,
        fuse_upsample_cfg=UPSAMPLE_CFG,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        c = self.channels
        steps = len(self.in_channels) - 1
        self.ppm_upsample_modules = _build(
            ppm_upsample_cfg,
            [c] * len(self.psp_modules),
            self.in_channels[-1],
            'ppm_upsample_cfg',
        )
        self.fpn_upsample_modules = _build(
            fpn_upsample_cfg, [c] * steps, c, 'fpn_upsample_cfg'
        )
        self.fuse_upsample_modules = _build(
            fuse_upsample_cfg,
            [c * (steps - i) for i in range(steps)],
            c,
            'fuse_upsample_cfg',
        )

    def psp_forward(self, inputs):
        """Pool the coarsest level, and upsample each pooled map to its size.

        Args:
            inputs (list[Tensor]): the selected levels, finest first.

        Returns:
            Tensor[N, C, H, W]: P5, as large as the last of ``inputs``.
        """
        x = inputs[-1]
        pooled = [pool(x) for pool in self.psp_modules]
        if self.ppm_upsample_modules is None:
            outs = [self._resize(each, x.shape[2:]) for each in pooled]
        else:
            half = [(length + 1) // 2 for length in x.shape[2:]]
            x, outs = upsample_to_meet(
                self.ppm_upsample_modules,
                [self._resize(each, half) for each in pooled],
                x,
            )
        return self.bottleneck(torch.cat([x, *outs], dim=1))

    def _forward_feature(self, inputs):
        inputs = self._transform_inputs(inputs)
        check_levels(inputs, self.in_channels)
        levels = [conv(x) for conv, x in zip(self.lateral_convs, inputs)]
        levels.append(self.psp_forward(inputs))
        for i in reversed(range(len(self.lateral_convs))):
            finer, upsampled = self._upsample(
                levels[i + 1], levels[i], self.fpn_upsample_modules, i
            )
            levels[i] = finer + upsampled
        for i, conv in enumerate(self.fpn_convs):
            levels[i] = conv(levels[i])
        return self.fpn_bottleneck(self._fuse(levels))

    def _fuse(self, levels):
        """Concatenate C channels of each level at the size of the finest."""
        if self.fuse_upsample_modules is None:
            size = levels[0].shape[2:]
            levels[1:] = [self._resize(x, size) for x in levels[1:]]
            return torch.cat(levels, dim=1)
        fused = levels[-1]
        for i in reversed(range(len(self.fuse_upsample_modules))):
            fused = torch.cat(
                self._upsample(
                    fused, levels[i], self.fuse_upsample_modules, i
                ),
                dim=1,
            )
        return fused

    def _upsample(self, x, finer, upsamplers, i):
        """The finer map, as a guided upsampler leaves it, and x as large."""
        if upsamplers is None:
            return finer, self._resize(x, finer.shape[2:])
        finer, (x,) = upsample_to_meet([upsamplers[i]], [x], finer)
        return finer, x

    def _resize(self, x, size):
        return resize(
            x, size=size, mode='bilinear', align_corners=self.align_corners
        )


def _build(cfg, channels, guide_channels, name):
    """One upsampler for each number of channels; None without a config."""
    if cfg is None:
        return None
    # mmengine's list, unlike torch's, passes init_weights on to its members.
    return ModuleList(
        build_upsampler(cfg, c, name=name, guide_channels=guide_channels)
        for c in channels
    )
