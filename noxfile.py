"""Test the one wheel of `make wheel` in every Python and torch it is for.

`nox` runs everything, `nox -p 3.12` one Python, `nox -t 2.8.0` one torch; what
follows `--` goes to pytest. A Python that is missing counts as failed. torch
comes from where pip finds it: PIP_INDEX_URL chooses a build without CUDA, a
tenth of the size.
"""

import shutil
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = True

# Releases of torch, and the minor versions of Python 3 that they have in
# common with us: the oldest, one that brought numpy 2, the last for Python
# 3.9, and the one that `make setup` installs.
TORCH = {
    '2.1.2': range(8, 12),
    '2.4.1': range(8, 13),
    '2.8.0': range(9, 14),
    '2.13.0': range(10, 14),
}
# Those that need torch alone.
TESTS = (
    'tests/test_ops.py',
    'tests/test_ops_cpu.py',
    'tests/test_window_similarity.py',
    'tests/test_dysample.py',
    'tests/test_eucb.py',
    'tests/test_freqfusion.py',
    'tests/test_sapa.py',
)
# The arithmetic is the same file everywhere: one case of it is enough here.
SELECTED = 'not without_compiler and (the-paper or not equal)'


# virtualenv, nox's default, has given up Python 3.8.
@nox.session(venv_backend='venv')
@nox.parametrize(
    'python, torch',
    [
        nox.param(f'3.{minor}', torch, tags=[torch])
        for torch in TORCH
        for minor in TORCH[torch]
    ],
)
def wheel(session, torch):
    dist = Path('dist').resolve()
    if not list(dist.glob('*.whl')):
        session.error('there is no wheel in dist: run make wheel')
    # torch 2.1 was compiled for numpy 1
    numpy = 'numpy<2' if torch.startswith('2.1.') else 'numpy'
    session.install(f'torch=={torch}', numpy, 'pytest')
    # pip chooses among those in dist
    session.install(
        'mmcarafe', '--no-deps', '--no-index', '--find-links', dist
    )
    # A copy, beside which lies no mmcarafe that could be taken instead.
    folder = Path(session.create_tmp())
    for name in ('tests', 'tools'):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(name, folder / name)
    shutil.copy('pyproject.toml', folder)
    session.chdir(folder)
    report = session.run('python', '-m', 'mmcarafe', silent=True)
    session.log(report)
    if 'CPU: compiled library' not in report:
        session.error('the wheel that was installed has no CPU library')
    session.run('pytest', '-q', '-k', SELECTED, *TESTS, *session.posargs)
