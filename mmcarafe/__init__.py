"""CARAFE, content-aware upsampling, for PyTorch and for OpenMMLab."""

import importlib

__version__ = '0.1.0'

# Where each name lives, and what that needs beside torch.
_WHERE = {
    'CARAFE': ('upsamplers', None),
    'DynamicFilter': ('upsamplers', None),
    'build_upsampler': ('upsamplers', None),
    'swap_upsample': ('models', 'mmengine'),
    'CARAFEFPN': ('models', 'mmdet'),
    'CARAFEPAFPN': ('models', 'mmdet'),
    'CARAFEUPerHead': ('models', 'mmseg with ftfy and regex'),
}
__all__ = list(_WHERE)


def __getattr__(name):
    # `import mmcarafe` costs no import of torch or of a host project.
    if name in ('ops', 'upsamplers', 'models'):
        return importlib.import_module(f'mmcarafe.{name}')
    if name not in _WHERE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    package, needs = _WHERE[name]
    found = importlib.import_module(f'mmcarafe.{package}')
    if not hasattr(found, name):
        raise ImportError(
            f'mmcarafe.{name} needs {needs}, which is not installed'
        )
    return getattr(found, name)
