"""The registry node that the prefix in ``type='mmcarafe.…'`` leads to."""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

MODELS = Registry(
    'model', parent=ROOT, scope='mmcarafe', locations=['mmcarafe.models']
)
