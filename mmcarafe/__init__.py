"""CARAFE, content-aware upsampling, for PyTorch and for OpenMMLab."""

import importlib
from importlib.util import find_spec

__version__ = '0.2.0'

# Where names are, and what they need besides torch. All others come from
# mmcarafe.upsamplers, which needs torch alone.
_NEEDS = {
    'CARAFEFPN': ('models', 'mmengine', 'mmdet'),
    'CARAFEPAFPN': ('models', 'mmengine', 'mmdet'),
    # mmseg imports the last two but does not list them as requirements
    'CARAFEUPerHead': ('models', 'mmengine', 'mmseg', 'ftfy', 'regex'),
    'CARAFESegformerHead': ('models', 'mmengine', 'mmseg', 'ftfy', 'regex'),
    'KernelVisualizationHook': ('visualization.hook', 'mmengine'),
}


def __getattr__(name):
    # `import mmcarafe` by itself imports neither torch nor a host project.
    if name in ('ops', 'upsamplers', 'models', 'visualization'):
        return importlib.import_module(f'mmcarafe.{name}')
    if name in _NEEDS:
        place, *needs = _NEEDS[name]
        missing = [module for module in needs if not find_spec(module)]
        if missing:
            raise ImportError(
                f'mmcarafe.{name} needs {", ".join(missing)}: not installed'
            )
        return getattr(importlib.import_module(f'mmcarafe.{place}'), name)
    upsamplers = importlib.import_module('mmcarafe.upsamplers')
    if name == '__all__':  # of `from mmcarafe import *`
        return [*upsamplers.__all__, *_NEEDS]
    if name not in upsamplers.__all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name == 'swap_upsample' and find_spec('mmengine'):
        importlib.import_module('mmcarafe.models')  # adds OpenMMLab's classes
    return getattr(upsamplers, name)
