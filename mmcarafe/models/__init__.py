"""What mmengine's registry finds under the prefix ``mmcarafe.``"""

from mmcarafe import checkpoint, flops
from mmcarafe.models.swap import swap_upsample
from mmcarafe.registry import HAS_MMDET, HAS_MMSEG, MODELS
from mmcarafe.upsamplers import CARAFE, UPSAMPLERS, DynamicFilter

__all__ = ['CARAFE', 'DynamicFilter', 'swap_upsample']

for _type, (_cls, _) in UPSAMPLERS.items():
    if _type == _cls.__name__:  # ours; mmcv has registered the others
        MODELS.register_module(module=_cls)

# The necks are subclasses of mmdet's and the head one of mmseg's. Without
# them, or without what mmseg imports and does not require, the rest works.
if HAS_MMDET:
    from mmcarafe.models.fpn import CARAFEFPN, CARAFEPAFPN

    __all__ += ['CARAFEFPN', 'CARAFEPAFPN']
if HAS_MMSEG:
    from mmcarafe.models.uper_head import CARAFEUPerHead

    __all__ += ['CARAFEUPerHead']

# mmengine loads checkpoints of these models as data only, and counts their
# operations.
checkpoint.enable()
flops.enable()
