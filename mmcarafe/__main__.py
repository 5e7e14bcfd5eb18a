"""``python -m mmcarafe``: what is installed, and what serves each device."""

import argparse
import importlib.metadata
import platform

import torch

import mmcarafe
from mmcarafe.ops import cpu, triton

# Each module comes from OpenMMLab's package or from its maintained fork.
PACKAGES = (
    ('mmengine', 'onedl-mmengine'),
    ('mmcv', 'onedl-mmcv'),
    ('mmdet', 'onedl-mmdetection'),
    ('mmsegmentation', 'onedl-mmsegmentation'),
    ('triton',),
)


def version(packages):
    for package in packages:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return f'{package} {found}'
    return f'{packages[0]} not installed'


def main():
    argparse.ArgumentParser(
        prog='python -m mmcarafe',
        description='Say what is installed, what serves each device, and why.',
    ).parse_args()
    print(f'mmcarafe {mmcarafe.__version__}')
    print(f'Python {platform.python_version()}')
    print(f'torch {torch.__version__}')
    for packages in PACKAGES:
        print(version(packages))
    print(f'CPU: {cpu.status()}')
    print(f'CUDA: {triton.status()}')


if __name__ == '__main__':
    main()
