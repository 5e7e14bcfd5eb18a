"""Figures of what :mod:`mmcarafe.visualization.kernels` records.

They need matplotlib. Each function returns a ``Figure`` that belongs to no
window: save it with ``figure.savefig(file)``. All are as wide as a page of
880 pixels at ``dpi=100``; :data:`DPI` makes them sharp on fine screens, too.

Maps are laid over the image by the size of their pixels, their *stride*: 1, 2,
4 … pixels of the image, which is what the image is as the model gets it.
Weights and shares are shown in viridis, and points in orange, which
colour-blind readers tell apart; no meaning hangs on red against green.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from mmcarafe.visualization.kernels import (
    Record,
    as_maps,
    center_of_mass,
    entropy,
    principal_colors,
    trace,
)

WIDTH = 8.8  # inches: 880 pixels at 100 dpi
DPI = 200
HEAT = 'viridis'
POINT = '#ff7f0e'  # orange
LINE = '#0b0b0b'
SIZES = (
    'Headings say which square of image pixels one pixel of a map covers, '
    'before → after.'
)
MOST = 24  # pixels of a map, of which a picture shows what it enlarges
SMALL, MEDIUM, LARGE = 7.5, 8.5, 10.5  # points


def stride_of(image_size: 'tuple[int, int]', size: 'tuple[int, int]') -> int:
    """How many pixels of the image a pixel of a map is wide: a power of two.

    A map of 4 rows of an image of 97 has pixels of 32 rows: sizes are rounded
    up where they are halved.
    """
    ratio = max(a / b for a, b in zip(image_size, size))
    return 2 ** max(0, math.ceil(math.log2(ratio) - 1e-6))


def kernels_figure(
    image: np.ndarray,
    chain: 'list[Record]',
    points: 'dict[str, tuple[float, float]]',
    input_size: 'tuple[int, int] | None' = None,
) -> Figure:
    """Draw the kernel that serves each point, at each level.

    One row for each point, one column for each step of the chain, coarsest
    first. On the left the image, with the K×K window in its true size; on the
    right the kernel, enlarged, in per cent. With several groups, it is their
    mean. DySample's window shows where it reads, a dot for each group.

    Args:
        image (ndarray[H_I, W_I, 3]): from 0 to 1, as the model gets it, but
            without padding.
        chain (list[Record]): finest first; the first image of the batch is
            shown.
        points (dict[str, tuple[float, float]]): name -> column and row in the
            image, from 0 to W_I and H_I.
        input_size (tuple[int, int], optional): rows and columns of the padded
            image; by default those of ``image``.
    """
    input_size = input_size or image.shape[:2]
    steps = chain[::-1]
    strides = [
        stride_of(input_size, record.before.shape[2:]) for record in steps
    ]
    windows = {
        (name, i): window_at(record, point, input_size)
        for name, point in points.items()
        for i, record in enumerate(steps)
    }
    most = max(
        [w['weights'].max() for w in windows.values() if 'weights' in w]
        or [1.0]
    )
    # An even kernel of 25 taps and a single tap are both to be seen.
    norm = PowerNorm(0.5, 0, most)
    aspect = image.shape[0] / image.shape[1]
    cell = (WIDTH - 0.5) / len(steps)
    wide = min(1.6, max(0.6, 1 / aspect))  # of a panel that is 1 high
    row = cell / (wide + 1) * max(1, wide * aspect) + 0.2
    weighted = any('weights' in w for w in windows.values())
    text = (
        'Left: the window in the image, with its weights as heat. Right: the '
        'window enlarged, and its largest weight.\n'
        'Orange strokes and × are the point. What is hatched lies outside '
        'the map, and reads zero.'
        if weighted
        else 'Left: the window in the image. Right: the window enlarged. Dots '
        'are where it is read, one for each group of channels.\n'
        'Orange strokes and × are the point. What is hatched lies outside '
        'the map, and reads its border.'
    )
    figure, top = _figure(
        row * len(points),
        'Which pixels of a coarser map a point is made of: '
        f'{list_of(chain[0])}',
        f'{text}\n{SIZES}{_cropped(image, strides)}',
        head=0.45,
        foot=0.75 if weighted else 0.2,
    )
    grid = figure.add_gridspec(
        len(points),
        2 * len(steps),
        width_ratios=[wide, 1] * len(steps),
        **_margins(figure, top, left=0.42),
        wspace=0.06,
        hspace=0.16,
    )
    mesh = None
    for r, name in enumerate(points):
        for i, record in enumerate(steps):
            left = figure.add_subplot(grid[r, 2 * i])
            right = figure.add_subplot(grid[r, 2 * i + 1])
            window = windows[name, i]
            _draw_window(left, image, window, norm)
            mesh = _draw_enlarged(right, window, norm) or mesh
            if i == 0:
                left.set_ylabel(name, fontsize=MEDIUM)
            if r == 0:
                left.set_title(
                    heading(record, input_size), fontsize=MEDIUM, loc='left'
                )
    if mesh is not None:
        _color_bar(
            figure, mesh, 'share of the point that a pixel gives', percent=True
        )
    return figure


def window_at(record, point, input_size):
    """The kernel of a point: weights or positions, and places in the image."""
    s = record.scale_factor
    coarse = stride_of(input_size, record.before.shape[2:])
    height, width = record.after.shape[2:]
    column = min(int(point[0] * s // coarse), width - 1)
    row = min(int(point[1] * s // coarse), height - 1)
    found = {
        'stride': coarse,
        # the source pixel around which the window lies, and the point's own
        # place, in source pixels from the edge of the map
        'center': (row // s, column // s),
        'own': ((row + 0.5) / s, (column + 0.5) / s),
        'size': record.before.shape[2:],
        # centre and size in the image
        'pixel': (
            (column + 0.5) * coarse / s,
            (row + 0.5) * coarse / s,
            coarse / s,
        ),
    }
    if record.weights is not None:
        k = record.kernel_size
        weights = as_maps(record.weights)[0, :, :, row, column].mean(0)
        found['kernel_size'] = k
        found['weights'] = weights.view(k, k).float().cpu().numpy()
    else:
        positions = record.positions[0, :, :, row, column] + 0.5
        reach = (
            (positions - torch.tensor(found['own']).to(positions)).abs().max()
        )
        found['kernel_size'] = 2 * max(1, math.ceil(reach.item())) + 1
        found['positions'] = positions.float().cpu().numpy()
    return found


def _draw_window(axis, image, window, norm):
    _show_image(axis, image)
    stride, k = window['stride'], window['kernel_size']
    _zoom(axis, image, window['pixel'], stride)
    top, left = (stride * (each - k // 2) for each in window['center'])
    size = stride * k
    if 'weights' in window:
        _heat(axis, window['weights'], (left, top, stride), norm)
    else:
        rows, columns = window['positions'].T * stride
        axis.plot(columns, rows, '.', color=POINT, mec='white', ms=4, mew=0.4)
    for color, line in (('white', 2.4), (LINE, 1.0)):
        axis.add_patch(
            Rectangle((left, top), size, size, fill=False, ec=color, lw=line)
        )
    _point_at(axis, *window['pixel'])


def _draw_enlarged(axis, window, norm):
    k = window['kernel_size']
    row, column = window['center']
    extent = (
        column - k // 2,
        column + k // 2 + 1,
        row + k // 2 + 1,
        row - k // 2,
    )
    mesh = None
    axis.set_facecolor('#dddddd')
    if 'weights' in window:
        mesh = axis.imshow(
            window['weights'], cmap=HEAT, norm=norm, extent=extent
        )
    else:
        rows, columns = window['positions'].T
        axis.plot(columns, rows, 'o', color=POINT, mec='white', ms=5, mew=0.6)
        axis.set_xticks(range(extent[0], extent[1]), minor=True)
        axis.set_yticks(range(extent[3], extent[2]), minor=True)
        axis.grid(which='minor', color='white', lw=0.8)
    # what of the window is outside the map
    height, width = window['size']
    outside = np.ones((k, k), bool)
    rows = np.arange(k) + extent[3]
    columns = np.arange(k) + extent[0]
    outside[
        np.ix_(
            (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        )
    ] = False
    for i, j in zip(*outside.nonzero()):
        axis.add_patch(
            Rectangle(
                (columns[j], rows[i]),
                1,
                1,
                fill=False,
                hatch='////',
                lw=0,
                ec='white',
            )
        )
    _cross(axis, window['own'][1], window['own'][0])
    if 'weights' in window:
        largest = f'largest {_percent(window["weights"].max())}'
        axis.set_xlabel(largest, fontsize=SMALL, labelpad=2)
    axis.set(
        xlim=extent[:2], ylim=extent[2:], aspect='equal', xticks=[], yticks=[]
    )
    axis.tick_params(which='both', length=0)
    return mesh


def statistics_figure(
    image: np.ndarray,
    chain: 'list[Record]',
    input_size: 'tuple[int, int] | None' = None,
) -> Figure:
    """Map how even the kernels are, and whence and how far they draw.

    One column for each step of the chain, coarsest first. With several
    groups, their mean is shown.

    Args:
        image (ndarray[H_I, W_I, 3]): see :func:`kernels_figure`.
        chain (list[Record]): the same.
        input_size (tuple[int, int], optional): the same.
    """
    input_size = input_size or image.shape[:2]
    steps = chain[::-1]
    spreads = [_spread(record) for record in steps]
    rows = 2 if any(each is not None for each in spreads) else 1
    aspect = image.shape[0] / image.shape[1]
    cell = (WIDTH - 0.95) / (len(steps) + 1) * aspect + 0.1
    text = (
        'Spread: 1 is the mean of the whole window, 0 a single pixel. It is '
        "the kernel's entropy, divided by that of the mean.\n"
    ) * (rows - 1)
    figure, top = _figure(
        cell * rows,
        f'How the kernels differ over the image: {list_of(chain[0])}',
        f'{text}'
        "Shift: how far the kernel's centre of mass lies from the point; "
        'arrows show where. Bilinear interpolation has none.\n'
        f'{SIZES}',
        head=0.4,
        foot=0.15,
    )
    grid = figure.add_gridspec(
        rows,
        len(steps) + 2,
        width_ratios=[1, *[1] * len(steps), 0.05],
        **_margins(figure, top, left=0.3, right=0.5),
        wspace=0.06,
        hspace=0.08,
    )
    for r in range(rows):
        axis = figure.add_subplot(grid[r, 0])
        _show_image(axis, image, pale=False)
        axis.set_ylabel(['Spread', 'Shift'][r - rows], fontsize=MEDIUM)
        if r == 0:
            axis.set_title('the image', fontsize=MEDIUM, loc='left')
    moves = [center_of_mass(record)[0].mean(0).float() for record in steps]
    far = max(move.norm(dim=0).max().item() for move in moves) or 1.0
    low = min([s.min().item() for s in spreads if s is not None] or [0.0])
    font = MEDIUM if len(steps) < 4 else SMALL  # headings side by side
    for i, (record, spread, move) in enumerate(zip(steps, spreads, moves)):
        axes = [figure.add_subplot(grid[r, i + 1]) for r in range(rows)]
        axes[0].set_title(
            heading(record, input_size), fontsize=font, loc='left'
        )
        fine = stride_of(input_size, record.before.shape[2:])
        fine = fine / record.scale_factor
        if rows == 2:
            mesh = _show_map(axes[0], image, spread, fine, HEAT, low, 1)
            if i == 0:
                _side_bar(figure, grid[0, -1], mesh, 'entropy / log K²')
        mesh = _show_map(
            axes[-1], image, move.norm(dim=0), fine, 'cividis', 0, far
        )
        _arrows(axes[-1], image, move, fine)
        if i == 0:
            _side_bar(
                figure, grid[rows - 1, -1], mesh, 'pixels of the coarser map'
            )
    return figure


def _spread(record):
    if record.weights is None or (record.weights < 0).any():
        return None
    return entropy(record.weights)[0].mean(0)


def _arrows(axis, image, move, fine):
    """About 13 in a row, all of the same length: colours say how far."""
    every = max(1, round(max(image.shape[:2]) / fine / 13))
    every += 1 - every % 2  # odd, so that all subpixels are met
    height, width = (
        min(a, math.ceil(b / fine))
        for a, b in zip(move.shape[1:], image.shape)
    )
    rows = torch.arange(every // 2, height, every)
    columns = torch.arange(every // 2, width, every)
    chosen = move.cpu()[:, rows][:, :, columns]
    length = chosen.norm(dim=0)
    chosen = torch.where(length < 0.1, float('nan'), chosen / length)
    down, right = chosen.numpy()
    axis.quiver(
        (columns.numpy() + 0.5) * fine,
        (rows.numpy() + 0.5) * fine,
        right,
        down,
        angles='xy',
        scale_units='xy',
        scale=1 / (0.8 * every * fine),
        pivot='middle',
        color='white',
        width=0.012,
        headwidth=3.5,
        headlength=3.5,
        headaxislength=3,
        edgecolor=LINE,
        linewidth=0.4,
    )


def features_figure(
    image: np.ndarray,
    chain: 'list[Record]',
    input_size: 'tuple[int, int] | None' = None,
) -> Figure:
    """Show what went into each upsampler, and what it made of it.

    One row for each step of the chain, coarsest first: the map as it is, which
    is what nearest interpolation makes of it, upsampled bilinearly, by the
    model, and how much the last two differ. Colours are the principal
    components of the map before: see :func:`principal_colors`.

    Args:
        image (ndarray[H_I, W_I, 3]): see :func:`kernels_figure`.
        chain (list[Record]): the same. Modules that change the number of
            channels cannot be shown.
        input_size (tuple[int, int], optional): the same.

    Raises:
        ValueError: a map has another number of channels after than before.
    """
    input_size = input_size or image.shape[:2]
    steps = chain[::-1]
    for record in steps:
        if record.before.shape[1] != record.after.shape[1]:
            raise ValueError(
                f'{record.name} makes {record.after.shape[1]} channels of '
                f'{record.before.shape[1]}, expected as many'
            )
    aspect = image.shape[0] / image.shape[1]
    cell = (WIDTH - 1.0) / 5 * aspect + 0.1
    figure, top = _figure(
        cell * len(steps),
        f'Features before and after upsampling: {list_of(chain[0])}',
        'Red, green and blue are the three strongest components of the map '
        'before, in the same range in all of a row.\n'
        f'{SIZES}',
        head=0.25,
        foot=0.15,
    )
    grid = figure.add_gridspec(
        len(steps),
        6,
        width_ratios=[1, 1, 1, 1, 1, 0.06],
        **_margins(figure, top, left=0.42, right=0.5),
        wspace=0.06,
        hspace=0.08,
    )
    for r, record in enumerate(steps):
        before = record.before[:1].float()
        own = record.after[:1].float()
        bilinear = F.interpolate(
            before, own.shape[2:], mode='bilinear', align_corners=False
        )
        colors = principal_colors(before[0], [before[0], bilinear[0], own[0]])
        coarse = stride_of(input_size, before.shape[2:])
        fine = coarse / record.scale_factor
        axis = figure.add_subplot(grid[r, 0])
        _show_image(axis, image, pale=False)
        axis.set_ylabel(heading(record, input_size), fontsize=SMALL)
        if r == 0:
            axis.set_title('the image', fontsize=MEDIUM)
        titles = ['before = nearest', 'bilinear', record.kind]
        for i, (title, shown) in enumerate(zip(titles, colors)):
            axis = figure.add_subplot(grid[r, i + 1])
            stride = coarse if i == 0 else fine
            axis.imshow(
                shown.cpu().numpy(),
                extent=_extent(shown, stride),
                interpolation='nearest',
            )
            _frame(axis, image)
            if r == 0:
                axis.set_title(title, fontsize=MEDIUM)
        axis = figure.add_subplot(grid[r, 4])
        length = before.norm(dim=1).mean().clamp(min=1e-12)
        apart = (own - bilinear).norm(dim=1)[0] / length
        mesh = _show_map(
            axis, image, apart, fine, 'cividis', 0, apart.max().item()
        )
        if r == 0:
            axis.set_title(f'{record.kind} − bilinear', fontsize=MEDIUM)
        _side_bar(figure, grid[r, 5], mesh, 'share of mean length')
    return figure


def trace_figure(
    image: np.ndarray,
    chain: 'list[Record]',
    points: 'dict[str, tuple[float, float]]',
    input_size: 'tuple[int, int] | None' = None,
) -> Figure:
    """Draw where each point of the finest map comes from, level by level.

    One column for each point, one row for each level, finest first. The
    outline encloses nine tenths of the influence. See :func:`trace`.

    Args:
        image (ndarray[H_I, W_I, 3]): see :func:`kernels_figure`.
        chain (list[Record]): the same.
        points (dict[str, tuple[float, float]]): the same.
        input_size (tuple[int, int], optional): the same.
    """
    input_size = input_size or image.shape[:2]
    strides = [
        stride_of(input_size, record.before.shape[2:]) for record in chain
    ]
    fine = strides[0] / chain[0].scale_factor
    height, width = chain[0].after.shape[2:]
    aspect = image.shape[0] / image.shape[1]
    columns = max(3, len(points))
    cell = (WIDTH - 0.55) / columns * aspect + 0.24
    figure, top = _figure(
        cell * len(chain),
        f'Where a pixel of the finest map comes from: {list_of(chain[0])}',
        f'Orange strokes point at the pixel, which covers {fine:g} × '
        f'{fine:g} pixels of the image. Only the upsamplers count.\n'
        'Heat: what a pixel of the level adds to it. Outline: the fewest '
        'pixels that add nine tenths of the sum.\n'
        'The sum is less than 100% where kernels reach beyond the border.'
        f'{_cropped(image, strides)}',
        head=0.25,
        foot=0.75,
    )
    grid = figure.add_gridspec(
        len(chain),
        columns,
        **_margins(figure, top, left=0.45),
        wspace=0.06,
        hspace=0.16,
    )
    mesh = None
    for c, (name, point) in enumerate(points.items()):
        row = min(int(point[1] // fine), height - 1)
        column = min(int(point[0] // fine), width - 1)
        maps = trace(chain, row, column)
        for r, (record, influence) in enumerate(zip(chain, maps)):
            axis = figure.add_subplot(grid[r, c])
            _show_image(axis, image)
            pixel = (column + 0.5) * fine, (row + 0.5) * fine, fine
            _zoom(axis, image, pixel, strides[r])
            shown = influence.float().cpu().numpy()
            most = max(shown.max(), 1e-12)
            mesh = _heat(
                axis, shown / most, (0, 0, strides[r]), Normalize(0, 1)
            )
            _outline(axis, shown, strides[r])
            _point_at(axis, *pixel)
            axis.set_xlabel(
                f'sum {_percent(shown.sum())}, largest {_percent(most)}',
                fontsize=SMALL,
                labelpad=2,
            )
            if c == 0:
                axis.set_ylabel(
                    f'pixels of {strides[r]} × {strides[r]}\n'
                    f'before {number_of(record.name)}',
                    fontsize=SMALL,
                )
            if r == 0:
                axis.set_title(name, fontsize=MEDIUM)
    _color_bar(
        figure, mesh, 'share of the largest in the same picture', percent=True
    )
    return figure


def _outline(axis, influence, stride):
    """Around the fewest pixels that hold nine tenths of the influence."""
    flat = np.sort(np.clip(influence, 0, None).ravel())[::-1]
    if flat.sum() <= 0:
        return
    needed = np.searchsorted(flat.cumsum(), 0.9 * flat.sum())
    inside = influence >= flat[min(needed, len(flat) - 1)]
    inside = np.pad(inside, 1)
    lines = []
    for i, j in zip(*np.nonzero(inside[1:] != inside[:-1])):
        lines.append([(j - 1, i), (j, i)])
    for i, j in zip(*np.nonzero(inside[:, 1:] != inside[:, :-1])):
        lines.append([(j, i - 1), (j, i)])
    for color, line in (('white', 2.2), (LINE, 0.9)):
        for ends in lines:
            x, y = np.array(ends).T * stride
            axis.plot(x, y, color=color, lw=line, solid_capstyle='round')


# Parts


def _figure(height, title, text, head, foot):
    """A figure whose panels take ``height`` inches below its headings.

    Returns:
        tuple[Figure, tuple[float, float]]: the figure, and how many inches
        are above and below the panels.
    """
    lines = text.count('\n') + 1
    above = 0.36 + 0.17 * lines + head
    figure = Figure(figsize=(WIDTH, height + above + foot), dpi=DPI)
    FigureCanvasAgg(figure)
    total = figure.get_figheight()
    figure.text(
        0.012, 1 - 0.1 / total, title, va='top', size=LARGE, weight='bold'
    )
    figure.text(0.012, 1 - 0.33 / total, text, va='top', size=MEDIUM)
    return figure, (above, foot)


def _margins(figure, above_and_below, left=0.1, right=0.1):
    """For a gridspec, from inches."""
    above, below = above_and_below
    width, height = figure.get_size_inches()
    return dict(
        left=left / width,
        right=1 - right / width,
        top=1 - above / height,
        bottom=below / height,
    )


def heading(record: Record, input_size: 'tuple[int, int]') -> str:
    """Two lines: the sizes of a module's pixels, and its class and number."""
    coarse = stride_of(input_size, record.before.shape[2:])
    fine = coarse // record.scale_factor
    return (
        f'{coarse} × {coarse} → {fine} × {fine} pixels\n'
        f'{record.kind}, {number_of(record.name)}'
    )


def list_of(record: Record) -> str:
    """The dotted name that a module has in common with others of its list."""
    return re.sub(r'(\.\d+)+$', '', record.name) or 'the model'


def number_of(name: str) -> str:
    """What tells a module apart from others in its list."""
    found = re.search(r'\d+(\.\d+)*$', name)
    return f'module {found[0]}' if found else name.split('.')[-1]


def _percent(share):
    if 0 < share < 0.001:
        return '< 0.1%'
    return f'{share:.0%}' if share >= 0.01 or share == 0 else f'{share:.1%}'


def _extent(shown, stride):
    height, width = shown.shape[:2]
    return (0, width * stride, height * stride, 0)


def _frame(axis, image):
    """Limit to the image: maps may reach beyond it, into the padding."""
    height, width = image.shape[:2]
    axis.set(
        xlim=(0, width),
        ylim=(height, 0),
        xticks=[],
        yticks=[],
        aspect='equal',
    )


def _show_image(axis, image, pale=True):
    """In grey and pale, so that heat stands out; or in its colours."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(grey, (1, 99))  # dark images are seen, too
    span = max(high - low, 1e-6)
    if pale:
        image = 0.35 + 0.65 * np.repeat((grey[..., None] - low) / span, 3, 2)
    else:
        image = brightened(image)
    image = image.clip(0, 1)
    axis.imshow(image, extent=_extent(image, 1), interpolation='nearest')
    _frame(axis, image)


def _cropped(image, strides):
    """A sentence, if :func:`_zoom` does anything."""
    if max(image.shape) <= MOST * min(strides):
        return ''
    return ' Fine maps are shown closer.'


def _zoom(axis, image, pixel, stride):
    """Show no more of a large image than MOST pixels of the map."""
    height, width = image.shape[:2]
    share = min(1, MOST * stride / max(height, width))
    limits = []
    for at, length in zip(pixel, (width, height)):
        start = min(max(at - share * length / 2, 0), (1 - share) * length)
        limits.append((start, start + share * length))
    axis.set(xlim=limits[0], ylim=limits[1][::-1])


def brightened(image: np.ndarray) -> np.ndarray:
    """Up to 1, so that dark images are seen, too."""
    return (image / max(np.percentile(image, 99.5), 1e-6)).clip(0, 1)


def _show_map(axis, image, values, stride, cmap, low, high):
    mesh = axis.imshow(
        values.float().cpu().numpy(),
        cmap=cmap,
        vmin=low,
        vmax=high,
        extent=_extent(values, stride),
        interpolation='nearest',
    )
    _frame(axis, image)
    return mesh


def _heat(axis, values, place, norm):
    """Lay values over the image, the small ones transparent."""
    left, top, stride = place
    height, width = values.shape
    limits = axis.get_xlim(), axis.get_ylim()
    mesh = axis.imshow(
        values,
        cmap=HEAT,
        norm=norm,
        alpha=0.85 * np.clip(norm(values), 0, 1) ** 0.7,
        extent=(left, left + width * stride, top + height * stride, top),
        interpolation='nearest',
    )
    axis.set(xlim=limits[0], ylim=limits[1])
    return mesh


def _point_at(axis, x, y, size):
    """Four strokes towards a pixel, whose surroundings stay in sight.

    Args:
        axis (Axes): of the image, with its limits.
        x (float): of the pixel's centre.
        y (float): the same.
        size (float): of the pixel.
    """
    side = max(abs(b - a) for a, b in (axis.get_xlim(), axis.get_ylim()))
    near = size / 2 + side / 25
    far = near + side / 25
    for color, line in (('white', 3.2), (POINT, 1.8)):
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            axis.plot(
                [x + near * dx, x + far * dx],
                [y + near * dy, y + far * dy],
                color=color,
                lw=line,
                solid_capstyle='butt',
                gid='point',
            )


def _cross(axis, x, y):
    for color, line in (('white', 2.6), (POINT, 1.4)):
        axis.plot(x, y, 'x', color=color, ms=6, mew=line, clip_on=False)


def _color_bar(figure, mesh, text, percent=False):
    width, height = figure.get_size_inches()
    axis = figure.add_axes([0.3, 0.46 / height, 0.4, 0.1 / height])
    _bar(figure, mesh, axis, text, 'horizontal', percent)


def _side_bar(figure, place, mesh, text):
    _bar(figure, mesh, figure.add_subplot(place), text, 'vertical', False)


def _bar(figure, mesh, axis, text, orientation, percent):
    # not of the mesh itself, whose transparency the bar would inherit
    bar = figure.colorbar(
        ScalarMappable(mesh.norm, mesh.cmap),
        cax=axis,
        orientation=orientation,
        format=PercentFormatter(1, decimals=0) if percent else None,
    )
    if percent and isinstance(mesh.norm, PowerNorm):
        bar.set_ticks(
            [
                t
                for t in (0, 0.01, 0.04, 0.1, 0.25, 0.5, 1)
                if t <= mesh.norm.vmax
            ]
        )
        bar.ax.minorticks_off()
    bar.set_label(text, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_linewidth(0.5)


def to_image(pixels: Tensor) -> np.ndarray:
    """From ``[3, H, W]`` in any range of 8 bits to what figures take."""
    return (pixels.permute(1, 2, 0).float() / 255).clamp(0, 1).cpu().numpy()
