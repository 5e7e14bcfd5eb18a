# So that a checkpoint of these models loads wherever mmengine loads one, and
# that their operations are counted.
import mmcarafe.checkpoint  # noqa: F401
import mmcarafe.flops  # noqa: F401
from mmcarafe.models.swap import swap_upsample
from mmcarafe.models.upsample import CARAFE
from mmcarafe.registry import HAS_MMDET, HAS_MMSEG

__all__ = ['CARAFE', 'swap_upsample']

# The necks are subclasses of mmdet's and the head one of mmseg's. Without
# them, or without what mmseg imports and does not require, the module works.
if HAS_MMDET:
    from mmcarafe.models.fpn import CARAFEFPN, CARAFEPAFPN

    __all__ += ['CARAFEFPN', 'CARAFEPAFPN']
if HAS_MMSEG:
    from mmcarafe.models.uper_head import CARAFEUPerHead

    __all__ += ['CARAFEUPerHead']
