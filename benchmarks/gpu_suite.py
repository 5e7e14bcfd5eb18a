"""What a first half hour on a GPU should find out, in one command.

    python benchmarks/gpu_suite.py --out work_dirs/gpu_suite

The stages of gpu_stages.py, below, run one after another, the most valuable
first, each in a process of its own with a time limit: one that fails, crashes
or hangs costs itself only. If a kernel breaks the process's GPU context, it is
reported, and a new process goes on with the next.

A stage's rows are in ``STAGE.json`` as soon as they are known. Shortly before
its limit, what it runs is interrupted, so that it can still say what it found.
After each stage ``summary.json``, which holds all that is in the folder, and
``summary.md``, the figures, are written anew. ``gpu_suite.py summary FOLDER``
does that alone.

``--dry-run`` tries the code of the stages without a GPU: small maps, which
the reference computes on the CPU, behind the pretended GPU of fake_gpu.py. Its
results are marked as fake, and the summary gives no figures of them.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_stages  # which finds the others
from _measure import fail

STAGES = {  # name -> function, seconds at most
    'environment': (gpu_stages.environment, 60),
    'compilation': (gpu_stages.compilation, 120),
    'agreement': (gpu_stages.agreement, 180),
    'graphs': (gpu_stages.graphs, 60),
    'host': (gpu_stages.host, 60),
    'candidates': (gpu_stages.candidates, 240),
    'profile': (gpu_stages.profile, 180),
    'operator': (gpu_stages.operator, 300),
    'tests': (gpu_stages.tests, 300),
    'large': (gpu_stages.large, 240),
}
SCRIPT = __file__  # what runs one stage
GO_ON = 75  # its exit code if another process has to do the rest
END_OF_LOG = 4000
GRACE = 15  # seconds before the limit, to write what is known


def run_stage(name, args, limit):
    """Run one stage, in one process or more; return its report."""
    path = args.out / f'{name}.json'
    path.unlink(missing_ok=True)
    command = [sys.executable, SCRIPT, '--stage', name, '--out', str(args.out)]
    command += ['--dry-run'] if args.dry_run else []
    command += ['--mmcv-src', str(args.mmcv_src)] if args.mmcv_src else []
    start = time.monotonic()
    code = GO_ON
    with tempfile.TemporaryFile('w+', errors='replace') as log:
        while code == GO_ON:
            left = start + limit - time.monotonic()
            code = run_process(command, log, left)
        log.seek(0)
        text = log.read()
    report = read(path) or {'stage': name, 'fake': args.dry_run, 'rows': []}
    if code is None:
        report['status'] = f'stopped after {limit:.0f} s'
    elif code:
        report['status'] = f'crashed, exit code {code}'
    report['seconds'] = time.monotonic() - start
    report['log'] = text[-END_OF_LOG:]
    write(path, report)
    return report


def run_process(command, log, limit):
    """Its exit code, or None if it had to be stopped."""
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # so that its own children can be ended too
    )
    try:
        return process.wait(max(0, limit - GRACE))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # all have ended
            pass
        process.wait()


def stage_main(args):
    """In the stage's process: collect its rows."""
    # The command that the stage waits for is to end, not the stage.
    signal.signal(signal.SIGINT, lambda *_: None)
    function, _ = STAGES[args.stage]
    path = args.out / f'{args.stage}.json'
    report = read(path) or {
        'stage': args.stage,
        'fake': args.dry_run,
        'status': 'unfinished',
        'rows': [],
    }
    args.device, args.levels = 'cuda', gpu_stages.LEVELS
    if args.dry_run:
        gpu_stages.fake_gpu.pretend()
        args.device, args.levels = 'cpu', gpu_stages.SMALL
    done = {row['what'] for row in report['rows']}
    for row in function(args, done):
        if row['what'] in done:
            continue
        report['rows'].append(row)
        write(path, report)
        if 'error' in row:
            print(f'{row["what"]}: {row["error"]}', flush=True)
            if not gpu_works():
                os._exit(GO_ON)  # ending in order needs the GPU
    failed = sum('error' in row for row in report['rows'])
    report['status'] = f'{failed} failed' if failed else 'passed'
    write(path, report)


def gpu_works():
    try:
        gpu_stages.torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


def write(path, report):
    """All of it, or none, whenever the process ends."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(report, indent=1) + '\n')
    part.replace(path)


# Summary


def summarize(folder):
    """Write both summaries of the stages that are in a folder."""
    reports = {name: read(folder / f'{name}.json') for name in STAGES}
    reports = {name: report for name, report in reports.items() if report}
    if not reports:
        fail(f'there are no results of a stage in {folder}')
    write(folder / 'summary.json', reports)
    lines = table(
        'stage, status, seconds, rows',
        [
            [name, r['status'], number(r.get('seconds')), len(r['rows'])]
            for name, r in reports.items()
        ],
    )
    for name, report in reports.items():
        failed = [row for row in report['rows'] if 'error' in row]
        skipped = [row for row in report['rows'] if 'skipped' in row]
        lines += ['', f'## {name}', '']
        lines += [f'- FAILED {x["what"]}: {short(x["error"])}' for x in failed]
        lines += [f'- skipped {x["what"]}: {x["skipped"]}' for x in skipped]
        if report['fake']:
            lines.append('Fake, from a dry run: no figures.')
        elif name in FIGURES:
            lines += ['', *FIGURES[name](report['rows'])]
    (folder / 'summary.md').write_text('\n'.join(lines) + '\n')


def environment_figures(rows):
    versions = rows[0]
    shown = 'date', 'commit', 'device', 'driver', 'cuda', 'torch', 'packages'
    return table('what, is', [[x, versions.get(x)] for x in shown])


def agreement_figures(rows):
    """The worst of each case."""
    found = []
    for case, here in grouped(rows).items():
        errors = [r['largest_error'] for r in here if 'largest_error' in r]
        allowed = [r['reference_error'] for r in here if 'largest_error' in r]
        failed = sum('error' in r for r in here)
        worst = [max(errors, default=None), max(allowed, default=None)]
        found.append([case, len(here), failed, *map(number, worst)])
    return table(
        "case, candidates, failed, largest error, reference's largest", found
    )


def candidate_figures(rows):
    """Fastest first; microseconds are of one launch."""
    found = []
    for case, here in grouped(rows).items():
        times = {(r['method'], r['mode']): r.get('seconds') for r in here}
        floor = times.get((gpu_stages.bench_op.COPY, 'graph'))
        replayed = [r for r in here if r['mode'] == 'graph' and 'seconds' in r]
        for r in sorted(replayed, key=lambda r: r['seconds']):
            eager = times.get((r['method'], 'eager'))
            found.append(
                [
                    case,
                    r['method'],
                    number(r['seconds'] * 1e6),
                    number(eager and eager * 1e6),
                    number(r['bytes'] / r['seconds'] / 1e9),
                    number(floor and r['seconds'] / floor),
                    *(r.get(x) for x in RESOURCES),
                ]
            )
    columns = 'case, candidate, us, us eager, GB/s, times the copy'
    return table(', '.join([columns, *RESOURCES]), found)


RESOURCES = 'registers', 'spills', 'shared_bytes'


def operator_figures(rows):
    return [
        line
        for row in rows
        if 'report' in row
        for line in (
            f'### {row["what"]}',
            '',
            gpu_stages.bench_op.table(row['report']),
        )
    ]


def host_figures(rows):
    return table(
        'call, us', [[r['what'], number(r['microseconds'])] for r in rows]
    )


def test_figures(rows):
    lines = []
    for r in rows:
        lines.append(f'- {r["what"]}: {r.get("counts", r.get("exit_code"))}')
        for failure in r.get('failures', []):
            lines.append(f'  - {failure["test"]}: {short(failure["message"])}')
    return lines


def graph_figures(rows):
    return [f'- {r["what"]}: {r["found"]}' for r in rows if 'found' in r]


def profile_figures(rows):
    return [
        f'- {r["what"]}: {len(r["metrics"])} metrics, in summary.json'
        for r in rows
        if 'metrics' in r
    ]


FIGURES = {
    'environment': environment_figures,
    'agreement': agreement_figures,
    'candidates': candidate_figures,
    'operator': operator_figures,
    'host': host_figures,
    'tests': test_figures,
    'graphs': graph_figures,
    'profile': profile_figures,
    'large': test_figures,
}


def grouped(rows):
    found = {}
    for row in rows:
        if 'case' in row:
            found.setdefault(row['case'], []).append(row)
    return found


def short(text):
    return ' '.join(text.split())[:200]


def number(x):
    return None if x is None else f'{x:.3g}' if x < 1000 else f'{x:.0f}'


def table(titles, rows):
    rows = [titles.split(', '), ['---'] * len(titles.split(', ')), *rows]
    return [
        f'| {" | ".join("" if x is None else str(x) for x in row)} |'
        for row in rows
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', type=Path, default='work_dirs/gpu_suite')
    parser.add_argument(
        '--stages', nargs='+', choices=list(STAGES), help='default: all'
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=560,
        help='for all stages; those for which none are left are skipped '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--mmcv-src', type=Path, help="mmcv's sources, to measure it too"
    )
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--stage', help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest='command', metavar='summary FOLDER')
    commands.add_parser('summary').add_argument('folder', type=Path)
    args = parser.parse_args()
    if args.command == 'summary':
        summarize(args.folder)
        return
    args.out = args.out.resolve()
    if args.stage:
        stage_main(args)
        return
    if args.dry_run:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # not even if there is one
    elif not gpu_stages.torch.cuda.is_available():
        fail('torch finds no GPU; --dry-run needs none')
    args.out.mkdir(parents=True, exist_ok=True)
    # A command that is ended ends its stage.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end = time.monotonic() + args.seconds
    missed = []
    for name in args.stages or STAGES:
        _, limit = STAGES[name]
        limit = min(limit, end - time.monotonic())
        if limit <= 0:
            print(f'{name}: skipped, no time is left', flush=True)
            missed.append(name)
            continue
        report = run_stage(name, args, limit)
        print(
            f'{name}: {report["status"]} ({report["seconds"]:.0f} s)',
            flush=True,
        )
        if report['status'] != 'passed':
            missed.append(name)
            print(report['log'], flush=True)
        summarize(args.out)
    if (args.out / 'summary.md').exists():
        print((args.out / 'summary.md').read_text())
    if missed:
        fail(f'these stages did not pass: {", ".join(missed)}')


if __name__ == '__main__':
    main()
