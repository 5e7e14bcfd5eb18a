"""CARAFE, content-aware upsampling, for PyTorch and for OpenMMLab."""

import importlib

__version__ = '0.1.0'

# Names of mmcarafe.models, and what they need beside torch. All others are
# those of mmcarafe.upsamplers, which needs torch alone.
_NEEDS = {
    'swap_upsample': 'mmengine',
    'CARAFEFPN': 'mmdet',
    'CARAFEPAFPN': 'mmdet',
    'CARAFEUPerHead': 'mmseg with ftfy and regex',
}


def __getattr__(name):
    # `import mmcarafe` costs no import of torch or of a host project.
    if name in ('ops', 'upsamplers', 'models'):
        return importlib.import_module(f'mmcarafe.{name}')
    if name in _NEEDS:
        found = importlib.import_module('mmcarafe.models')
        if not hasattr(found, name):
            raise ImportError(
                f'mmcarafe.{name} needs {_NEEDS[name]}, which is not installed'
            )
        return getattr(found, name)
    upsamplers = importlib.import_module('mmcarafe.upsamplers')
    if name not in upsamplers.__all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(upsamplers, name)
