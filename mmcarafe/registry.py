"""The registry node that the prefix in ``type='mmcarafe.…'`` leads to."""

from importlib.metadata import PackageNotFoundError, distribution

from mmengine.config import utils
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

MODELS = Registry(
    'model', parent=ROOT, scope='mmcarafe', locations=['mmcarafe.models']
)


def _installed(name):
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


# mmengine looks for mmseg's configs in the distribution mmsegmentation, and
# its get_config even installs that. The maintained fork has another name.
if _installed('onedl-mmsegmentation'):
    utils.MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
