"""The CPU library against the reference, for every vector width."""

import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from cases import (
    CASES,
    LAYOUTS,
    OPTIONS,
    Case,
    all_dtypes,
    all_layouts,
    all_options,
    assert_as_exact_as,
    randn,
)

from mmcarafe.ops import carafe_from_logits, cpu, reference

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).resolve().parents[1]

# Shapes of more than one block, downwards or across, and of 16 channels.
BLOCK_CASES = {
    'blocks': Case(2, 20, 19, 37),
    'blocks-wide': Case(1, 5, 3, 205),
    'blocks-k3': Case(1, 33, 18, 34, k=3),
    'blocks-k1-s4': Case(1, 16, 17, 40, k=1, s=4),
    'blocks-k7-s1-groups': Case(1, 34, 18, 33, k=7, g=2, s=1),
    'blocks-s3-groups': Case(2, 18, 17, 21, k=3, g=2, s=3),
    'blocks-k11': Case(1, 5, 7, 80, k=11),
    'k37-wider-than-map': Case(1, 3, 2, 40, k=37, s=1),
}
all_cases = pytest.mark.parametrize(
    'case',
    [*CASES.values(), *BLOCK_CASES.values()],
    ids=[*CASES, *BLOCK_CASES],
)


@pytest.fixture(params=cpu.CAPABILITIES, scope='module')
def library(request):
    if request.param not in cpu.runnable():
        pytest.skip(f'this machine has no {request.param}')
    path = cpu.find(request.param)
    if path is None:
        pytest.skip(f'nothing was compiled for {request.param}')
    return cpu.Library(path)


@pytest.fixture
def threads(one_thread):
    """Two threads, or as many as the test sets."""
    torch.set_num_threads(2)
    return torch.set_num_threads


def inputs(case, dtype=torch.float32, layout=LAYOUTS['contiguous'], masks=0):
    """Features, scores and the gradient of the output."""
    if masks:
        scores = reference.scores_from_masks(
            layout(randn(*case.masks_shape, dtype=dtype)), *case.arguments
        )
    else:
        scores = reference.scores_from_logits(
            layout(randn(*case.logits_shape, dtype=dtype)), *case.arguments
        )
    shape = case.n, case.c, case.s * case.h, case.s * case.w
    return (
        layout(randn(*case.features_shape, dtype=dtype)),
        scores,
        layout(randn(*shape, dtype=dtype)),
    )


def run(library, features, scores, grad, options=('softmax', 'zeros')):
    """What each of the three operators gives."""
    return (
        library.reassemble(features, scores, *options),
        library.reassemble_grad_features(grad, scores, *options),
        library.reassemble_grad_weights(grad, features, scores, *options),
    )


@functools.lru_cache(maxsize=None)  # the same for every library
def expectations(case, dtype, layout, masks):
    """Inputs, and for all options, results in their dtype and in fp64."""
    tensors = inputs(case, dtype, layout, masks)
    doubles = [tensor.double() for tensor in tensors]
    return tensors, {
        options: (
            run(reference, *tensors, options),
            run(reference, *doubles, options),
        )
        for options in ([(None, 'zeros')] if masks else OPTIONS.values())
    }


@all_cases
@all_dtypes
@all_layouts
@pytest.mark.parametrize('masks', [False, True], ids=['logits', 'masks'])
def test_equals_reference(library, case, dtype, layout, masks):
    tensors, expected = expectations(case, dtype, layout, masks)
    for options, (same_dtype, exact) in expected.items():
        results = run(library, *tensors, options)
        for result, rounded, true in zip(results, same_dtype, exact):
            assert_as_exact_as(result, rounded, true)
            assert result.stride() == rounded.stride()


def test_expanded_gradient(library):
    """What the backward of a sum hands over: all strides are zero."""
    features, weights, grad = inputs(BLOCK_CASES['blocks'])
    grad = grad[:1, :1, :1, :1].expand_as(grad)
    expanded = run(library, features, weights, grad)
    dense = run(library, features, weights, grad.contiguous())
    assert all(map(torch.equal, expanded, dense))


@all_options
@pytest.mark.parametrize('value', [torch.inf, -torch.inf, torch.nan], ids=str)
def test_non_finite_logits_behave_as_in_the_reference(library, options, value):
    features, weights, grad = inputs(Case(1, 3, 7, 19))
    for tap in (0, 12, 24):  # the first and the last leave the map
        for place in ((0, 0), (3, 8), (6, 18)):
            weights[(0, 0, tap, 0, 1, *place)] = value
    weights[0, 0, :, 1, 1, 3, 12] = value
    results = run(library, features, weights, grad, options)
    expected = run(reference, features, weights, grad, options)
    for result, rounded in zip(results, expected):
        torch.testing.assert_close(result, rounded, equal_nan=True)


def test_non_finite_features_and_gradients_stay_where_they_are(library):
    features, weights, grad = inputs(Case(1, 3, 7, 19))
    features[0, 1, 0, 0] = features[0, 1, 3, 15] = torch.nan
    grad[0, 2, 0, 0] = grad[0, 2, 7, 32] = torch.inf
    results = run(library, features, weights, grad)
    expected = run(reference, features, weights, grad)
    for result, rounded in zip(results, expected):
        torch.testing.assert_close(result, rounded, equal_nan=True)


def test_non_finite_maps_leave_the_next_one_alone(library):
    """Its blocks follow in the same buffers, and are narrower."""
    features, weights, grad = inputs(Case(2, 20, 19, 205))
    expected = run(library, features, weights, grad)
    for tensor in (features, weights, grad):
        tensor[0] = torch.nan
    results = run(library, features, weights, grad)
    for result, clean in zip(results, expected):
        assert torch.equal(result[1], clean[1])
        assert result[0].isnan().any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('factor', [1, -1 / 3, 0.07, 1e-3, 300])
def test_every_16_bit_number_is_read_and_rounded_as_by_torch(
    library, dtype, factor
):
    """With K = S = 1, the operator is a product of two numbers."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    features = bits.view(dtype).view(1, 1, 256, 256)
    weights = torch.full((1, 1, 1, 1, 1, 256, 256), factor, dtype=dtype)
    result = library.reassemble(features, weights, None)
    expected = (features.float() * weights[0, 0].float()[0, 0, 0]).to(dtype)
    torch.testing.assert_close(
        result, expected, rtol=0, atol=0, equal_nan=True
    )


@all_dtypes
@all_layouts
@pytest.mark.parametrize(
    'case', [Case(2, 67, 11, 37), Case(1, 400, 4, 50)], ids=['down', 'across']
)
def test_threads_do_not_change_a_bit(library, dtype, layout, case, threads):
    """More threads get more and smaller blocks."""
    tensors = inputs(case, dtype, layout)
    results = []
    for count in (1, 2, 5, 9, 2):
        threads(count)
        results.append(run(library, *tensors))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@all_layouts
@all_options
def test_every_element_is_written(library, layout, options):
    """Uninitialised memory is filled with NaN here."""
    tensors = inputs(BLOCK_CASES['blocks'], layout=layout)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        results = run(library, *tensors, options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


# Threads and processes


def test_python_threads_at_once(library, threads):
    cases = [Case(1, 64, 20, 30), Case(2, 99, 20, 40, k=3)] * 2
    tensors = [inputs(case) for case in cases]
    expected = [run(library, *each) for each in tensors]
    start = threading.Barrier(len(cases))

    def work(index):
        start.wait()
        return [run(library, *tensors[index]) for _ in range(20)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for once, repeated in zip(expected, pool.map(work, range(len(cases)))):
            for again in repeated:
                assert all(map(torch.equal, once, again))


needs_library = pytest.mark.skipif(
    cpu.LIBRARY is None, reason='the CPU library was not compiled'
)
# Python 3.12 and later warn of what is tested here.
forks = pytest.mark.filterwarnings('ignore:.*use of fork:DeprecationWarning')


def _upsample(features, logits):
    return carafe_from_logits(features, logits, 5)


def _send_upsampled(connection, *tensors):
    connection.send_bytes(_upsample(*tensors).numpy().tobytes())


@needs_library
@forks
def test_forked_process(threads):
    """The child inherits torch's two threads, of which it has none."""
    tensors = randn(1, 64, 20, 30), randn(1, 100, 20, 30)
    expected = _upsample(*tensors)  # the parent has used its threads
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_upsampled, args=(sender, *tensors))
    child.start()
    try:
        assert receiver.poll(60), 'the forked process hangs'
        assert receiver.recv_bytes() == expected.numpy().tobytes()
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


class _Upsampled(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return _upsample(
            torch.randn(1, 64, 20, 30, generator=generator),
            torch.randn(1, 100, 20, 30, generator=generator),
        )


@needs_library
@forks
def test_data_loader_workers(threads):
    dataset = _Upsampled()
    expected = torch.stack(list(map(dataset.__getitem__, range(4))))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, timeout=60
    )
    (batch,) = loader
    assert torch.equal(batch, expected)


@needs_library
def test_torch_brings_the_only_openmp_runtime():
    code = (
        'import ctypes, torch, mmcarafe.ops\n'
        'x, y = torch.ones(1, 64, 50, 50), torch.ones(1, 100, 50, 50)\n'
        'mmcarafe.ops.carafe_from_logits(x, y, 5)\n'
        'ctypes.CDLL(None).GOMP_parallel\n'
        "print(open('/proc/self/maps').read())"
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    runtimes = {
        line.split()[-1]
        for line in done.stdout.splitlines()
        if 'gomp' in line or 'iomp' in line or 'libomp' in line
    }
    assert len(runtimes) == 1, runtimes


# The install


@needs_library
def test_dispatcher_takes_the_widest_library(monkeypatch):
    compiled = list(filter(cpu.find, cpu.runnable()))
    assert cpu.LIBRARY.path == cpu.find(compiled[0])
    calls = []
    original = cpu.Library._run
    monkeypatch.setattr(
        cpu.Library,
        '_run',
        lambda self, name, *rest, **more: (
            calls.append((self, name)) or original(self, name, *rest, **more)
        ),
    )
    features = randn(1, 2, 3, 4).requires_grad_()
    logits = randn(1, 100, 3, 4).requires_grad_()
    _upsample(features, logits).sum().backward()
    assert {library for library, _ in calls} == {cpu.LIBRARY}
    assert sorted(name for _, name in calls) == [
        'reassemble',
        'reassemble_grad_features',
        'reassemble_grad_weights',
    ]


def test_library_of_another_build_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, '__file__', str(tmp_path / 'cpu.py'))
    # how a release that built one library for each Python named it
    (tmp_path / f'_cpu_default{EXTENSION_SUFFIXES[0]}').touch()
    assert cpu.find('DEFAULT') is None
    (tmp_path / '_cpu_default.so').touch()
    assert cpu.find('DEFAULT') == str(tmp_path / '_cpu_default.so')


def test_broken_library(monkeypatch, tmp_path):
    """Half of one, or one on a disk from which no program may run."""
    monkeypatch.setattr(cpu, '__file__', str(tmp_path / 'cpu.py'))
    path = tmp_path / '_cpu_default.so'
    path.write_bytes(b'\x7fELF')
    with pytest.warns(UserWarning, match=f'{path}: .*: install mmcarafe aga'):
        monkeypatch.setattr(cpu, 'LIBRARY', cpu._load())
    assert cpu.LIBRARY is None
    assert 'the compiled library cannot be loaded' in cpu.status()
    path.unlink()
    assert 'nothing was compiled at install time' in cpu.status()


def _python(*arguments, **environ):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        cwd=os.sep,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_library
def test_report_names_the_library():
    report = _python('-m', 'mmcarafe', PYTHONPATH=os.pathsep.join(sys.path))
    assert f'compiled library {cpu.LIBRARY.path}' in report


def test_report_knows_the_forks():
    from mmcarafe.__main__ import version

    assert version(('no-such-package', 'pytest')) == (
        f'pytest {pytest.__version__}'
    )
    assert version(('no-such-package',)) == 'no-such-package not installed'


@pytest.fixture(scope='module')
def without_compiler(tmp_path_factory):
    """Where an install without a compiler ended."""
    copy = tmp_path_factory.mktemp('checkout')
    shutil.copytree(
        ROOT / 'mmcarafe',
        copy / 'mmcarafe',
        ignore=shutil.ignore_patterns('*.so', '.mim', '__pycache__'),
    )
    for name in ('setup.py', 'setup.cfg', 'pyproject.toml', 'LICENSE'):
        shutil.copy(ROOT / name, copy)
    (copy / 'README.md').touch()
    target = tmp_path_factory.mktemp('target')
    _python(
        *('-m', 'pip', 'install', '--no-deps', '--no-index'),
        *('--no-build-isolation', '--target', str(target), str(copy)),
        CC='/no/such/compiler',
        CXX='/no/such/compiler',
    )
    return target


def test_install_without_compiler_works(without_compiler):
    code = (
        'import torch\n'
        'from mmcarafe.ops import carafe_from_logits, cpu\n'
        'x = torch.ones(1, 2, 3, 4), torch.ones(1, 100, 3, 4)\n'
        'print(cpu.__file__, cpu.LIBRARY, carafe_from_logits(*x, 5).shape)'
    )
    out = _python('-c', code, PYTHONPATH=str(without_compiler))
    assert str(without_compiler) in out
    assert 'None torch.Size([1, 2, 6, 8])' in out


def test_report_without_compiler_says_what_to_do(without_compiler):
    report = _python('-m', 'mmcarafe', PYTHONPATH=str(without_compiler))
    assert 'CPU: PyTorch reference' in report
    assert 'C++ compiler' in report and 'pip install' in report
