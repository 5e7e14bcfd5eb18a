"""The registries that the prefix in ``type='mmcarafe.…'`` leads to."""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from mmengine.config import utils
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import METRICS as ROOT_METRICS
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

MODELS = Registry(
    'model', parent=ROOT, scope='mmcarafe', locations=['mmcarafe.models']
)
METRICS = Registry(
    'metric',
    parent=ROOT_METRICS,
    scope='mmcarafe',
    locations=['mmcarafe.evaluation'],
)
HOOKS = Registry(
    'hook',
    parent=ROOT_HOOKS,
    scope='mmcarafe',
    locations=['mmcarafe.visualization.hook'],
)

HAS_MMDET = find_spec('mmdet') is not None
# mmseg imports the other two but does not list them as requirements
HAS_MMSEG = all(map(find_spec, ('mmseg', 'ftfy', 'regex')))


def _installed(name):
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


# mmengine looks for mmseg's configs in the distribution mmsegmentation, and
# its get_config even installs it. The maintained fork has another name.
if _installed('onedl-mmsegmentation'):
    utils.MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
