"""What mmengine's registry finds under the prefix ``mmcarafe.``"""

from mmcarafe import checkpoint, flops
from mmcarafe.models.swap import swap_upsample
from mmcarafe.registry import HAS_MMDET, HAS_MMSEG, MODELS
from mmcarafe.upsamplers import UPSAMPLERS

__all__ = ['swap_upsample']

for _type, _row in UPSAMPLERS.items():
    if _type == _row.cls.__name__:  # ours; mmcv has registered the others
        MODELS.register_module(module=_row.cls)

# The necks are subclasses of mmdet's and the heads of mmseg's. Without
# these, or a package that mmseg imports but does not list, the rest works.
if HAS_MMDET:
    from mmcarafe.models.fpn import CARAFEFPN, CARAFEPAFPN

    __all__ += ['CARAFEFPN', 'CARAFEPAFPN']
if HAS_MMSEG:
    from mmcarafe.models.segformer_head import CARAFESegformerHead
    from mmcarafe.models.uper_head import CARAFEUPerHead

    __all__ += ['CARAFESegformerHead', 'CARAFEUPerHead']

# From now on mmengine loads checkpoints as data only, and counts the
# operator's FLOPs.
checkpoint.enable()
flops.enable()
