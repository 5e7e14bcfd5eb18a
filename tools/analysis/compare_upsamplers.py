"""Parameters, FLOPs, time and memory of every upsampler, on this machine.

    python tools/analysis/compare_upsamplers.py --channels 256 --size 50 84 \\
        --out work_dirs/compare_upsamplers

Each upsampler of the table in docs/cost.md is built whole, with all of its
convolutions, and upsamples the same map [1, C, H, W], forward, and forward
plus backward with gradients for parameters and inputs. One that wants a guide
gets a random map [1, C, S*H, S*W].

They take turns, in another order each round, so that a disturbance of the
machine hits all of them; medians are reported, and how many times as long as
bilinear interpolation each took. Peak memory is the most that torch holds at
once, on top of inputs and parameters. What is kept for the backward pass
includes the inputs and parameters that it needs. FLOPs are for one source
pixel, a multiply-add as 2, without biases, as there.

Writes to the folder given: ``results.json``, with machine, versions and
commit, after each result, so that a crash loses no finished one; ``table.md``;
and ``plot.png``, time against parameters. An upsampler that fails is reported
as failed, and the others are measured. On a CPU, the report also says how many
multiply-adds a second a convolution reaches: processors of one name differ.
"""

import argparse
import itertools
import json
import math
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import torch
from upsampler_table import count

from mmcarafe.ops.reference import DTYPES
from mmcarafe.upsamplers import COMPARED, UPSAMPLERS, build_upsampler

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for _measure
from _measure import (  # noqa: E402
    PASSES,
    as_function,
    conditions,
    environment,
    fail,
    failure,
    find_device,
    find_inputs,
    fma_rate,
    measure_pass,
    read_report,
)

BY_NAME = {str(dtype).split('.')[1]: dtype for dtype in DTYPES}
BASELINE = 'bilinear'


def build(cfg, features, scale_factor):
    """A function and its inputs, for an upsampler; and what is known of it."""
    channels = features.shape[1]
    parameters, flops, _ = count(cfg, channels, scale_factor)
    module = build_upsampler(
        cfg, channels, scale_factor, guide_channels=channels
    )
    module = module.to(
        device=features.device,
        dtype=features.dtype,
        memory_format=torch.contiguous_format
        if features.is_contiguous()
        else torch.channels_last,
    )
    known = {
        'guided': bool(getattr(module, 'guided', False)),
        'parameters': parameters,
        'flops_per_source_pixel': flops,
    }
    inputs = find_inputs(module, features, scale_factor)
    return as_function(module, inputs), known


def compare(report, features, chosen, budget, save):
    """Measure the upsamplers, filling the report.

    Args:
        report (dict): gets ``upsamplers`` and ``results``.
        features (Tensor[N, C, H, W]): to upsample.
        chosen (dict[str, dict]): name -> config.
        budget (float): see :func:`measure_pass`.
        save (Callable): called after each result.
    """
    report.update(upsamplers={}, results=[])
    methods = {}
    for name, cfg in chosen.items():
        try:
            methods[name], known = build(cfg, features, report['scale_factor'])
        except Exception as error:
            report['results'] += [failure(name, p, error) for p in PASSES]
            save()
            continue
        report['upsamplers'][name] = {**cfg, **known}
    for pass_name in PASSES:
        print(f'measuring {pass_name}', flush=True)
        for result in measure_pass(
            methods, pass_name, features.device, budget
        ):
            report['results'].append(result)
            save()


def table(report):
    results = {(r['method'], r['pass']): r for r in report['results']}
    height, width = report['size']
    size = f'{report["channels"]}×{height}×{width}'
    lines = [
        conditions(report, size, f'×{report["scale_factor"]}'),
        '',
        'Median milliseconds, times those of bilinear, peak MB; and MB kept '
        'for the backward pass:',
        '',
        '| upsampler | parameters | FLOPs per source pixel | forward | '
        'forward + backward | kept |',
        '|---|-:|-:|-:|-:|-:|',
    ]
    for name in dict.fromkeys(r['method'] for r in report['results']):
        known = report['upsamplers'].get(name)
        cells = ['', '']
        if known:
            cells = [
                f'{known["parameters"]:,}',
                f'{known["flops_per_source_pixel"]:,}',
            ]
        for pass_name in PASSES:
            r = results.get((name, pass_name), {})
            if 'seconds' not in r:
                cells.append('failed' if 'error' in r else '')
                continue
            cell = f'{_digits(r["seconds"] * 1e3)} ms'
            divisor = results.get((BASELINE, pass_name), {}).get('seconds')
            if divisor:
                cell += f', {_digits(r["seconds"] / divisor)}×'
            cells.append(f'{cell}, {_digits(r["peak_bytes"] / 1e6)} MB')
        kept = r.get('kept_bytes')
        cells.append('' if kept is None else f'{_digits(kept / 1e6)} MB')
        lines.append(f'| {name} | {" | ".join(cells)} |')
    errors = [
        f'- {r["method"]}, {r["pass"]}: {" ".join(r["error"].split())}'
        for r in report['results']
        if 'error' in r
    ]
    return '\n'.join([*lines, *([''] if errors else []), *errors]) + '\n'


def _digits(number):
    """Three of them, or all before the point."""
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f'{number:,.{decimals}f}'


def draw(report):
    """A figure of time against parameters, to be read at 880 pixels' width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    known = report['upsamplers']
    times = {}
    for r in report['results']:
        if 'seconds' in r:
            of_passes = times.setdefault(r['method'], {})
            of_passes[r['pass']] = r['seconds'] * 1e3
    places, ticks = _places({n: known[n]['parameters'] for n in times})

    figure = Figure(figsize=(8.8, 5.4), layout='constrained')
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_yscale('log')
    markers = dict(marker='o', markersize=8, linestyle='none')
    points = []
    for name, of_passes in times.items():
        # the subject of this package stands out
        colour = 'tab:orange' if name.startswith('CARAFE') else 'tab:blue'
        x, ys = places[name], [*of_passes.values()]
        axis.plot([x] * len(ys), ys, color=colour, linewidth=1)
        for pass_name, y in of_passes.items():
            fill = colour if pass_name == 'forward' else 'white'
            axis.plot(x, y, color=colour, markerfacecolor=fill, **markers)
        label = f'{name}, guided' if known[name]['guided'] else name
        points.append((label, colour, x, ys))
    for label, fill in (('forward', '0.3'), ('forward + backward', 'white')):
        axis.plot(
            [], [], color='0.3', markerfacecolor=fill, label=label, **markers
        )
    axis.legend(
        loc='lower right',
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        handletextpad=0.1,
    )
    height, width = report['size']
    axis.set_title(
        f'Upsampling {report["channels"]} channels of {height}×{width} pixels '
        f'by {report["scale_factor"]}',
        loc='left',
    )
    axis.set_ylabel('milliseconds (lower is faster)')
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axis.margins(y=0.12)
    axis.set_xlabel('parameters')
    axis.set_xticks([*ticks], [*ticks.values()])
    axis.set_xlim(min(ticks) - 0.5, max([*places.values(), *ticks]) + 0.25)
    axis.axvspan(min(ticks) - 0.5, min(ticks) + 0.5, color='0.95', zorder=0)
    axis.minorticks_off()
    axis.grid(color='0.9')
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    footer = textwrap.fill(conditions(report), 120)
    figure.supxlabel(footer, fontsize='small', color='0.4')
    _write_labels(figure, axis, points)
    return figure


def _places(parameters):
    """Where to draw each upsampler on a logarithmic axis, and its ticks.

    Those without parameters stand side by side in a column of their own, left
    of the axis, because it has no zero.
    """
    places = {name: math.log10(p) for name, p in parameters.items() if p}
    low = math.floor(min(places.values(), default=4))
    high = math.floor(max(places.values(), default=4))
    ticks = {low - 0.8: '0'}
    for exponent in range(low, high + 1):
        thousands, zeros = divmod(exponent, 3)
        unit = ('', ' k', ' M', ' G')[thousands]
        ticks[exponent] = f'{10**zeros}{unit}'
    fixed = [name for name, p in parameters.items() if not p]
    for i, name in enumerate(fixed, start=1):
        places[name] = low - 1.3 + i / (len(fixed) + 1)
    return places, ticks


def _write_labels(figure, axis, points):
    """Write each name beside one of its points, where it covers the least."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # from here on, places in pixels are known
    figure.set_layout_engine('none')
    renderer = figure.canvas.get_renderer()
    taken = []
    for _, _, x, ys in points:
        pixels = axis.transData.transform([(x, y) for y in ys])
        taken += [Bbox([pixel - 7, pixel + 7]) for pixel in pixels]
        taken.append(Bbox([pixels.min(0) - 2, pixels.max(0) + 2]))
    sides = (
        (9, 0, 'left', 'center'),
        (-9, 0, 'right', 'center'),
        (0, -9, 'center', 'top'),
        (0, 9, 'center', 'bottom'),
        (6, -6, 'left', 'top'),
        (6, 6, 'left', 'bottom'),
        (-6, -6, 'right', 'top'),
        (-6, 6, 'right', 'bottom'),
    )
    for label, colour, x, ys in points:
        text = axis.annotate(
            label, (x, ys[0]), (0, 0), textcoords='offset points', color=colour
        )

        def covered(spot, text=text, x=x):
            distance, y, (dx, dy, ha, va) = spot
            text.xy = x, y
            text.set(position=(distance * dx, distance * dy), ha=ha, va=va)
            box = text.get_window_extent(renderer)
            outside = not axis.bbox.containsx(box.x0)
            outside += not axis.bbox.containsx(box.x1)
            return 10 * outside + box.count_overlaps(taken)

        spots = itertools.product((1, 2, 3), ys, sides)
        covered(min(spots, key=covered))  # put it there, after the trials
        taken.append(text.get_window_extent(renderer))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--out', type=Path, default='work_dirs/compare_upsamplers'
    )
    parser.add_argument('--channels', type=int, default=256, help='C')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(50, 84), metavar=('H', 'W')
    )
    parser.add_argument('--scale', type=int, default=2, help='S')
    parser.add_argument('--dtype', default='float32', choices=BY_NAME)
    parser.add_argument('--device', type=find_device, default='cpu')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--threads', type=int, help="default: torch's own")
    parser.add_argument(
        '--budget',
        type=float,
        default=10,
        help='seconds for each pass, once 5 rounds are done',
    )
    parser.add_argument(
        '--upsamplers',
        nargs='+',
        metavar='NAME',
        help='types as in configs, e.g. CARAFE bilinear; default: all',
    )
    parser.add_argument(
        '--report',
        type=Path,
        metavar='FILE',
        help='print and draw a results.json once more, and measure nothing',
    )
    args = parser.parse_args()
    for name in ('channels', 'scale', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f'--{name} is {value}, expected an int >= 1')
    if min(args.size) < 1:
        fail(f'--size is {args.size}, expected two ints >= 1')
    if not args.budget >= 0:
        fail(f'--budget is {args.budget}, expected a number >= 0')
    for name in args.upsamplers or []:
        if name not in UPSAMPLERS:
            fail(f'--upsamplers: no {name!r}, only {", ".join(UPSAMPLERS)}')
    if find_spec('matplotlib') is None:  # say so before measuring for minutes
        fail('the plot needs matplotlib: pip install matplotlib')
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f'--out: cannot write into {args.out}: {error.strerror}')
    return args


def measure(args):
    """Measure, and keep what is finished in results.json."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report = {
        'environment': environment(args.device),
        'channels': args.channels,
        'size': args.size,
        'scale_factor': args.scale,
        'dtype': args.dtype,
        'memory_format': 'channels_last'
        if args.channels_last
        else 'contiguous',
    }
    if args.device.type == 'cpu':
        report['environment']['fma_per_second'] = fma_rate()
    features = torch.randn(
        (1, args.channels, *args.size),
        dtype=BY_NAME[args.dtype],
        device=args.device,
    )
    if args.channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    chosen = {
        name: cfg
        for name, cfg in COMPARED.items()
        if cfg['type'] in (args.upsamplers or UPSAMPLERS)
    }

    def save():
        unfinished = args.out / 'results.json.part'
        unfinished.write_text(json.dumps(report, indent=1) + '\n')
        unfinished.replace(args.out / 'results.json')

    compare(report, features, chosen, args.budget, save)
    return report


def main():
    args = parse_args()
    report = read_report(args.report) if args.report else measure(args)
    (args.out / 'table.md').write_text(table(report))
    draw(report).savefig(args.out / 'plot.png', dpi=200)
    print(table(report))
    if not args.report:
        print(f'written: {args.out}/results.json, table.md and plot.png')
    failed = {r['method'] for r in report['results'] if 'error' in r}
    if failed:
        fail(f'these failed: {", ".join(sorted(failed))}')


if __name__ == '__main__':
    main()
