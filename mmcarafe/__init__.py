"""CARAFE, content-aware upsampling, for MMDetection and MMSegmentation."""

import importlib

__version__ = '0.1.0'
__all__ = [
    'CARAFE',
    'CARAFEFPN',
    'CARAFEPAFPN',
    'CARAFEUPerHead',
    'swap_upsample',
]

_NEEDS = dict(
    CARAFEFPN='mmdet',
    CARAFEPAFPN='mmdet',
    CARAFEUPerHead='mmseg with ftfy and regex',
)


def __getattr__(name):
    # `import mmcarafe` costs no import of torch or of a host project.
    if name in ('ops', 'models'):
        return importlib.import_module(f'mmcarafe.{name}')
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    models = importlib.import_module('mmcarafe.models')
    if not hasattr(models, name):
        raise ImportError(
            f'mmcarafe.{name} needs {_NEEDS[name]}, which is not installed'
        )
    return getattr(models, name)
