"""tools/analysis/compare_upsamplers.py, and what it measures with."""

import json
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from mmcarafe.upsamplers import COMPARED, UPSAMPLERS
from mmcarafe.upsamplers.build import Upsampler

C, H, W = 8, 3, 5
PASSES = ('forward', 'forward+backward')
CPU = torch.device('cpu')


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis')
    import compare_upsamplers

    monkeypatch.setattr(compare_upsamplers, 'fma_rate', lambda: 1e11)
    return compare_upsamplers


@pytest.fixture
def measure_pass(tool):
    return tool.measure_pass


def run(tool, monkeypatch, out, *arguments):
    """Run the tool on a tiny map, and return its report and its table."""
    size = ('--channels', str(C), '--size', str(H), str(W), '--budget', '0')
    arguments = ['', *size, '--out', str(out), *arguments]
    monkeypatch.setattr('sys.argv', arguments)
    tool.main()
    return read(out)


def read(out):
    report = json.loads((out / 'results.json').read_text())
    return report, (out / 'table.md').read_text()


def rows(table):
    return {
        line.split(' | ')[0][2:]: line
        for line in table.splitlines()
        if line.startswith('| ')
    }


def test_every_upsampler_is_compared(tool, tmp_path):
    """In json, table and plot, in another layout, dtype and scale."""
    options = '--channels 8 --size 3 5 --scale 3 --dtype float64 --threads 1'
    done = subprocess.run(
        [
            *(sys.executable, 'tools/analysis/compare_upsamplers.py'),
            *options.split(),
            *('--channels-last', '--budget', '0', '--out', str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    report, table = read(tmp_path)
    assert (report['channels'], report['size']) == (C, [H, W])
    assert (report['scale_factor'], report['dtype']) == (3, 'float64')
    assert report['memory_format'] == 'channels_last'
    environment = report['environment']
    assert environment['threads'] == 1 and environment['fma_per_second'] > 0
    assert environment['torch'] == torch.__version__
    assert [*report['upsamplers']] == [*COMPARED]
    found = {(r['method'], r['pass']): r for r in report['results']}
    assert [*found] == [(name, p) for p in PASSES for name in COMPARED]
    for result in found.values():
        assert result['seconds'] > 0 and result['rounds'] >= 5
        assert result['peak_bytes'] >= C * 9 * H * W * 8  # the output
    lines = rows(table)
    assert 'failed' not in table and set(COMPARED) < set(lines)
    known = report['upsamplers']['CARAFE 5×5']
    parameters = (C + 1) * 64 + (9 * 64 + 1) * 9 * 25
    assert (known['type'], known['guided']) == ('CARAFE', False)
    assert known['parameters'] == parameters
    assert f'| {parameters:,} |' in lines['CARAFE 5×5']
    flops = 2 * C * 64 + 2 * 9 * 64 * 9 * 25 + 2 * 9 * 25 * C
    assert known['flops_per_source_pixel'] == flops
    assert report['upsamplers']['SAPA 5×5']['guided']
    assert lines['bilinear'].count(' 1.00×') == len(PASSES)
    header = (tmp_path / 'plot.png').read_bytes()[:24]
    # sharp where a page shows it 880 pixels wide
    assert struct.unpack('>I', header[16:20]) == (2 * 880,)
    for i, result in enumerate(report['results']):
        result['seconds'] = 1.3**i  # so that the test is the same each time
    check_plot(tool, report)


def check_plot(tool, report):
    """Each name is written where it covers no point and no other name."""
    names = [
        f'{name}, guided' if known['guided'] else name
        for name, known in report['upsamplers'].items()
    ]
    figure = tool.draw(report)
    figure.canvas.draw()
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == names
    boxes = [text.get_window_extent() for text in axis.texts]
    points = [
        axis.transData.transform(point)
        for line in axis.lines
        for point in line.get_xydata()
    ]
    # a point of each pass, and the ends of the line that joins them
    assert len(points) == len(names) * 2 * len(PASSES)
    for name, box in zip(names, boxes):
        assert box.count_overlaps(boxes) == 1, name  # itself
        assert not any(box.contains(*point) for point in points), name
        assert figure.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1, name
        assert figure.bbox.y0 < box.y0 and box.y1 < figure.bbox.y1, name


@pytest.mark.parametrize(
    'costs',
    [
        # far from the others, three that cost almost the same
        [(0, 1), (9_900, 10), (10_000, 12), (12_000, 11), (10**7, 9_000)],
        [(0, 1), (0, 1.1), (0, 1.2), (9 * 10**6, 9_000)],
        [(0, 1)],
        [(1_000, 1)],
    ],
    ids=['crowd', 'no-parameters', 'one-without', 'one-with'],
)
def test_names_in_the_plot(tool, costs):
    parameters, milliseconds = zip(*costs)
    names = [f'upsampler {i}' for i in range(len(costs))]
    report = dict(
        environment=dict(device='a' * 70, threads=1, torch='2', commit='c'),
        memory_format='contiguous',
        dtype='float32',
        channels=C,
        size=(H, W),
        scale_factor=2,
        upsamplers={
            name: dict(parameters=count, guided=False)
            for name, count in zip(names, parameters)
        },
        results=[
            {'method': name, 'pass': pass_name, 'seconds': time * factor / 1e3}
            for name, time in zip(names, milliseconds)
            for pass_name, factor in zip(PASSES, (1, 2))
        ],
    )
    check_plot(tool, report)


class Pair(nn.Module):
    """Changes its guide, too."""

    guided = True

    def __init__(self, channels, guide_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x, guide):
        assert guide.shape[2] == 2 * x.shape[2]
        return guide * self.weight, F.interpolate(x, scale_factor=2)


class ForInference(nn.Module):
    def forward(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError('no such kernel')
        return F.interpolate(x, scale_factor=2)


class Refuses(nn.Module):
    def __init__(self, channels):
        raise ValueError('channels must be\nprime')


@pytest.fixture
def three_more(monkeypatch):
    """One row each is all that a new upsampler needs."""
    for cls in (Pair, ForInference, Refuses):
        row = Upsampler(cls, cls.__name__.lower(), 'made for the test')
        monkeypatch.setitem(UPSAMPLERS, cls.__name__, row)
        monkeypatch.setitem(COMPARED, row.name, dict(type=cls.__name__))


def test_those_that_fail(tool, three_more, tmp_path, monkeypatch, capsys):
    """They cost the others nothing, and report and exit show it."""
    types = ['bilinear', 'Pair', 'ForInference', 'Refuses']
    failed = '^error: these failed: forinference, refuses$'
    with pytest.raises(SystemExit, match=failed):
        run(tool, monkeypatch, tmp_path, '--upsamplers', *types)
    printed, _ = capsys.readouterr()
    report, table = read(tmp_path)
    found = {
        (r['method'], r['pass']): r.get('error') for r in report['results']
    }
    for pass_name in PASSES:
        assert found['bilinear', pass_name] is None
        assert found['pair', pass_name] is None
        assert 'must be\nprime' in found['refuses', pass_name]
    assert found['forinference', PASSES[0]] is None
    assert found['forinference', PASSES[1]] == 'RuntimeError: no such kernel'
    assert 'forinference, forward+backward: RuntimeError: no' in printed
    lines = rows(table)
    assert lines['refuses'] == '| refuses |  |  | failed | failed |  |'
    assert lines['forinference'].endswith(' MB | failed |  |')
    assert 'failed' not in lines['pair']
    # a message of several lines takes one
    assert table.count('channels must be prime\n') == len(PASSES)
    assert 'written:' in printed


def test_a_crash_loses_no_result(tool, tmp_path, monkeypatch):
    def crashes(methods, pass_name, *args):
        for name in [*methods][:2]:
            yield {'method': name, 'pass': pass_name, 'seconds': 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, 'measure_pass', crashes)
    with pytest.raises(KeyboardInterrupt):
        run(tool, monkeypatch, tmp_path)
    report = json.loads((tmp_path / 'results.json').read_text())
    assert [r['method'] for r in report['results']] == [*COMPARED][:2]
    assert [*report['upsamplers']] == [*COMPARED]
    assert [path.name for path in tmp_path.iterdir()] == ['results.json']


def test_bytes_kept_are_those_counted_by_hand(tool, tmp_path, monkeypatch):
    types = ['nearest', 'deconv', 'CARAFE']
    report, _ = run(tool, monkeypatch, tmp_path, '--upsamplers', *types)
    kept = {
        (r['method'], r['pass']): r['kept_bytes'] for r in report['results']
    }
    x = C * H * W * 4
    assert kept == {
        **{(name, 'forward'): None for name in report['upsamplers']},
        ('nearest', 'forward+backward'): 0,
        # x and the weights
        ('deconvolution 3×3', 'forward+backward'): x + C * C * 9 * 4,
        # also compressed channels and scores; the weights of two convolutions
        ('CARAFE 5×5', 'forward+backward'): x
        + 4 * ((64 + 100) * H * W + 64 * (C + 9 * 100)),
    }


def test_peak_bytes_are_those_counted_by_hand(measure_pass):
    """exp keeps its output, from which it computes the gradient."""
    methods = {'exp': (torch.exp, [torch.ones(100)])}
    for pass_name, peak, kept in (
        ('forward', 400, None),
        ('forward+backward', 400 + 400, 400),
    ):
        (result,) = measure_pass(methods, pass_name, CPU, 0)
        assert (result['peak_bytes'], result['kept_bytes']) == (peak, kept)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('--channels 0', '--channels is 0, expected an int >= 1'),
        ('--scale -2', '--scale is -2, expected an int >= 1'),
        ('--size 4 0', r'--size is \[4, 0\], expected two ints >= 1'),
        ('--threads 0', '--threads is 0, expected an int >= 1'),
        ('--budget nan', '--budget is nan, expected a number >= 0'),
        ('--upsamplers carafe', "--upsamplers: no 'carafe', only nearest, "),
        ('--device tpu', '--device is tpu, expected cpu or cuda'),
        ('--device meta', '--device is meta, expected cpu or cuda'),
        ('--out FILE/x', r'--out: cannot write into \S+: Not a directory'),
        pytest.param(
            '--device cuda',
            '--device is cuda, but torch finds no GPU',
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason='there is a GPU'
            ),
        ),
    ],
)
def test_mistakes_end_in_one_line(
    arguments, message, tool, tmp_path, monkeypatch
):
    (tmp_path / 'FILE').touch()
    arguments = arguments.replace('FILE', str(tmp_path / 'FILE')).split()
    with pytest.raises(SystemExit, match=f'^error: {message}') as error:
        run(tool, monkeypatch, tmp_path / 'out', *arguments)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_methods_take_turns(measure_pass):
    calls = []

    def method(name):
        return lambda x: calls.append(name) or x + 1

    names = ['a', 'b', 'c', 'd']
    methods = {name: (method(name), [torch.ones(1)]) for name in names}
    results = [*measure_pass(methods, 'forward', CPU, 0)]
    assert [r['method'] for r in results] == names
    assert calls[:4] == calls[-4:] == names  # to warm up, and for the memory
    rounds = [calls[i : i + 4] for i in range(4, len(calls) - 4, 4)]
    assert len(rounds) == results[0]['rounds'] == 5
    assert all(sorted(each) == names for each in rounds)
    assert len({tuple(each) for each in rounds}) > 3


@pytest.mark.parametrize('call', [1, 3, 7])
def test_a_method_that_fails_later(call, measure_pass):
    """In the warm-up, in a round, or when its memory is measured."""
    calls = 0

    def fails(x):
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError('out of memory')
        return x

    methods = {
        'fails': (fails, [torch.ones(1)]),
        'works': (torch.clone, [torch.ones(1)]),
    }
    results = {
        r['method']: r for r in measure_pass(methods, 'forward', CPU, 0)
    }
    assert results['fails']['error'] == 'RuntimeError: out of memory'
    assert 'seconds' not in results['fails']
    assert results['works']['peak_bytes'] == 4
    assert calls == call


def test_the_commit_is_ours(tool, monkeypatch):
    """Not that of a project into whose folders the tools were installed."""
    import _measure

    monkeypatch.setattr(_measure, 'ROOT', ROOT / 'tools')
    assert _measure.environment(CPU)['commit'] == 'unknown'


def test_report_once_more(tool, tmp_path, monkeypatch, capsys):
    """As recorded: it measures nothing, and leaves the record alone."""
    run(tool, monkeypatch, tmp_path / 'new', '--upsamplers', 'bilinear')
    record, again = tmp_path / 'new/results.json', tmp_path / 'again'
    before, printed = record.read_text(), capsys.readouterr().out
    monkeypatch.setattr(tool, 'compare', None)
    options = ['', '--report', str(record), '--out', str(again)]
    monkeypatch.setattr(sys, 'argv', options)
    tool.main()
    assert capsys.readouterr().out in printed
    assert record.read_text() == before
    assert {x.name for x in again.iterdir()} == {'table.md', 'plot.png'}
    record.write_text('{}')
    with pytest.raises(SystemExit, match='--report: cannot read .*KeyError'):
        tool.main()
