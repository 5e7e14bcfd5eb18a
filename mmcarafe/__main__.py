"""``python -m mmcarafe``: what is installed, and which kernels run here."""

import ctypes
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


def cpu_report():
    widest = cpu.runnable()[0]
    if cpu.KERNEL is None:
        return (
            'PyTorch path, because no kernel was compiled at install time\n'
            '  To do: install a C++ compiler (sudo apt install g++), then\n'
            '  run `pip install .` or `pip install -e .` again, with -v to\n'
            '  see what the compiler says.'
        )
    lines = [f'kernel at {cpu.KERNEL.path}']
    if cpu.KERNEL.path != cpu.find(widest):
        lines.append(
            f'  The faster one for {widest} was not compiled.\n'
            '  To do: a newer C++ compiler, and `pip install -v .` again.'
        )
    if hasattr(ctypes.CDLL(None), 'GOMP_parallel'):
        lines.append(f'  {torch.get_num_threads()} threads, as torch')
    else:
        lines.append('  1 thread, because torch has brought no OpenMP runtime')
    return '\n'.join(lines)


def cuda_report():
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return 'not available, because this torch was built without CUDA'
        return 'not available, because torch finds no CUDA device'
    return f'{triton.status()} on {torch.cuda.get_device_name()}'


def main():
    print(f'mmcarafe {mmcarafe.__version__}')
    print(f'Python {platform.python_version()}')
    print(f'torch {torch.__version__}')
    for packages in PACKAGES:
        print(version(packages))
    print(f'CPU: {cpu_report()}')
    print(f'CUDA: {cuda_report()}')


if __name__ == '__main__':
    main()
