"""The code of the GPU suite, on a pretended GPU."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import fake_gpu
import gpu_stages
import gpu_suite
import pytest
import torch
from conftest import ROOT

from mmcarafe.ops import triton as kernels

BENCHMARKS = ROOT / 'benchmarks'
needs_triton = pytest.mark.skipif(
    kernels._why_reference() is not None,
    reason=str(kernels._why_reference()),
)


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def reports(folder):
    return {
        path.stem: json.loads(path.read_text())
        for path in folder.glob('*.json')
        if path.stem != 'summary'
    }


@pytest.fixture(scope='module')
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('suite')
    script = BENCHMARKS / 'gpu_suite.py'
    return folder, run(script, '--dry-run', '--out', folder)


@needs_triton
def test_dry_run(dry_run):
    """Every stage ends well, and its results say that they are fake."""
    folder, done = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    found = reports(folder)
    assert {*found} == {*gpu_suite.STAGES}
    for name, report in found.items():
        assert (report['status'], report['fake']) == ('passed', True), report
        assert report['rows'], name
    # Two borders for the default, one for the others; two modes for each
    # candidate and for the copy; clocks once for each case, and at first.
    cases = [*gpu_stages.cases(gpu_stages.SMALL)]
    candidates = sum(
        len(case.candidates(case.tensors('cpu'))[1]) for case in cases
    )
    checked = candidates + len(cases)
    assert len(found['agreement']['rows']) == checked
    assert len(found['compilation']['rows']) == checked
    timed = 2 * (candidates + len(cases)) + len(cases) + 1
    assert len(found['candidates']['rows']) == timed
    assert found['tests']['rows'][0]['counts'].keys() == {'skipped'}
    assert [row['found'][:7] for row in found['graphs']['rows']] == [
        *('right', 'refused', 'refused', 'right')
    ]
    assert not [*folder.glob('*.part')]


@needs_triton
def test_summary_of_a_dry_run_has_no_figures(dry_run):
    folder, _ = dry_run
    text = (folder / 'summary.md').read_text()
    assert text.count('Fake, from a dry run: no figures.') == len(
        gpu_suite.STAGES
    )
    assert {len(re.findall(r'\|', x)) for x in text.splitlines()} == {0, 5}
    for word in ('GB/s', ' us', 'ms,', 'bilinear', 'right'):
        assert word not in text
    summary = json.loads((folder / 'summary.json').read_text())
    assert summary == reports(folder)


@needs_triton
def test_figures(dry_run, tmp_path):
    """What the summary would say if the same results were not fake."""
    for name, report in reports(dry_run[0]).items():
        gpu_suite.write(tmp_path / f'{name}.json', {**report, 'fake': False})
    gpu_suite.summarize(tmp_path)
    text = (tmp_path / 'summary.md').read_text()
    assert 'ake' not in text.replace('takes', '')
    sections = dict(
        re.findall(r'^## (\w+)\n(.*?)(?=^## |\Z)', text, re.M | re.S)
    )
    for case in gpu_stages.cases(gpu_stages.SMALL):
        assert f'\n| {case} |' in sections['agreement']
        assert f'\n| {case} | copy of the least' in sections['candidates']
    assert '| CARAFE |' in sections['operator']
    assert '| CARAFE, forward+backward |' in sections['host']
    assert 'a capture after a warm-up: right' in sections['graphs']
    assert "{'skipped': " in sections['tests']
    assert 'skipped ncu: there is none' in sections['profile']


def test_figures_of_candidates():
    def row(method, mode, seconds, **more):
        return {
            **{'what': f'{method}, {mode}', 'case': 'P3', 'method': method},
            **{'mode': mode, 'seconds': seconds, 'bytes': 3_000_000, **more},
        }

    copy = gpu_stages.bench_op.COPY
    failed = row('banded', 'graph', None, error='RuntimeError: wrong')
    del failed['seconds']
    rows = [
        {'what': 'clocks before', 'clocks': {}},
        row('plain', 'graph', 15e-6, registers=96, spills=0, shared_bytes=9),
        row('plain', 'eager', 40e-6),
        failed,
        row(copy, 'graph', 10e-6),
        row(copy, 'eager', 11e-6),
    ]
    assert gpu_suite.candidate_figures(rows)[2:] == [
        f'| P3 | {copy} | 10 | 11 | 300 | 1 |  |  |  |',
        '| P3 | plain | 15 | 40 | 200 | 1.5 | 96 | 0 | 9 |',
    ]


def test_summary_of_what_is_there(tmp_path):
    rows = [
        {'what': 'one', 'case': 'P3', 'error': f'NaN\n{"and more " * 99}'},
        {
            **{'what': 'two', 'case': 'P3'},
            **{'largest_error': 3e-6, 'reference_error': 2e-6},
        },
    ]
    report = {'status': '1 failed', 'fake': False, 'rows': rows}
    gpu_suite.write(tmp_path / 'agreement.json', report)
    done = run(BENCHMARKS / 'gpu_suite.py', 'summary', tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    lines = (tmp_path / 'summary.md').read_text().splitlines()
    assert '| agreement | 1 failed |  | 2 |' in lines
    assert '| P3 | 2 | 1 | 3e-06 | 2e-06 |' in lines
    (failure,) = (line for line in lines if 'FAILED' in line)
    assert failure.startswith('- FAILED one: NaN and more and')
    assert len(failure) < 250


def test_mistakes_end_in_one_line(tmp_path):
    script = BENCHMARKS / 'gpu_suite.py'
    done = run(script, 'summary', tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f'error: there are no results of a stage in {tmp_path}\n'
    )
    if not torch.cuda.is_available():
        done = run(script, '--out', tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith('error: torch finds no GPU')


SUITE = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_suite

def works(args, done):
    yield {{'what': 'a row'}}

def fails(args, done):
    yield {{'what': 'a row', 'error': 'wrong'}}
    yield {{'what': 'another'}}

def crashes(args, done):
    yield {{'what': 'a row'}}
    raise ValueError('no such kernel')

def hangs(args, done):
    child = subprocess.Popen(['sleep', '600'])
    yield {{'what': 'a row', 'child': child.pid}}
    time.sleep(600)

def waits(args, done):  # for a command that does not end
    code = 'import time; print("started", flush=True); time.sleep(600)'
    yield gpu_suite.gpu_stages.command_row('it', [sys.executable, '-c', code])

def breaks(args, done):  # what the GPU holds, with its second row
    for i in '0123':
        row = {{'what': i, 'process': os.getpid(), 'done': sorted(done)}}
        if i == '1':
            gpu_suite.gpu_works = lambda: i != '1'
            row['error'] = 'illegal address'
        yield row

gpu_suite.SCRIPT = __file__
gpu_suite.GRACE = 3
gpu_suite.STAGES = {{
    'fails': (fails, 60),
    'crashes': (crashes, 60),
    'hangs': (hangs, 20),
    'waits': (waits, 20),
    'breaks': (breaks, 60),
    'works': (works, 60),
    'missed': (works, 0),
}}
gpu_suite.main()
"""


@needs_triton
def test_stages_that_end_badly(tmp_path):
    """They cost themselves only, and lose no finished row."""
    script = tmp_path / 'suite.py'
    script.write_text(SUITE)
    out = tmp_path / 'out'
    done = run(script, '--dry-run', '--out', out)
    assert done.returncode == 1
    missed = 'fails, crashes, hangs, waits, breaks, missed'
    assert done.stderr == f'error: these stages did not pass: {missed}\n'
    found = reports(out)
    assert {name: report['status'] for name, report in found.items()} == {
        'fails': '1 failed',
        'crashes': 'crashed, exit code 1',
        'hangs': 'stopped after 20 s',
        'waits': 'stopped after 20 s',
        'breaks': '1 failed',
        'works': 'passed',
    }
    assert [row['what'] for row in found['fails']['rows']] == [
        'a row',
        'another',
    ]
    assert found['crashes']['rows'] == [{'what': 'a row'}]
    assert 'ValueError: no such kernel' in found['crashes']['log']
    assert 'ValueError: no such kernel' in done.stdout
    assert found['hangs']['seconds'] < 40
    (row,) = found['hangs']['rows']
    assert has_ended(row['child'])
    (row,) = found['waits']['rows']
    assert row['output'].startswith('started\n')
    assert 'KeyboardInterrupt' in row['output']
    assert 'KeyboardInterrupt' in found['waits']['log']
    rows = found['breaks']['rows']
    assert [row['what'] for row in rows] == [*'0123']
    assert [row['done'] for row in rows] == [[], [], ['0', '1'], ['0', '1']]
    assert len({row['process'] for row in rows}) == 2
    text = (out / 'summary.md').read_text()
    assert '| hangs | stopped after 20 s |' in text
    assert '- FAILED 1: illegal address' in text


def has_ended(pid):
    status = Path(f'/proc/{pid}/stat')
    if not status.exists():
        return True
    return status.read_text().rsplit(')', 1)[1].split()[0] == 'Z'


# Stages in this process


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """All but what would stay: CPU tensors are served as ever."""
    for fake in fake_gpu.FAKES:
        monkeypatch.setattr(*fake)
    cases = [*gpu_stages.cases(gpu_stages.SMALL, ['fp32 NCHW', 'bf16 NHWC'])]
    monkeypatch.setattr(gpu_stages, 'cases', lambda levels: cases)
    return argparse.Namespace(
        dry_run=True,
        device='cpu',
        levels=gpu_stages.SMALL,
        out=tmp_path,
        mmcv_src=None,
    )


def refuse(*tensors):
    raise RuntimeError('out of resource')


def write_nothing(*tensors):
    pass


def spoil(monkeypatch, which, run):
    """One candidate of each case does this instead of what it should."""
    load = fake_gpu._load

    def spoilt(problem, config, tensors):
        launch = load(problem, config, tensors)
        if config != kernels._configs(problem)[0][which]:
            return launch
        return launch._replace(run=run(launch.run))

    monkeypatch.setattr(kernels, '_load', spoilt)


def a_little_more(launch):
    def run(*tensors):
        launch(*tensors)
        tensors[-1][0, ..., -1, -1] += 0.05

    return run


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda run: refuse, 'RuntimeError: out of resource'),
        (lambda run: write_nothing, 'less exact than the reference'),
        (a_little_more, 'less exact than the reference'),
    ],
    ids=['refuses', 'writes nothing', 'adds a little'],
)
def test_agreement_finds_what_is_wrong(wrong, message, pretended, monkeypatch):
    # Not the first one: the output still holds the right result of another.
    spoil(monkeypatch, -1, wrong)
    rows = [*gpu_stages.agreement(pretended, set())]
    spoilt = {
        str(case): case.candidates(case.tensors('cpu'))[1][-1]._asdict()
        for case in gpu_stages.cases(None)
    }
    failed = [row for row in rows if 'error' in row]
    assert failed == [
        row for row in rows if row['candidate'] == spoilt[row['case']]
    ]
    assert {row['error'] for row in failed} == {message}
    for row in rows:
        assert 'error' in row or row['largest_error'] == row['reference_error']
    # What another process did is not done again.
    done = {row['what'] for row in rows if row is not rows[3]}
    (again,) = gpu_stages.agreement(pretended, done)
    assert again['what'] == rows[3]['what']


def test_candidates_that_fail_are_reported(pretended, monkeypatch):
    spoil(monkeypatch, 0, lambda run: refuse)
    rows = [*gpu_stages.candidates(pretended, set())]
    assert len({row['what'] for row in rows}) == len(rows)
    for case in gpu_stages.cases(None):
        tensors = case.tensors('cpu')
        num_bytes = sum(x.numel() * x.element_size() for x in tensors)
        _, configs = case.candidates(tensors)
        here = [row for row in rows if row.get('case') == str(case)]
        (failed,) = [row for row in here if 'error' in row]
        assert failed['error'] == 'RuntimeError: out of resource'
        assert failed['mode'] == 'eager'  # so none was captured
        assert failed['candidate'] == configs[0]._asdict()
        here.remove(failed)
        assert len(here) == 2 * len(configs)  # the copy instead of the failed
        for row in here:
            assert row['bytes'] == num_bytes
            # A call takes 1 s, and goes through all the sets.
            assert row['seconds'] == 1 / row['sets'] == 1 / 2
    # Another process, because that one broke the GPU's context, leaves it out.
    first = next(row for row in rows if 'error' in row)
    again = [*gpu_stages.candidates(pretended, {first['what']})]
    assert {row['what'] for row in again} == {row['what'] for row in rows} - {
        first['what']
    }


def test_a_kernel_that_breaks_the_gpu(pretended, monkeypatch):
    """Its row comes first, whatever fails after it."""
    broken = []

    def breaks(*tensors):
        broken.append(True)
        fails_if_broken()

    def fails_if_broken(*args):
        if broken:
            raise RuntimeError('illegal address')

    for name in ('Stream', 'synchronize', 'memory_allocated', 'Event'):
        fake = getattr(torch.cuda, name)
        monkeypatch.setattr(
            torch.cuda,
            name,
            lambda *args, fake=fake, **kwargs: (
                fails_if_broken() or fake(*args, **kwargs)
            ),
        )
    spoil(monkeypatch, 0, lambda run: breaks)
    rows = gpu_stages.candidates(pretended, set())
    assert next(rows)['what'] == 'clocks before'
    row = next(rows)
    case = gpu_stages.cases(None)[0]
    _, (default, *_) = case.candidates(case.tensors('cpu'))
    assert row['candidate'] == default._asdict()
    assert row['error'] == 'RuntimeError: illegal address'
    assert not gpu_suite.gpu_works()


def test_a_graph_that_replays_nothing_is_not_right(pretended, monkeypatch):
    """CPU tensors are not served by the pretended GPU here."""
    with pytest.raises(AssertionError, match='not close'):
        gpu_stages.replays_right('cpu')
    with pytest.raises(AssertionError, match='captured, though no kernel'):
        gpu_stages.refused('cpu')


NCU = """#!/bin/sh
cat <<'END'
==PROF== Connected to process 7
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","reassemble_plain","Speed Of Light","Duration","us","12.5"
"0","reassemble_plain","Speed Of Light","","",""
"0","reassemble_plain","Occupancy","Registers, all","","1,024"
"1","reassemble_banded","Speed Of Light","Duration","us","3"
END
"""


@pytest.mark.parametrize(
    'output', [NCU, '#!/bin/sh\necho no counters; exit 1']
)
def test_profile(output, pretended, monkeypatch, tmp_path):
    ncu = tmp_path / 'ncu'
    ncu.write_text(output)
    ncu.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    assert gpu_stages.find_tool('ncu') == str(ncu)
    *kernels_, last = gpu_stages.profile(pretended, set())
    if output is NCU:
        assert 'error' not in last
        assert kernels_ == [
            {
                'what': '0 reassemble_plain',
                'metrics': {
                    'Speed Of Light: Duration': '12.5 us',
                    'Occupancy: Registers, all': '1,024 ',
                },
            },
            {
                'what': '1 reassemble_banded',
                'metrics': {'Speed Of Light: Duration': '3 us'},
            },
        ]
    else:
        assert kernels_ == []
        assert last['error'] == 'exit code 1'
        assert last['output'] == 'no counters\n'


def test_tests_are_counted(tmp_path):
    file = tmp_path / 'test_some.py'
    file.write_text(
        'import pytest\n'
        'def test_right(): pass\n'
        'def test_left_out(): pytest.skip("why")\n'
        'def test_wrong(): assert not "this"\n'
    )
    row = gpu_stages.pytest_row('-k', 'test', file=file)
    assert row['what'] == 'pytest -k test'
    assert row['counts'] == {'passed': 1, 'skipped': 1, 'failure': 1}
    assert row['error'] == 'exit code 1'
    (failure,) = row['failures']
    assert failure['test'].endswith('test_some::test_wrong')
    assert 'not' in failure['message']
