import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

# With several files at a time, each has its share of the cores, and so has
# what its tests start: threads that wait for a core would wait busily.
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):
    share = max(1, os.cpu_count() // int(workers))
    os.environ.setdefault('OMP_NUM_THREADS', str(share))

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# What is built and installed, and how.
SOURCES = (
    'LICENSE',
    'Makefile',
    'README.md',
    'configs',
    'mmcarafe',
    'model-index.yml',
    'pyproject.toml',
    'setup.cfg',
    'setup.py',
    'tools',
)
# What `make test-fast` leaves out: files that take more than ten seconds.
SLOW = {
    'test_accuracy.py',
    'test_benchmarks.py',
    'test_compare_upsamplers.py',
    'test_comparison.py',
    'test_configs.py',
    'test_distributed.py',
    'test_docs.py',
    'test_export.py',
    'test_faults.py',
    'test_flops.py',
    'test_fuzz.py',
    'test_gpu_suite.py',
    'test_hostile_files.py',
    'test_kernel_visualization_hook.py',
    'test_kernels_page.py',
    'test_limits.py',
    'test_notebook.py',
    'test_nuclei_converter.py',
    'test_ops_triton.py',
    'test_packaging.py',
    'test_published.py',
    'test_segmentation.py',
    'test_slots.py',
    'test_tools.py',
    'test_tools_checkpoints.py',
    'test_tools_data.py',
    'test_torch_alone.py',
    'test_visualization.py',
    'test_watch_build.py',
}
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
OFFLINE = ('--no-deps', '--no-index', '--no-build-isolation')


def run(*command, **kwargs):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def save_untrained(config, folder):
    """Save the weights that a config's model has at first, as STEM.pth."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(ROOT / config)
    init_default_scope(cfg.default_scope)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmseg's, about its losses
        model = MODELS.build(cfg.model)
    torch.save(model.state_dict(), folder / f'{Path(config).stem}.pth')


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For many small tensors: waking threads would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def dist(checkout):
    """What `make wheel` makes, in the environment of the tests."""
    env = {  # not those of a make that runs the tests
        name: value
        for name, value in os.environ.items()
        if not name.startswith('MAKE') and name not in ('STACK', 'TORCH')
    }
    here = Path(sys.executable).parent
    run(
        *('make', '-o', '.venv/ready', 'wheel', f'BIN={here}'),
        cwd=checkout,
        env=env,
    )
    return checkout / 'dist'


@pytest.fixture(scope='session')
def wheel(dist):
    (wheel,) = dist.glob('*-manylinux*.whl')
    return wheel
