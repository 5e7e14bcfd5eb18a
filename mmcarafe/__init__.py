"""CARAFE, content-aware upsampling, for MMDetection and MMSegmentation."""

__version__ = '0.1.0'
__all__ = ['CARAFE', 'CARAFEFPN', 'CARAFEUPerHead']

_HOSTS = dict(CARAFEFPN='mmdet', CARAFEUPerHead='mmseg')


def __getattr__(name):
    # `import mmcarafe` costs no import of torch or of a host project.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import mmcarafe.models

    try:
        return getattr(mmcarafe.models, name)
    except AttributeError:
        raise ImportError(
            f'mmcarafe.{name} needs {_HOSTS[name]}, which is not installed'
        ) from None
