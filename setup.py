"""What setup.cfg cannot say: the CPU library, once per vector width.

MMCARAFE_WITH_OPS=1 demands it, and MMCARAFE_WITH_OPS=0 leaves it out, which
makes a wheel for every platform.
"""

import copy
import os
import platform

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

WITH_OPS = os.environ.get('MMCARAFE_WITH_OPS', '')
if WITH_OPS not in ('', '0', '1'):
    raise SystemExit(f'MMCARAFE_WITH_OPS is {WITH_OPS!r}, expected 0 or 1')

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
# torch nor Python to build, and know neither's version.
class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + '.so'

    def build_extension(self, ext):
        # They are of one source and compiled at the same time: in one folder,
        # one would be linked from another's object.
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildLibraries, own).build_extension(ext)


class BuildWheel(bdist_wheel):
    def get_tag(self):
        return ('py3', 'none', super().get_tag()[2])


setup(
    cmdclass={'build_ext': BuildLibraries, 'bdist_wheel': BuildWheel},
    ext_modules=[
        Extension(
            f'mmcarafe.ops._cpu_{name}',
            ['mmcarafe/ops/cpu.cpp'],
            extra_compile_args=['-std=c++17', '-O3', '-g0', *flags],
            language='c++',
            # Without a compiler, the install goes on, and the operators run
            # on the PyTorch path.
            optional=WITH_OPS != '1',
        )
        for name, flags in FLAGS.items()
        if WITH_OPS != '0'
    ],
)
