from importlib.util import find_spec

# So that a checkpoint of these models loads wherever mmengine loads one.
import mmcarafe.checkpoint  # noqa: F401
from mmcarafe.models.upsample import CARAFE

__all__ = ['CARAFE']

# The neck is a subclass of mmdet's and the head one of mmseg's. Without them,
# or without what mmseg imports and does not require, the module still works.
if find_spec('mmdet'):
    from mmcarafe.models.fpn import CARAFEFPN

    __all__ += ['CARAFEFPN']
if all(map(find_spec, ('mmseg', 'ftfy', 'regex'))):
    from mmcarafe.models.uper_head import CARAFEUPerHead

    __all__ += ['CARAFEUPerHead']
