"""Compare what accuracy.py has recorded; see ``accuracy.py report --help``."""

import math
import re
import statistics

from scipy.stats import t as student_t

CONFIDENCE = 0.95
SAME_TABLE = ('data', 'images', 'task', 'iters', 'lr')


def summarize(records, baselines):
    """Scores of each arm, and its paired differences from the baseline.

    Args:
        records (list[dict]): lines of accuracy.py.
        baselines (dict): the baseline of each task.

    Returns:
        list[dict]: one for each ``SAME_TABLE``, with ``arms``, a dict of
        dicts: arm -> metric -> ``n``, ``mean``, ``sd`` and ``difference``.
        The last is None without a common seed; otherwise it has ``seeds``, a
        dict of the differences, their ``mean`` and the ``half_width`` of the
        interval around it, which is None if there is only one seed.

    Raises:
        ValueError: two records are of the same run, or the two of a pair
            started from different weights or saw different batches.
    """
    tables = {}
    for record in records:
        key = tuple(record[name] for name in SAME_TABLE)
        runs = tables.setdefault(key, {}).setdefault(record['arm'], {})
        if record['seed'] in runs:
            raise ValueError(f'{_name(record)} is recorded twice')
        runs[record['seed']] = record
    groups = []
    for key, arms in sorted(tables.items()):
        group = dict(zip(SAME_TABLE, key))
        group['baseline'] = baselines[group['task']]
        base = arms.get(group['baseline'], {})
        everything = [r for runs in arms.values() for r in runs.values()]
        places = [r['environment'] for r in everything]
        group['commits'] = sorted({x['commit'] for x in places})
        group['uncommitted_changes'] = any(
            x['uncommitted_changes'] for x in places
        )
        group['machines'] = sorted(
            {f'{x["device"]}, torch {x["torch"]}' for x in places}
        )
        group['arms'] = {}
        for arm in sorted(arms, key=lambda x: _order(x, group['baseline'])):
            runs = arms[arm]
            for seed in runs.keys() & base.keys():
                _check_pair(runs[seed], base[seed])
            group['arms'][arm] = {
                metric: _compare(
                    _scores(runs, metric),
                    {} if runs is base else _scores(base, metric),
                )
                for metric in everything[0]['metrics']
            }
        groups.append(group)
    return groups


def _order(arm, baseline):
    """The baseline first, then each upsampler with its variants."""
    return arm != baseline, re.split('[@:]', arm)


def _name(record):
    return (
        f'{record["arm"]} with seed {record["seed"]}, '
        f'{record["iters"]} iterations, lr {record["lr"]}'
    )


def _check_pair(one, other):
    for key in ('start', 'batches'):
        if one[key] != other[key]:
            raise ValueError(
                f'{_name(one)}: {key} {one[key][:10]}, expected '
                f"{other['arm']}'s, {other[key][:10]}: they are not a pair"
            )


def _scores(runs, metric):
    """Score of each seed that has one."""
    scores = {seed: record['metrics'][metric] for seed, record in runs.items()}
    return {seed: x for seed, x in scores.items() if x is not None}


def _compare(scores, base):
    differences = {
        seed: scores[seed] - base[seed]
        for seed in sorted(scores.keys() & base.keys())
    }
    values = list(scores.values())
    return {
        'n': len(values),
        'mean': statistics.mean(values) if values else None,
        'sd': statistics.stdev(values) if len(values) > 1 else None,
        'difference': {
            'mean': statistics.mean(differences.values()),
            'half_width': half_width(list(differences.values())),
            'seeds': differences,
        }
        if differences
        else None,
    }


def half_width(values):
    """Half of Student's t interval around the mean; None for one value."""
    n = len(values)
    if n < 2:
        return None
    quantile = student_t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(n))


def title(group):
    return (
        f'{group["data"]}, {group["task"]}, {group["iters"]} iterations, '
        f'lr {group["lr"]:g}'
    )


def table(groups):
    """Markdown."""
    lines = []
    for group in groups:
        metrics = list(next(iter(group['arms'].values())))
        head = ['arm', 'runs', *metrics, 'pairs', *(f'Δ {m}' for m in metrics)]
        lines += [f'### {title(group)}', '', _row(head)]
        lines.append(_row(['---', *['--:'] * (len(head) - 1)]))
        for arm, scores in group['arms'].items():
            cells = list(scores.values())
            differences = [cell['difference'] for cell in cells]
            first = differences[0]
            lines.append(
                _row(
                    [
                        arm,
                        cells[0]['n'],
                        *(_plus_minus(c['mean'], c['sd']) for c in cells),
                        len(first['seeds']) if first else '',
                        *map(_delta, differences),
                    ]
                )
            )
        dirty = ', with uncommitted changes' * group['uncommitted_changes']
        lines += [
            '',
            'Mean ± standard deviation over the seeds. '
            f'{_what_delta_is(group["baseline"])}',
            f'{"; ".join(group["machines"])}; commit '
            f'{", ".join(c[:10] for c in group["commits"])}{dirty}; scored '
            f'images {group["images"]}.',
            '',
        ]
    return '\n'.join(lines)


def lengths_table(groups, metric):
    """Markdown: differences in one metric, a column for each ``iters``.

    An arm of a single length is left out.

    Raises:
        ValueError: the groups differ in more than the number of iterations,
            have no such metric, or no arm that was trained for two lengths.
    """
    for key in SAME_TABLE:
        values = sorted({group[key] for group in groups})
        if key != 'iters' and len(values) > 1:
            raise ValueError(
                f'--lengths: {key}: expected one for all, got {values}'
            )
    metrics = list(next(iter(groups[0]['arms'].values())))
    if metric not in metrics:
        raise ValueError(
            f'--lengths: expected one of {", ".join(metrics)}, got {metric}'
        )
    baseline = groups[0]['baseline']
    lines = [
        _row([f'Δ {metric} after', *(f'{g["iters"]} it.' for g in groups)]),
        _row(['---', *['--:'] * len(groups)]),
    ]
    arms = {arm for group in groups for arm in group['arms']}
    for arm in sorted(arms, key=lambda x: _order(x, baseline)):
        differences = [
            g['arms'][arm][metric]['difference'] if arm in g['arms'] else None
            for g in groups
        ]
        if sum(map(bool, differences)) > 1:
            cells = (
                f'{_delta(d)} ({len(d["seeds"])})' if d else ''
                for d in differences
            )
            lines.append(_row([arm, *cells]))
    if len(lines) == 2:
        raise ValueError(
            f'--lengths: no arm has pairs with {baseline} at two lengths'
        )
    legend = f'{_what_delta_is(baseline)} In brackets their number.'
    return '\n'.join([*lines, '', legend])


def _delta(difference):
    if difference is None:
        return ''
    return _plus_minus(difference['mean'], difference['half_width'], '+')


def _what_delta_is(baseline):
    return (
        f'Δ: difference from {baseline} with the same seed, start and '
        f'batches, mean ± half of the {CONFIDENCE:.0%} interval '
        "(Student's t over the pairs)."
    )


def _row(cells):
    return f'| {" | ".join(map(str, cells))} |'


def _plus_minus(mean, spread, sign=''):
    if mean is None:
        return '–'
    text = f'{mean:{sign}.2f}'.replace('-', '−')
    return text if spread is None else f'{text} ± {spread:.2f}'


def plot(groups, path):
    """Draw each seed's difference as a dot, and the mean with its interval.

    A triangle at the edge stands for a dot that lies beyond it.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    groups = [
        (group, arms)
        for group in groups
        for arms in [_compared(group)]
        if arms
    ]
    if not groups:
        raise ValueError(
            'nothing to draw: no arm shares a seed with its baseline'
        )
    columns = max(len(next(iter(arms.values()))) for _, arms in groups)
    heights = [len(arms) + 1.5 for _, arms in groups]
    figure, axes = plt.subplots(
        len(groups),
        columns,
        # Equal scales for a metric, if all rows have the same ones.
        sharex='col' if len({g['task'] for g, _ in groups}) == 1 else False,
        figsize=(8.3, 0.6 + 0.33 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout='constrained',
    )
    limits = _limits(groups)
    for (group, arms), row in zip(groups, axes):
        for axis, metric in zip(row, next(iter(arms.values()))):
            _draw(
                axis,
                {arm: scores[metric] for arm, scores in arms.items()},
                limits[group['task'], metric],
            )
            axis.set_title(metric, fontsize=9)
            axis.set_xlabel(f'minus {group["baseline"]}', fontsize=8)
        row[0].set_yticks(range(len(arms)), list(arms), fontsize=9)
        row[0].set_ylabel(
            f'{group["data"]} {group["task"]}\n'
            f'{group["iters"]} iterations\n'
            f'lr {group["lr"]:g}',
            fontsize=8,
        )
    figure.suptitle(
        'Paired differences: a dot for each seed (a triangle: beyond the '
        f'edge), the mean with its {CONFIDENCE:.0%} t interval',
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _compared(group):
    return {
        arm: scores
        for arm, scores in group['arms'].items()
        if any(score['difference'] for score in scores.values())
    }


def _limits(groups):
    """How far each task's metrics are drawn, so that most arms fill the width.

    One arm that goes wrong would otherwise squeeze all others into a line.
    """
    reach = {}
    for group, arms in groups:
        for scores in arms.values():
            for metric, score in scores.items():
                if score['difference']:
                    reach.setdefault((group['task'], metric), []).append(
                        max(map(abs, _ends(score['difference'])))
                    )
    return {
        key: 1.1 * min(max(values), 2 * statistics.median(values)) or 1
        for key, values in reach.items()
    }


def _ends(difference):
    mean, half_width = difference['mean'], difference['half_width'] or 0
    return [
        *difference['seeds'].values(),
        mean - half_width,
        mean + half_width,
    ]


def _draw(axis, arms, limit):
    axis.axvline(0, color='0.6', linewidth=1)
    for y, score in enumerate(arms.values()):
        difference = score['difference']
        if difference is None:
            continue
        for x in difference['seeds'].values():
            outside = abs(x) > limit
            axis.plot(
                math.copysign(0.97 * limit, x) if outside else x,
                y,
                ('>' if x > 0 else '<') if outside else 'o',
                color='C0',
                alpha=0.35,
                ms=4,
            )
        axis.errorbar(
            difference['mean'],
            y - 0.25,
            xerr=difference['half_width'],
            fmt='D',
            color='black',
            ms=4,
            capsize=3,
        )
        if abs(difference['mean']) > limit:
            axis.annotate(
                f'{difference["mean"]:+.2f}'.replace('-', '\N{MINUS SIGN}'),
                (math.copysign(0.9 * limit, difference['mean']), y - 0.25),
                ha='right' if difference['mean'] > 0 else 'left',
                va='center',
                fontsize=8,
                bbox=dict(facecolor='white', edgecolor='none', pad=1),
            )
    axis.set_xlim(-limit, limit)
    axis.set_ylim(len(arms) - 0.4, -0.7)
    axis.set_yticks([])
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.grid(axis='x', color='0.9')
    axis.set_axisbelow(True)
