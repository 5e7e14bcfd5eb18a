import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


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
