from importlib.util import find_spec

# So that a checkpoint of these models loads wherever mmengine loads one, and
# that their operations are counted.
import mmcarafe.checkpoint  # noqa: F401
import mmcarafe.flops  # noqa: F401
from mmcarafe.models.swap import swap_upsample
from mmcarafe.models.upsample import CARAFE

__all__ = ['CARAFE', 'swap_upsample']

# The necks are subclasses of mmdet's and the head one of mmseg's. Without
# them, or without what mmseg imports and does not require, the module works.
if find_spec('mmdet'):
    from mmcarafe.models.fpn import CARAFEFPN, CARAFEPAFPN

    __all__ += ['CARAFEFPN', 'CARAFEPAFPN']
if all(map(find_spec, ('mmseg', 'ftfy', 'regex'))):
    from mmcarafe.models.uper_head import CARAFEUPerHead

    __all__ += ['CARAFEUPerHead']
