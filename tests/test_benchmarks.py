"""All methods that the benchmark compares agree, also those for GPUs only."""

import colorsys
import contextlib
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from mmcarafe.ops import carafe

# torch 2.1 warns so of every second function that it compiles
pytestmark = pytest.mark.filterwarnings('ignore:changing options to `torch.c')


@pytest.fixture
def bench_op():
    import bench_op

    return bench_op


def mmcv_carafe(features, masks, kernel_size, group_size, scale_factor):
    """What mmcv's own takes: no bf16, no channels_last, one dtype."""
    assert features.dtype == masks.dtype != torch.bfloat16
    assert features.is_contiguous() and masks.is_contiguous()
    return carafe(features, masks, kernel_size, group_size, scale_factor)


def all_methods(bench_op, features, methods):
    found = methods(features, None)
    logits = found['CARAFE'][1][1]
    return found | bench_op.gpu_baselines.methods(
        features, logits, bench_op.KERNEL_SIZE, mmcv_carafe
    )


@pytest.mark.parametrize(
    'dtype, channels_last',
    ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)),
)
def test_every_carafe_is_the_same(bench_op, dtype, channels_last):
    features = torch.randn(2, 16, 6, 7, dtype=dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    methods = all_methods(bench_op, features, bench_op.methods)
    function, inputs = methods['CARAFE']
    exact = function(*(x.double() for x in inputs))
    compared = [name for name in methods if name.startswith('CARAFE')]
    assert ("CARAFE, mmcv's" in compared) == (
        dtype == torch.float32 and not channels_last
    )
    for name in compared:
        function, inputs = methods[name]
        rounded = any(x.dtype == torch.bfloat16 for x in inputs)
        # half a unit in the last place of bf16, of values up to 4; sums of 25
        # products in fp32
        # the windows of these outputs lie inside the map
        inner = slice(4, -4) if 'renormalised' in name else slice(None)
        torch.testing.assert_close(
            function(*inputs)[:, :, inner, inner].double(),
            exact[:, :, inner, inner],
            rtol=0,
            atol=2**-5 if rounded else 1e-5,
            msg=lambda message, name=name: f'{name}: {message}',
        )


needs_fp16_on_cpus = pytest.mark.skipif(
    torch.__version__.startswith('2.1.'),
    reason='torch 2.1 has no fp16 autocast on CPUs',
)


@needs_fp16_on_cpus
def test_every_module_is_the_same(bench_op):
    """With the parameters of one of them, to the bits of their dtypes."""
    features = torch.randn(2, 16, 6, 7)
    modules = bench_op.gpu_baselines.modules(features, 5, mmcv_carafe)
    assert len(modules) == 4
    inputs = modules["module, mmcv's, fp32"][1]
    exact = modules["module, mmcv's, fp32"][0](*inputs)
    for name, (function, own) in modules.items():
        assert [x.shape for x in own] == [x.shape for x in inputs]
        values = [x.to(y.dtype) for x, y in zip(inputs, own)]
        torch.testing.assert_close(
            function(*values).float(), exact, rtol=0, atol=2**-5, msg=name
        )


@needs_fp16_on_cpus
def test_report(bench_op, tmp_path, monkeypatch):
    """Every method in every pass, in the table and in the plot."""
    device = torch.device('cpu')
    methods = bench_op.methods
    monkeypatch.setattr(
        bench_op, 'methods', lambda x, _: all_methods(bench_op, x, methods)
    )
    results = bench_op.measure(
        (1, 8, 5, 6),
        torch.float32,
        device,
        torch.contiguous_format,
        budget=0,
    )
    names = {r['method'] for r in results}
    assert {'CARAFE', "CARAFE, mmcv's", "module, mmcv's, fp32"} < names
    assert 'SAPA 5×5' in names  # which wants a guide
    assert len(results) == len(bench_op.PASSES) * len(names)
    for result in results:
        assert result['seconds'] > 0, result
        assert result['peak_bytes'] > 0
        if result['pass'] == 'forward':  # it keeps nothing
            assert result['kept_bytes'] is None
        else:
            assert result['kept_bytes'] >= 0
    report = {
        'environment': bench_op.environment(device),
        'dtype': 'float32',
        'memory_format': 'contiguous',
        'results': [{'shape': 'small', **r} for r in results],
    }
    table = bench_op.table(report)
    assert table.count('| CARAFE, bf16 |') == len(bench_op.PASSES)
    bench_op.plot(report, tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 10_000


def test_what_is_kept_for_the_backward_pass(bench_op):
    """The storages of features and logits, once each."""
    from _measure import kept_memory  # which bench_op put on the path

    features = torch.randn(1, 16, 6, 7)
    methods = all_methods(bench_op, features, bench_op.methods)

    def kept(name):
        function, inputs = methods[name]
        return kept_memory(function, [x.requires_grad_() for x in inputs])

    assert kept('CARAFE') == (16 + 100) * 6 * 7 * 4
    assert kept('nearest') == 0


@pytest.mark.parametrize('name', ['deconvolution 3×3', 'bilinear'])
def test_a_method_that_fails(name, bench_op, monkeypatch, capsys, tmp_path):
    """It costs the others nothing, and the report and the exit show it."""

    def fails(*tensors):
        raise RuntimeError('no such kernel')

    methods = bench_op.methods
    monkeypatch.setattr(
        bench_op,
        'methods',
        lambda x, mmcv: {**methods(x, mmcv), name: (fails, [x])},
    )
    monkeypatch.setattr(bench_op, 'tests_pass', lambda device: True)
    monkeypatch.setattr(bench_op, 'CPU_SHAPES', {'small': (1, 8, 5, 6)})
    arguments = ['', '--out', str(tmp_path), '--budget', '0']
    monkeypatch.setattr('sys.argv', arguments)
    with pytest.raises(SystemExit, match=f'^error: these failed: {name}$'):
        bench_op.main()
    printed, _ = capsys.readouterr()
    assert f'{name}, forward: RuntimeError: no such kernel' in printed
    assert f'| {name} | failed |' in (tmp_path / 'table.md').read_text()
    results = json.loads((tmp_path / 'results.json').read_text())['results']
    assert {r['method'] for r in results if 'seconds' in r} >= {'CARAFE'}
    assert (tmp_path / 'plot.png').exists()
    written = f'written: {tmp_path}/results.json, table.md and plot.png'
    assert written in printed.splitlines()


@pytest.fixture
def pretended_gpu(bench_op, monkeypatch):
    """On it, a call takes a second; a graph of 2 calls half of one each."""
    import fake_gpu

    for fake in fake_gpu.FAKES:
        monkeypatch.setattr(*fake)
    return torch.device('cuda')


def test_each_mode_of_a_gpu(bench_op, pretended_gpu, tmp_path):
    """A method that cannot be captured costs the others nothing."""

    def waits(x):
        torch.cuda.synchronize()  # refused in a capture
        return x * 1

    methods = {
        'waits': (waits, [torch.ones(3)]),
        'bilinear': (torch.exp, [torch.ones(3)]),
    }
    results = []
    for pass_name in bench_op.PASSES:
        results += bench_op.measure_pass(
            methods, pass_name, pretended_gpu, 0, with_graphs=True
        )
    found = {(r['method'], r['pass'], r['mode']): r for r in results}
    assert len(found) == len(results) == 2 * 2 * 2
    for (method, _, mode), r in found.items():
        failed = (method, mode) == ('waits', 'graph')
        assert ('error' in r, 'seconds' in r) == (failed, not failed)
        if failed:
            assert 'not permitted when capturing' in r['error']
        else:
            assert r['seconds'] == 1
            assert r['peak_bytes'] == (None if mode == 'graph' else 0)
    launch = {
        **dict.fromkeys(('operator', 'normalizer', 'border', 'layout'), 'x'),
        'dtype': 'bfloat16',
        'shape': [8, 256],
        'candidate': {'way': 'banded', 'block_c': 64},
        **{'registers': 128, 'spills': 0, 'shared_bytes': 1024},
    }
    report = {
        'environment': bench_op.environment(torch.device('cpu')),
        'dtype': 'float32',
        'memory_format': 'contiguous',
        'results': [{'shape': 'small', **r} for r in results],
        'kernels': [launch],
    }
    table = bench_op.table(report)
    for pass_name in bench_op.PASSES:
        eager, replayed = (
            table.split(f'{pass_name}, {mode}: median')[1].split('\n\n')[1]
            for mode in ('eager', 'CUDA graph')
        )
        assert '| waits | 1e+03 ms, 1.00×, 0 MB |' in eager
        assert '| waits | failed |' in replayed
        assert '| bilinear | 1e+03 ms, 1.00× |' in replayed
    assert 'bfloat16 x 8×256, x, x: way banded, block_c 64; 128' in table
    bench_op.plot(report, tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 10_000


def test_a_broken_capture_leaves_nothing_behind(
    bench_op, pretended_gpu, monkeypatch
):
    """As torch does, where an operation is not allowed in a capture."""
    from _measure import Graphs

    current, random_numbers_work, broken_pools = ['default'], True, []

    @contextlib.contextmanager
    def stream(new):
        old, current[0] = current[0], new
        try:
            yield
        finally:
            current[0] = old

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        nonlocal random_numbers_work
        assert pool not in broken_pools, 'already recording to it'
        random_numbers_work = False
        old, current[0] = current[0], stream
        try:
            yield
        except Exception:  # the stream stays
            broken_pools.append(pool)
            raise RuntimeError('capture failed') from None
        current[0] = old
        random_numbers_work = True

    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: Stream(*current))
    monkeypatch.setattr(torch.cuda, 'graph', capture)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', object)

    class Stream(str):
        def wait_stream(self, stream):
            pass

    def waits():
        raise ValueError('it waits')

    graphs = Graphs()
    graphs.capture(list)
    for _ in range(2):
        with pytest.raises(ValueError, match='it waits'):
            graphs.capture(waits, warm_ups=0)
        assert current == ['default']
        assert random_numbers_work
    graphs.capture(list)
    assert len(broken_pools) == 2
    assert len(graphs._captured) == 4  # two of which heal
    graphs.free()


def test_a_graph_holds_as_many_calls_as_are_timed(
    bench_op, pretended_gpu, monkeypatch
):
    """On a GPU that is faster: 10 ms are filled, with 20 calls at most."""
    import fake_gpu

    calls, replayed = 0, []

    def method(x):
        nonlocal calls
        calls += 1
        return x

    def replay(graph):
        replayed.append(calls)

    monkeypatch.setattr(fake_gpu._Graph, 'replay', replay)
    monkeypatch.setattr(torch.cuda.Event, 'elapsed_time', lambda *_: 1)
    (eager, graph) = bench_op.measure_pass(
        {'method': (method, [torch.ones(1)])},
        'forward',
        pretended_gpu,
        0,
        with_graphs=True,
    )
    assert eager['seconds'] == graph['seconds'] == 1e-3 / 11
    # warm-up and first time; warm-up on the side stream; capture
    assert replayed[0] == 1 + 1 + 3 + 11
    assert len(replayed) == 1 + graph['rounds']
    assert calls == replayed[0] + 11 * eager['rounds'] + 1


@pytest.mark.parametrize(
    'script, needs',
    [
        ('bench_op.py', 'matplotlib'),
        ('gpu_suite.py', 'matplotlib'),
        ('bench_train_step.py', 'mmdet'),
        ('accuracy.py', 'mmseg'),
    ],
)
def test_runs_from_a_checkout(script, needs, tmp_path):
    """Where the package is not installed, and from another folder."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f'needs {needs}')
    folder = ROOT / 'benchmarks'
    code = f"""
import runpy, sys
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
sys.path.insert(0, {str(folder)!r})  # as Python does with a script's
sys.meta_path = [x for x in sys.meta_path if 'ditable' not in str(x)]
sys.argv = ['', '--help']
try:
    runpy.run_path({str(folder / script)!r}, run_name='__main__')
finally:
    import mmcarafe
    print('mmcarafe is', mmcarafe.__file__)
"""
    done = subprocess.run(
        [sys.executable, '-I', '-c', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'usage:' in done.stdout
    where = f'mmcarafe is {ROOT / "mmcarafe" / "__init__.py"}'
    assert where in done.stdout.splitlines()


def test_variants_of_carafe_are_shades_of_one_hue(bench_op):
    features = torch.randn(1, 8, 5, 6)
    names = [*all_methods(bench_op, features, bench_op.methods), bench_op.COPY]
    colours = bench_op.colours(names)
    assert set(colours) == set(names)
    assert len(set(colours.values())) == len(names)
    hues = {name: colorsys.rgb_to_hsv(*c)[0] for name, c in colours.items()}
    carafe = hues['CARAFE']
    for name, hue in hues.items():
        apart = abs(hue - carafe)
        if name.startswith('CARAFE'):
            assert apart < 1e-6
        else:
            assert 0.1 < apart < 0.9, name  # of the circle of all hues


def test_the_profiler_logs_nothing():
    code = (
        'import bench_op, _measure, torch\n'
        "device = torch.device('cpu')\n"
        'print(_measure.peak_memory(lambda: torch.ones(9), device))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT / 'benchmarks',
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(9 * 4)
    assert done.stderr == ''


def test_train_step_leaves_its_report(bench_op, tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmdet')
    import bench_train_step

    arguments = ['', '--rounds', '1', '--shape', '64', '64', '--out']
    monkeypatch.setattr('sys.argv', [*arguments, str(tmp_path)])
    bench_train_step.main()
    report = json.loads((tmp_path / 'results.json').read_text())
    assert report['environment'] == bench_op.environment(torch.device('cpu'))
    assert report['image'] == [64, 64]
    for result in report['results']:
        assert result['all_seconds'] == [result['seconds']]
    upsamplers = [result['upsampler'] for result in report['results']]
    assert upsamplers == ['nearest', 'mmcarafe.CARAFE']
    printed, _ = capsys.readouterr()
    assert f'written: {tmp_path}/results.json' in printed.splitlines()
    assert len(printed.splitlines()) == 4  # one for machine and each model


def test_train_step_wants_a_round(bench_op, monkeypatch):
    pytest.importorskip('mmdet')
    import bench_train_step

    monkeypatch.setattr('sys.argv', ['', '--rounds', '0'])
    with pytest.raises(SystemExit, match='^error: --rounds is 0, expected'):
        bench_train_step.main()


def test_recorded_report(bench_op, monkeypatch, capsys):
    """Chosen shapes and methods of it, as the run's own table has them."""
    file = ROOT / (
        'benchmarks/results/cpu_amd-epyc-half-width_2-threads_fp32.json'
    )
    options = ['', '--report', str(file), '--shapes', 'FPN 50x84']
    monkeypatch.setattr(sys, 'argv', [*options, '--methods', 'CARAFE'])
    bench_op.main()
    table = capsys.readouterr().out
    assert table.count('| CARAFE | 4.24 ms, 17 MB |') == 1
    assert table.count('\n| CARAFE |') == 2 and 'bilinear |' not in table
    monkeypatch.setattr(sys, 'argv', [*options, '--methods', 'mmcv'])
    with pytest.raises(SystemExit, match='--methods: mmcv is not in the rep'):
        bench_op.main()
