"""SegFormer's head with any upsampler in each of its steps."""

import torch
from mmengine.model import ModuleList
from mmseg.models.decode_heads import SegformerHead

from mmcarafe.models.fpn import check_levels
from mmcarafe.registry import MODELS
from mmcarafe.upsamplers import (
    UPSAMPLE_CFG,
    build_upsampler,
    upsample_to_meet,
)


@MODELS.register_module()
class CARAFESegformerHead(SegformerHead):
    """mmseg's ``SegformerHead`` with learned upsampling by 2, step by step.

    ``SegformerHead`` convolves every level of the backbone to C channels, C
    being the head's ``channels``, resizes them all to the size of the finest
    at once, and concatenates them. Here each level gets there by an upsampler
    for each step: with the usual four levels, the coarsest is upsampled by 2
    three times, the next one twice and the third once, by six upsamplers. In
    this place the papers of SAPA and DySample compare upsamplers.

    What is concatenated, and in which order, stays as in ``SegformerHead``, so
    its weights keep their shape and their meaning.

    Images of any size work, as in :class:`mmcarafe.CARAFEUPerHead`: see
    :func:`~mmcarafe.upsamplers.match_size`.

    A guided upsampler's guide is the convolved level to whose size it
    upsamples. What the upsamplers of a step change the guide to, or the mean
    of it where they are several, takes the level's place: it is the one that
    is upsampled further, and concatenated.

    All parameters of ``SegformerHead`` keep their names. The upsamplers are
    ``upsample_modules``: ``upsample_modules[i][j]`` brings what came from
    level ``i + 1 + j`` from the size of level ``i + 1`` to that of level
    ``i``, level 0 being the finest. With ``upsample_cfg=None`` the head
    computes what ``SegformerHead`` does.

    Args:
        *args: see ``SegformerHead``. With an upsampler, its
            ``interpolate_mode`` is not used.
        upsample_cfg (dict | str, optional): config of the upsamplers, see
            :func:`mmcarafe.build_upsampler`. None resizes as
            ``SegformerHead`` does.
        **kwargs: see ``SegformerHead``.
    """

    def __init__(self, *args, upsample_cfg=UPSAMPLE_CFG, **kwargs):
        super().__init__(*args, **kwargs)
        self.upsample_modules = None
        if upsample_cfg is None:
            return
        c = self.channels
        steps = len(self.in_channels) - 1
        # mmengine's lists, unlike torch's, pass init_weights on.
        self.upsample_modules = ModuleList(
            ModuleList(
                build_upsampler(
                    upsample_cfg, c, name='upsample_cfg', guide_channels=c
                )
                for _ in range(i, steps)
            )
            for i in range(steps)
        )

    def forward(self, inputs):
        """Predict the classes' scores at the size of the finest level.

        Args:
            inputs (list[Tensor[N, C_i, H_i, W_i]]): the backbone's levels,
                finest first.

        Returns:
            Tensor[N, num_classes, H_0, W_0]

        Raises:
            ValueError: with an upsampler, the number of channels of a level
                is not that of ``in_channels``.
        """
        if self.upsample_modules is None:
            return super().forward(inputs)
        inputs = self._transform_inputs(inputs)
        check_levels(inputs, self.in_channels)
        levels = [conv(x) for conv, x in zip(self.convs, inputs)]
        maps = levels[-1:]  # of equal size
        for i in reversed(range(len(self.upsample_modules))):
            finer, maps = upsample_to_meet(
                self.upsample_modules[i], maps, levels[i]
            )
            maps = [finer, *maps]
        return self.cls_seg(self.fusion_conv(torch.cat(maps, dim=1)))
