"""Time and memory of CARAFE and of other ways to upsample by 2.

    python benchmarks/bench_op.py --out work_dirs/bench_op

The operator's tests run first; if they fail, nothing is measured. Then every
method upsamples the same feature map, forward, and forward plus backward.
Writes ``results.json`` (with machine, versions and commit), ``table.md`` and
``plot.png`` to the folder given.

The methods take turns, in another order each round, so that a disturbance of
the machine hits all of them, and none always follows one that empties the
caches; medians are reported. ``--methods`` leaves out slow ones: the others
then get more rounds in the same time. CARAFE starts from logits, whose
prediction is not timed, in all three of its forms: the operator (the compiled
library or Triton), the PyTorch path (``mmcarafe.ops.reference``), and the
usual formulation in PyTorch, which unfolds the features. The other learned
methods include all of their convolutions.

On a CPU, the report also says how many multiply-adds a second a convolution
reaches: processors of one name differ in the width of their arithmetic.

On a GPU (``--device cuda``) each method is timed twice: eagerly, which for
small maps is the time that the CPU takes to launch it, and replayed as a CUDA
graph, which is the GPU's own. The report lists with what CARAFE's kernels were
launched. There are more methods to compare with; see gpu_baselines.py. mmcv's
own operator is measured if mmcv is installed with its CUDA operators, or with
``--mmcv-src``, the folder of an unpacked release. A method that fails is
reported as failed, and the others are measured. Small maps stay in the GPU's
cache from one run to the next; so does the copy that the methods are compared
with there.
"""

import argparse
import colorsys
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import gpu_baselines  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _measure import (  # noqa: E402
    PASSES,
    as_function,
    conditions,
    environment,
    fail,
    find_device,
    find_inputs,
    fma_rate,
    measure_pass,
    read_report,
)

from mmcarafe.ops import (  # noqa: E402
    carafe_from_logits,
    reference,
    triton,
)
from mmcarafe.upsamplers import (  # noqa: E402
    CARAFE,
    COMPARED,
    build_upsampler,
)

KERNEL_SIZE = 5
COPY = 'copy of the least bytes'
# N, C, H, W
CPU_SHAPES = {
    'FPN 25x42': (1, 256, 25, 42),
    'FPN 50x84': (1, 256, 50, 84),
    'FPN 100x168': (1, 256, 100, 168),
    'UperNet 16x16': (1, 512, 16, 16),
    'UperNet 32x32': (1, 512, 32, 32),
    'UperNet 64x64': (1, 512, 64, 64),
    'mask head 14x14': (100, 256, 14, 14),
}
GPU_SHAPES = {
    'FPN 25x42': (8, 256, 25, 42),
    'FPN 50x84': (8, 256, 50, 84),
    'FPN 100x168': (8, 256, 100, 168),
    'UperNet 64x64': (8, 512, 64, 64),
    'mask head 14x14': (512, 256, 14, 14),
}


def unfold_matmul(features, logits):
    """The usual CARAFE in PyTorch: every window is copied, then weighted."""
    n, c, h, w = features.shape
    k2 = KERNEL_SIZE**2
    windows = F.unfold(features, KERNEL_SIZE, padding=KERNEL_SIZE // 2)
    windows = windows.view(n, c, k2, h * w).permute(0, 3, 1, 2)
    weights = logits.view(n, k2, 4, h * w).softmax(1)
    weights = weights.permute(0, 3, 1, 2)  # [N, H*W, K*K, S*S]
    out = windows @ weights  # [N, H*W, C, S*S]
    out = out.permute(0, 2, 3, 1).reshape(n, c * 4, h, w)
    return F.pixel_shuffle(out, 2)


def carafe(features, logits):
    return carafe_from_logits(features, logits, KERNEL_SIZE)


def modules(features):
    """Whole modules to compare, with gradients for every parameter.

    CARAFE and its variants start from logits, in :func:`methods`.
    """
    channels = features.shape[1]
    for name, cfg in COMPARED.items():
        module = build_upsampler(cfg, channels, guide_channels=channels)
        if isinstance(module, CARAFE):
            continue
        module = module.to(features)
        yield name, as_function(module, find_inputs(module, features))


def methods(features, mmcv):
    """Name -> (function, its inputs)."""
    n, c, h, w = features.shape
    options = dict(device=features.device, dtype=features.dtype)
    memory_format = (
        torch.contiguous_format
        if features.is_contiguous()
        else torch.channels_last
    )
    logits = torch.randn(n, 4 * KERNEL_SIZE**2, h, w, **options)
    logits = logits.contiguous(memory_format=memory_format)
    more = {}
    if features.is_cuda:
        more = gpu_baselines.methods(features, logits, KERNEL_SIZE, mmcv)
    if features.dtype == torch.float32 and features.is_contiguous():
        for name, kwargs in {
            'CARAFE, channels_last': {'memory_format': torch.channels_last},
            'CARAFE, bf16': {'dtype': torch.bfloat16},
        }.items():
            inputs = [features.to(**kwargs), logits.to(**kwargs)]
            more[name] = carafe, inputs
    return {
        **dict(modules(features)),
        'CARAFE': (carafe, [features, logits]),
        'CARAFE, border renormalised': (
            lambda x, y: carafe_from_logits(
                x, y, KERNEL_SIZE, border='renormalize'
            ),
            [features, logits],
        ),
        'CARAFE, PyTorch path': (
            lambda x, y: reference.carafe_from_logits(x, y, KERNEL_SIZE),
            [features, logits],
        ),
        'CARAFE, unfold + matmul': (unfold_matmul, [features, logits]),
        **more,
    }


def measure(
    shape, dtype, device, memory_format, budget, mmcv=None, chosen=None
):
    """Median seconds, peak and kept bytes of every method in every pass.

    Or of those chosen, by their names. On a GPU in every mode, too.

    A method that fails has an error instead.
    """
    features = torch.randn(*shape, dtype=dtype, device=device)
    features = features.contiguous(memory_format=memory_format)
    torch._dynamo.reset()  # it recompiles a function only so often
    results = []
    for pass_name in PASSES:
        compared = methods(features, mmcv)
        if chosen:
            compared = {
                name: method
                for name, method in compared.items()
                if name in chosen
            }
        floor = {}
        on_gpu = device.type == 'cuda'
        if on_gpu:
            floor[COPY] = gpu_baselines.copy_floor(
                features, KERNEL_SIZE, pass_name != 'forward'
            )
        results += measure_pass(
            compared, pass_name, device, budget, floor, with_graphs=on_gpu
        )
    return results


def table(report):
    results = report['results']
    methods = {r['method'] for r in results}
    baseline = COPY if COPY in methods else 'bilinear'
    lines = [conditions(report, 'x2', f'K = {KERNEL_SIZE}')]
    for title, here in panels(results).items():
        shapes = list(dict.fromkeys(r['shape'] for r in here))
        lines += [
            '',
            f'{title}: median milliseconds, times those of {baseline}, '
            'peak MB',
            '',
            '| | ' + ' | '.join(shapes) + ' |',
            '|---' + '|--:' * len(shapes) + '|',
        ]
        cells = {(r['method'], r['shape']): r for r in here}
        for method in dict.fromkeys(r['method'] for r in here):
            row = []
            for shape in shapes:
                r = cells.get((method, shape), {})
                if 'seconds' not in r:
                    row.append('failed' if 'error' in r else '')
                    continue
                cell = [f'{r["seconds"] * 1e3:.3g} ms']
                divisor = cells.get((baseline, shape), {}).get('seconds')
                if divisor:
                    cell.append(f'{r["seconds"] / divisor:.2f}×')
                if r['peak_bytes'] is not None:
                    cell.append(f'{r["peak_bytes"] / 1e6:.0f} MB')
                row.append(', '.join(cell))
            lines.append(f'| {method} | ' + ' | '.join(row) + ' |')
    if report.get('kernels'):
        lines += ['', 'CARAFE was launched with', '']
        lines += [f'- {describe_launch(each)}' for each in report['kernels']]
    return '\n'.join(lines) + '\n'


def panels(results):
    """Title -> results: those of a pass, on a GPU in a mode."""
    found = {}
    modes = {'eager': ', eager', 'graph': ', CUDA graph', None: ''}
    for pass_name in PASSES:
        for mode, title in modes.items():
            here = [
                r
                for r in results
                if (r['pass'], r.get('mode')) == (pass_name, mode)
            ]
            if here:
                found[pass_name + title] = here
    return found


def describe_launch(launch):
    """One line of what :func:`mmcarafe.ops.triton.launched` says."""
    candidate = ', '.join(f'{k} {v}' for k, v in launch['candidate'].items())
    shape = '×'.join(map(str, launch['shape']))
    return (
        f'{launch["operator"]}, {launch["dtype"]} {launch["layout"]} {shape}, '
        f'{launch["normalizer"]}, {launch["border"]}: {candidate}; '
        f'{launch["registers"]} registers, {launch["spills"]} spilled, '
        f'{launch["shared_bytes"]} bytes of shared memory'
    )


def colours(names):
    """A hue for each kind of method, paler from one variant to the next.

    The kind is the text before the comma: 'CARAFE, bf16' is a variant of
    CARAFE. Variants of a kind come in order.
    """
    kinds = {'CARAFE': []}
    for name in names:
        kinds.setdefault(name.split(',')[0], []).append(name)
    found = {}
    for i, variants in enumerate(kinds.values()):
        hue = 0.07  # CARAFE gets orange, the others what is not close to it
        if i > 0:
            hue += 1 / 8 + 3 / 4 * (i - 1) / max(1, len(kinds) - 2)
        for j, name in enumerate(variants):
            saturation = 0.85 - 0.7 * j / len(variants)
            found[name] = colorsys.hsv_to_rgb(hue % 1, saturation, 0.85)
    return found


def plot(report, path):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    results = [r for r in report['results'] if 'seconds' in r]
    colour_of = colours(dict.fromkeys(r['method'] for r in results))
    shapes = list(dict.fromkeys(r['shape'] for r in results))
    parts = panels(results)
    figure, axes = plt.subplots(
        len(parts),
        1,
        figsize=(11, 4 * len(parts)),
        sharex=True,
        squeeze=False,
        layout='constrained',
    )
    axes = axes[:, 0]
    width = 0.9 / len(colour_of)
    for axis, (title, panel) in zip(axes, parts.items()):
        for i, (name, colour) in enumerate(colour_of.items()):
            here = [r for r in panel if r['method'] == name]
            aside = (i - (len(colour_of) - 1) / 2) * width
            axis.bar(
                [shapes.index(r['shape']) + aside for r in here],
                [r['seconds'] * 1e3 for r in here],
                width=width,
                label=name,
                color=colour,
            )
        axis.set_yscale('log')
        axis.set_ylabel('milliseconds')
        axis.set_title(title)
        axis.set_xticks(range(len(shapes)), shapes)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc='outside upper center',
        ncols=4,
        fontsize='small',
    )
    figure.savefig(path, dpi=150)


def tests_pass(device):
    tests = ['tests/test_ops.py', 'tests/test_ops_cpu.py']
    if device.type == 'cuda':
        tests = ['-m', 'gpu', 'tests/test_ops_triton.py']
    command = [sys.executable, '-m', 'pytest', '-q', *tests]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def choose(report, shapes, methods):
    """The report with these shapes and methods alone, if any are given."""
    results = report['results']
    for option, key, chosen in (
        ('--shapes', 'shape', shapes),
        ('--methods', 'method', methods),
    ):
        for name in chosen or []:
            if name not in {r[key] for r in results}:
                fail(f'{option}: {name} is not in the report')
        results = [r for r in results if not chosen or r[key] in chosen]
    return {**report, 'results': results}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', type=Path, default='work_dirs/bench_op')
    parser.add_argument('--device', type=find_device, default='cpu')
    parser.add_argument(
        '--dtype',
        default='float32',
        choices=('float32', 'bfloat16', 'float16'),
    )
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--threads', type=int, help="default: torch's own")
    parser.add_argument(
        '--shapes',
        nargs='+',
        choices=list({**CPU_SHAPES, **GPU_SHAPES}),
        help='default: all of the device',
    )
    parser.add_argument(
        '--methods',
        nargs='+',
        metavar='METHOD',
        help='names as in the table, quoted; default: all',
    )
    parser.add_argument(
        '--mmcv-src', type=Path, help="mmcv's sources, to measure it on a GPU"
    )
    parser.add_argument(
        '--budget',
        type=float,
        default=10,
        help='seconds for one shape and pass, once 5 rounds are done',
    )
    parser.add_argument(
        '--tests-passed',
        action='store_true',
        help='skip the tests: they passed just before, on this machine and '
        'commit; the report says so',
    )
    parser.add_argument(
        '--report',
        type=Path,
        metavar='FILE',
        help='print the table of a results.json, of --shapes and --methods '
        'only if given, and measure nothing',
    )
    args = parser.parse_args()
    if args.report:
        report = read_report(args.report)
        print(table(choose(report, args.shapes, args.methods)))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = args.device.type == 'cuda'
    if args.mmcv_src and not (args.mmcv_src / 'mmcv/ops/csrc').is_dir():
        fail(f'--mmcv-src: there is no {args.mmcv_src}/mmcv/ops/csrc')
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    for name in args.shapes or []:
        if name not in shapes:
            fail(f'--shapes: {name} is not measured on a GPU')
    mmcv = gpu_baselines.find_mmcv(args.mmcv_src) if on_gpu else None
    if args.methods:
        known = methods(torch.zeros(1, 64, 2, 2, device=args.device), mmcv)
        for name in args.methods:
            if name not in known:
                fail(f'--methods: no {name!r}, only {", ".join(known)}')
    if not args.tests_passed and not tests_pass(args.device):
        fail("the operator's tests fail, so nothing is measured")
    torch.manual_seed(0)
    report = {
        'environment': environment(args.device),
        'tests': 'passed before' if args.tests_passed else 'passed',
        'dtype': args.dtype,
        'memory_format': 'channels_last'
        if args.channels_last
        else 'contiguous',
        'results': [],
    }
    if on_gpu:
        report['kernels'] = []
    else:
        report['environment']['fma_per_second'] = fma_rate()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.shapes or shapes:
        print(f'measuring {name}', flush=True)
        before = triton.launched()
        results = measure(
            shapes[name],
            getattr(torch, args.dtype),
            args.device,
            torch.channels_last
            if args.channels_last
            else torch.contiguous_format,
            args.budget,
            mmcv,
            args.methods,
        )
        report['results'] += [{'shape': name, **r} for r in results]
        if on_gpu:
            report['kernels'] += [
                x for x in triton.launched() if x not in before
            ]
        # After each shape: a crash loses no finished work.
        text = json.dumps(report, indent=1)
        (args.out / 'results.json').write_text(text + '\n')
    (args.out / 'table.md').write_text(table(report))
    plot(report, args.out / 'plot.png')
    print(table(report))
    print(f'written: {args.out}/results.json, table.md and plot.png')
    failed = {r['method'] for r in report['results'] if 'error' in r}
    if failed:
        fail(f'these failed: {", ".join(sorted(failed))}')


if __name__ == '__main__':
    main()
