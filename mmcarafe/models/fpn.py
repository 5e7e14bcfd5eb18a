"""mmdet's feature pyramids with any upsampler in their top-down path."""

from mmdet.models.necks import FPN, PAFPN

from mmcarafe.models.top_down import TopDown, build_upsamplers
from mmcarafe.models.upsample import UPSAMPLE_CFG
from mmcarafe.registry import MODELS


@MODELS.register_module()
class CARAFEFPN(TopDown, FPN):
    """mmdet's FPN with CARAFE where it upsamples (section 4.1 of the paper).

    ``upsample_modules[i]`` upsamples the merged level ``i + 1``, which is then
    cropped to the lateral of level ``i``, so any input size works. All other
    parameters keep FPN's names, so a plain FPN's weights load.

    Args:
        *args: see mmdet's ``FPN``, which also takes ``**kwargs``.
        upsample_cfg (dict): any upsampler of mmcv's or ours, ×2; see
            :func:`mmcarafe.models.upsample.build_upsampler`.
    """

    def __init__(self, *args, upsample_cfg=UPSAMPLE_CFG, **kwargs):
        super().__init__(*args, **kwargs)
        self.upsample_cfg = upsample_cfg
        self.upsample_modules = build_upsamplers(self, upsample_cfg)


@MODELS.register_module()
class CARAFEPAFPN(CARAFEFPN, PAFPN):
    """mmdet's PAFPN with CARAFE where it upsamples; see :class:`CARAFEFPN`."""

    def convolve(self, laterals):
        levels = super().convolve(laterals)
        for i, conv in enumerate(self.downsample_convs):
            levels[i + 1] = levels[i + 1] + conv(levels[i])
        return [
            levels[0],
            *(conv(x) for conv, x in zip(self.pafpn_convs, levels[1:])),
        ]
