"""The stages of gpu_suite.py.

A stage takes the suite's arguments and the names of the rows that an earlier
process of it left, and yields rows: dicts whose ``what`` is unique in the
stage, and which have an ``error`` where something failed.
"""

import csv
import glob
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Tuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(ROOT / 'benchmarks')]

import _measure  # noqa: E402
import bench_op  # noqa: E402
import fake_gpu  # noqa: E402
import gpu_baselines  # noqa: E402
import host_cost  # noqa: E402
import torch  # noqa: E402

from mmcarafe.ops import carafe_from_logits, reference  # noqa: E402
from mmcarafe.ops import triton as kernels  # noqa: E402

GPU = torch.device('cuda')  # also where times of the pretended one are taken
K, S = bench_op.KERNEL_SIZE, 2
LEVELS = {
    'P3': bench_op.GPU_SHAPES['FPN 100x168'],
    'P4': bench_op.GPU_SHAPES['FPN 50x84'],
    'P5': bench_op.GPU_SHAPES['FPN 25x42'],
}
SMALL = {'P5': (2, 8, 5, 6)}  # of a dry run
KINDS = {
    'fp32 NCHW': (torch.float32, torch.contiguous_format),
    'fp32 NHWC': (torch.float32, torch.channels_last),
    'bf16 NCHW': (torch.bfloat16, torch.contiguous_format),
    'bf16 NHWC': (torch.bfloat16, torch.channels_last),
    'fp16 NCHW': (torch.float16, torch.contiguous_format),
}
OPERATORS = (
    'reassemble',
    'reassemble_grad_features',
    'reassemble_grad_weights',
)
# Arguments of bench_op.py. Its other methods take long to compile, or to run.
RUNS = {
    'fp32': [],
    'bf16': ['--dtype', 'bfloat16'],
    'bf16 channels_last': ['--dtype', 'bfloat16', '--channels-last'],
}
METHODS = (
    'nearest',
    'bilinear',
    'CARAFE',
    'CARAFE, border renormalised',
    'CARAFE, PyTorch path',
)
SECTIONS = (
    'SpeedOfLight',
    'MemoryWorkloadAnalysis',
    'SchedulerStats',
    'WarpStateStats',
    'Occupancy',
    'LaunchStats',
    'InstructionStats',
)


class Case(NamedTuple):
    """An operator, and what it is to work on."""

    level: str
    kind: str
    operator: str
    shape: Tuple[int, ...]

    def __str__(self):
        return f'{self.level} {self.kind} {self.operator}'

    def tensors(self, device):
        """Random inputs, and room for the output."""
        n, c, h, w = self.shape
        dtype, memory_format = KINDS[self.kind]

        def randn(channels, scale=1):
            shape = n, channels, scale * h, scale * w
            x = torch.randn(shape, dtype=dtype, device=device)
            return x.contiguous(memory_format=memory_format)

        features, scores = randn(c), randn(K**2 * S**2)
        scores = reference.scores_from_logits(scores, K, 1, S)
        if self.operator == 'reassemble':
            return features, scores, reference.empty_map(features, c, S)
        if self.operator == 'reassemble_grad_features':
            return randn(c, S), scores, torch.empty_like(features)
        return randn(c, S), features, scores, torch.empty_like(scores)

    def candidates(self, tensors, border='zeros'):
        """The problem, and the configs that can be chosen for it."""
        at = {'reassemble': 0, 'reassemble_grad_features': -1}
        features = tensors[at.get(self.operator, 1)]
        problem = kernels._problem(
            self.operator, features, tensors[-2], tensors, 'softmax', border
        )
        return problem, kernels._configs(problem)[0]

    def both_borders(self, tensors):
        """Every border, problem and config; but of one border the default."""
        for border in reference.BORDERS:
            problem, configs = self.candidates(tensors, border)
            for config in configs if border == 'zeros' else configs[:1]:
                yield border, problem, config


def cases(levels, kinds=KINDS):
    for level, kind, operator in itertools.product(levels, kinds, OPERATORS):
        yield Case(level, kind, operator, levels[level])


@contextmanager
def reported(row):
    """An error becomes the row's."""
    try:
        yield
    except Exception as error:
        # Some show whole tensors.
        row['error'] = f'{type(error).__name__}: {error}'[:1000]


def environment(args, done):
    """Versions, and what the GPU is."""
    yield {'what': 'versions', **_measure.environment(GPU)}
    yield {
        'what': 'GPU',
        'properties': str(torch.cuda.get_device_properties(GPU)),
        'free_and_total_bytes': torch.cuda.mem_get_info(),
        'clocks': clocks(),
        'tools': {x: find_tool(x) for x in ('ncu', 'compute-sanitizer')},
    }
    yield command_row('status', [sys.executable, '-m', 'mmcarafe'])


def compilation(args, done):
    """Fill Triton's cache for the next two stages.

    In one process for each CPU; none of them needs the GPU.
    """
    capability = torch.cuda.get_device_capability(GPU)
    work = [
        (case, i)
        for case in cases(args.levels)
        for i, _ in enumerate(case.both_borders(case.tensors('meta')))
    ]
    with ProcessPoolExecutor(
        1 if args.dry_run else os.cpu_count(),
        get_context('spawn'),
        _start_to_compile,
        (args.dry_run, capability),
    ) as pool:
        for (case, i), row in zip(work, pool.map(_compile, work)):
            yield {'what': f'{case}, candidate {i}', **row}


def _start_to_compile(dry_run, capability):
    if dry_run:
        fake_gpu.pretend()
    else:
        fake_gpu.install(10 * capability[0] + capability[1])


def _compile(case_and_index):
    case, i = case_and_index
    row = {}
    with reported(row):
        tensors = case.tensors('meta')
        _, problem, config = [*case.both_borders(tensors)][i]
        kernels._load(problem, config, tensors)
    return row


def agreement(args, done):
    """Every candidate against the reference in fp64, image by image."""
    for case in cases(args.levels):
        tensors = case.tensors(args.device)
        images = [
            [x[i : i + 1] for x in tensors] for i in range(len(tensors[0]))
        ]
        exact = {}  # of the border at hand
        for border, problem, config in case.both_borders(tensors):
            row = {
                'what': f'{case}, {border}, {describe(config)}',
                'case': str(case),
                'candidate': config._asdict(),
            }
            if row['what'] in done:
                continue
            with reported(row):
                if border not in exact:
                    exact = {border: references(case, images, border)}
                results, allowed = exact[border]
                row['reference_error'] = allowed
                tensors[-1].fill_(math.nan)  # shows what is not written
                kernels._load(problem, config, tensors).run(*tensors)
                found = largest_error([image[-1] for image in images], results)
                row['largest_error'] = found
                if case.kind.startswith('fp32'):
                    allowed += 1e-5  # as torch.testing.assert_close allows
                if not found <= 2 * allowed:  # so not for NaN either
                    row['error'] = 'less exact than the reference'
            yield row


def references(case, images, border):
    """Results in fp64, and the largest error of those in the same dtype."""
    compute = getattr(reference, case.operator)
    exact, own = [], []
    for *inputs, _ in images:
        wide = [x.double() for x in inputs]
        exact.append(compute(*wide, 'softmax', border))
        own.append(compute(*inputs, 'softmax', border))
    return exact, largest_error(own, exact)


def largest_error(actual, exact):
    errors = [(a.double() - e).abs().max() for a, e in zip(actual, exact)]
    return torch.stack(errors).max().item()  # NaN if any is


def candidates(args, done):
    """The time of every candidate, and of a copy of as many bytes.

    Each goes through several copies of its tensors, so that the GPU's cache
    does not hold those that come next.
    """
    cache = torch.cuda.get_device_properties(GPU).L2_cache_size
    yield {'what': 'clocks before', 'clocks': clocks()}
    for case in cases(args.levels):
        tensors = case.tensors(args.device)
        num_bytes = sum(x.numel() * x.element_size() for x in tensors)
        sets = [tensors]
        for _ in range(-(-2 * cache // num_bytes)):
            sets.append(case.tensors(args.device))
        copy = [gpu_baselines.copy_of(num_bytes, args.device) for _ in sets]
        runs = {bench_op.COPY: lambda copy=copy: [run() for run in copy]}
        known = {}
        problem, configs = case.candidates(tensors)
        for config in configs:
            name = describe(config)
            row = {'what': f'{case}, {name}, eager'}
            if done & {row['what'], f'{case}, {name}, graph'}:
                continue
            with reported(row):
                launch = kernels._load(problem, config, tensors)
                runs[name] = rotate(launch.run, sets)
                known[name] = {
                    'candidate': config._asdict(),
                    **kernels.resources(launch.compiled),
                }
            if 'error' in row:
                yield row
        if not known:
            continue
        for r in _measure.measure_pass(
            {}, 'forward', GPU, 0.2, runs, with_graphs=True
        ):
            row = {
                'what': f'{case}, {r["method"]}, {r["mode"]}',
                'case': str(case),
                'bytes': num_bytes,
                'sets': len(sets),
                **r,
                **known.get(r['method'], {}),
            }
            if 'seconds' in r:
                row['seconds'] /= len(sets)
            yield row
        yield {'what': f'{case}, clocks after', 'clocks': clocks()}


def rotate(run, sets):
    return lambda: [run(*tensors) for tensors in sets]


def operator(args, done):
    """bench_op.py, which compares CARAFE with what is not ours."""
    runs = {
        name: [*options, '--methods', *METHODS]
        for name, options in RUNS.items()
    }
    if args.dry_run:
        runs = {'fp32': ['--methods', 'bilinear', 'CARAFE']}
    elif args.mmcv_src:
        # By itself: its kernels may fail to compile.
        names = ['--methods', 'CARAFE', "CARAFE, mmcv's"]
        runs['mmcv'] = ['--mmcv-src', str(args.mmcv_src), *names]
    shapes = [name for name in bench_op.GPU_SHAPES if name.startswith('FPN')]
    for name, options in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            row = command_row(
                name,
                [
                    *(sys.executable, str(ROOT / 'benchmarks/bench_op.py')),
                    *('--device', 'cpu' if args.dry_run else 'cuda'),
                    *('--shapes', *shapes[: 1 if args.dry_run else None]),
                    *('--budget', '0' if args.dry_run else '1'),
                    *('--tests-passed', '--out', folder, *options),
                ],
            )
            with reported(row):
                report = json.loads(Path(folder, 'results.json').read_text())
                row['report'] = {**report, 'tests': 'a stage of their own'}
        yield row


def host(args, done):
    """What a call costs the CPU, the CUDA driver's part included."""
    few = {'rounds': 1, 'repeats': 2} if args.dry_run else {}
    for method, pass_name, cost in host_cost.measure(
        args.device, settle=torch.cuda.synchronize, **few
    ):
        yield {'what': f'{method}, {pass_name}', 'microseconds': cost}


def tests(args, done):
    """All tests that need a GPU, but those of large tensors."""
    parallel = importlib.util.find_spec('xdist') is not None
    yield pytest_row(
        '-m', 'gpu', '-k', 'not 2_31', *(['-n', 'auto'] if parallel else [])
    )


def pytest_row(*options, file='tests/test_ops_triton.py'):
    """Run tests; count them, and say which failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'junit.xml')
        row = command_row(
            ' '.join(['pytest', *options]),
            [
                *(sys.executable, '-m', 'pytest', '-q', str(file)),
                *(f'--junitxml={path}', *options),
            ],
        )
        if not path.exists():
            return row
        counts, row['failures'] = Counter(), []
        for test in ElementTree.parse(path).iter('testcase'):
            ends = {x.tag: x for x in test}.keys() & {
                *('failure', 'error', 'skipped')
            }
            outcome = min(ends, default='passed')
            counts[outcome] += 1
            if outcome in ('failure', 'error'):
                message = test.find(outcome).get('message', '')
                name = f'{test.get("classname")}::{test.get("name")}'
                row['failures'].append({'test': name, 'message': message})
    if not counts['passed'] and torch.cuda.is_available():
        row.setdefault('error', 'no test passed')
    return {**row, 'counts': counts}


def graphs(args, done):
    """Captures with and without a warm-up, and what a broken one costs."""
    for what, check in {
        'a capture after a warm-up': replays_right,
        'another shape after a warm-up': right_or_refused,
        'a capture without a warm-up': refused,
        'a capture after one that failed': right_after_a_failure,
    }.items():
        row = {'what': what}
        if what not in done:
            with reported(row):
                row['found'] = check(args.device)
            yield row


def step(device, dtype=torch.float32, width=40):
    """Forward and backward, as a function of nothing, and how to check it."""
    n, c, h = 2, 64, 24
    inputs = [
        torch.randn(n, x, h, width, dtype=dtype, device=device)
        for x in (c, K**2 * S**2)
    ]
    inputs = [x.requires_grad_() for x in inputs]
    shape = n, c, S * h, S * width
    grad = torch.randn(shape, dtype=dtype, device=device)
    latest = []

    def run(function=carafe_from_logits):
        out = function(*inputs, K)
        gradients = torch.autograd.grad(out, inputs, grad)
        latest[:] = [x.detach() for x in (out, *gradients)]
        return [*latest]

    def check(replay):
        got = [*latest]
        with torch.no_grad():
            inputs[0].normal_()
        replay()
        want = run(reference.carafe_from_logits)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        return 'right'

    return run, check


def replays_right(device):
    run, check = step(device)
    return check(_measure.Graphs().capture(run))


def right_or_refused(device):
    run, check = step(device, width=41)
    try:
        replay = _measure.Graphs().capture(run, warm_ups=0)
    except RuntimeError as error:
        if 'before the capture' not in str(error):
            raise
        return f'refused: {error}'
    return check(replay)


def refused(device):
    run, _ = step(device, torch.bfloat16)
    try:
        _measure.Graphs().capture(run, warm_ups=0)
    except RuntimeError as error:
        if 'before the capture' not in str(error):
            raise
        return f'refused: {error}'
    raise AssertionError('captured, though no kernel was loaded')


def right_after_a_failure(device):
    """On the same stream, with random numbers, in the same memory."""
    graphs = _measure.Graphs()
    try:
        graphs.capture(torch.cuda.synchronize, warm_ups=0)
    except RuntimeError:
        run, check = step(device)
        return check(graphs.capture(run))
    raise AssertionError('captured, though it waits for the GPU')


def profile(args, done):
    """Nsight Compute's figures of six kernels at P3."""
    ncu = find_tool('ncu')
    if ncu is None:
        yield {'what': 'ncu', 'skipped': 'there is none'}
        return
    command = [ncu, '--clock-control', 'none', '--csv']
    command += ['--kernel-name', 'regex:reassemble']
    for section in SECTIONS:
        command += ['--section', section]
    level = next(iter(args.levels))
    command += launching(args.out, level, ['fp32 NCHW', 'bf16 NCHW'])
    row = command_row('ncu', command, kept=None)
    found = {}
    with reported(row):
        found = ncu_metrics(row['output'])
    for what, metrics in found.items():
        yield {'what': what, 'metrics': metrics}
    if not found:
        row.setdefault('error', 'no kernel was profiled')
    if 'error' not in row:
        del row['output']
    yield row


def ncu_metrics(output):
    """Kernel -> metric -> value and unit, of the lines that are CSV."""
    found = {}
    lines = [line for line in output.splitlines() if line.startswith('"')]
    for line in csv.DictReader(lines):
        metrics = found.setdefault(f'{line["ID"]} {line["Kernel Name"]}', {})
        if line['Metric Name']:  # else it is advice
            name = f'{line["Section Name"]}: {line["Metric Name"]}'
            metrics[name] = f'{line["Metric Value"]} {line["Metric Unit"]}'
    return found


def large(args, done):
    """More than 2**31 elements; and a check of every access, at P5."""
    yield pytest_row('-m', 'gpu', '-k', '2_31')
    tool = find_tool('compute-sanitizer')
    if tool is None:
        yield {'what': 'compute-sanitizer', 'skipped': 'there is none'}
        return
    yield command_row(
        'compute-sanitizer',
        [
            *(tool, '--tool', 'memcheck', '--error-exitcode', '9'),
            *('--report-api-errors', 'no'),  # PyTorch tries what may fail
            *launching(args.out, 'P5', [*KINDS]),
        ],
        # Each tensor for itself: the tool sees what goes beyond it.
        PYTORCH_NO_CUDA_MEMORY_CACHING='1',
    )


def launching(out, level, kinds):
    """The command that launches each operator's kernel once."""
    code = (
        f'import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r}); '
        'import gpu_stages; '
        f'gpu_stages.launch_each({str(out)!r}, {level!r}, {kinds!r})'
    )
    return [sys.executable, '-c', code]


def launch_each(out, level, kinds):
    """The fastest candidate, if ``candidates`` ran, or else the default."""
    path = Path(out, 'candidates.json')
    rows = json.loads(path.read_text())['rows'] if path.exists() else []
    for case in cases({level: LEVELS[level]}, kinds):
        timed = [
            (row['seconds'], row['candidate'])
            for row in rows
            if row.get('case') == str(case)
            and row['mode'] == 'graph'
            and 'seconds' in row
            and 'candidate' in row
        ]
        tensors = case.tensors(GPU)
        problem, (config, *_) = case.candidates(tensors)
        if timed:
            _, fastest = min(timed, key=lambda pair: pair[0])
            config = kernels.Config(**fastest)
        kernels._load(problem, config, tensors).run(*tensors)
        torch.cuda.synchronize()


def command_row(what, command, kept=4000, **variables):
    """Run a command: exit code and the end of its output."""
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    ) as process:
        for line in process.stdout:
            print(line, end='', flush=True)  # for the log of a stopped stage
            lines.append(line)
    output = ''.join(lines)
    row = {'what': what, 'exit_code': process.returncode}
    row['output'] = output[-kept:] if kept else output
    if row['exit_code']:
        row['error'] = f'exit code {row["exit_code"]}'
    return row


def clocks():
    """What the GPU's clocks, temperature and power are now."""
    fields = 'clocks.sm', 'clocks.mem', 'temperature.gpu', 'power.draw'
    query = f'--query-gpu={",".join(fields)}'
    command = ['nvidia-smi', query, '--format=csv,noheader']
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return 'there is no nvidia-smi'
    return dict(zip(fields, done.stdout.strip().split(', ')))


def find_tool(name):
    """Where one of CUDA's tools is, or None."""
    cuda = os.environ.get('CUDA_HOME', '/usr/local/cuda')
    nsight = sorted(glob.glob('/opt/nvidia/nsight-compute/*'), reverse=True)
    folders = [os.environ.get('PATH', ''), f'{cuda}/bin', *nsight]
    return shutil.which(name, path=os.pathsep.join(folders))


def describe(config):
    return ' '.join(map(str, config))
