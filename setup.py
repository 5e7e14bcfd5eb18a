"""What setup.cfg cannot say: the CPU library, once per vector width."""

import platform

from setuptools import Extension, setup

# Named after torch.backends.cpu.get_cpu_capability().
FLAGS = {'default': []}
if platform.machine() in ('x86_64', 'AMD64'):
    FLAGS['avx2'] = ['-mavx2', '-mfma']
    FLAGS['avx512'] = [
        '-mavx512f',
        '-mavx512bw',
        '-mavx512dq',
        '-mavx512vl',
        '-mfma',
        '-mprefer-vector-width=512',
    ]

# Plain shared libraries, loaded by mmcarafe/ops/cpu.py: they need neither
# torch nor Python to build. Without a compiler, the install goes on, and the
# operators run on the PyTorch path.
setup(
    ext_modules=[
        Extension(
            f'mmcarafe.ops._cpu_{name}',
            ['mmcarafe/ops/cpu.cpp'],
            extra_compile_args=['-std=c++17', '-O3', '-g0', *flags],
            language='c++',
            optional=True,
        )
        for name, flags in FLAGS.items()
    ]
)
