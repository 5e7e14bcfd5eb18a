import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# What is built and installed, and how.
SOURCES = (
    'LICENSE',
    'README.md',
    'configs',
    'mmcarafe',
    'model-index.yml',
    'pyproject.toml',
    'setup.cfg',
    'setup.py',
    'tools',
)
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
OFFLINE = ('--no-deps', '--no-index', '--no-build-isolation')


def run(*command, **kwargs):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def real_data():
    """Folder of genuine images; CONTRIBUTING.md says what it holds."""
    folder = os.environ.get('MMCARAFE_TEST_DATA')
    if not folder:
        pytest.skip('MMCARAFE_TEST_DATA is not set')
    return Path(folder).resolve()


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    """A copy to build in, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp('checkout')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope='session')
def wheel(checkout):
    run(*PIP, 'wheel', *OFFLINE, '-w', 'dist', '.', cwd=checkout)
    (wheel,) = (checkout / 'dist').glob('*.whl')
    return wheel
