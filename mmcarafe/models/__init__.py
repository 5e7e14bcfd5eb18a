from importlib.util import find_spec

# So that a checkpoint of these models loads wherever mmengine loads one.
import mmcarafe.checkpoint  # noqa: F401
from mmcarafe.models.upsample import CARAFE

__all__ = ['CARAFE']

# The neck is a subclass of mmdet's and the head one of mmseg's. Without them
# the module still works.
if find_spec('mmdet'):
    from mmcarafe.models.fpn import CARAFEFPN

    __all__ += ['CARAFEFPN']
if find_spec('mmseg'):
    from mmcarafe.models.uper_head import CARAFEUPerHead

    __all__ += ['CARAFEUPerHead']
