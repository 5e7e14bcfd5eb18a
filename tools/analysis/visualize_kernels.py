r"""Draw what a trained model's upsamplers do to one image.

For each list of upsamplers that leads from a coarse map to the finest
(``neck.upsample_modules`` of a detector; those of FPN and of FUSE in a
``CARAFEUPerHead``) it writes four pictures, and one page for all of them:

- ``LIST_kernels.png``: the pixels that chosen points are made of;
- ``LIST_spread_and_shift.png``: how even the kernels are over the image, and
  where their centres of mass lie;
- ``LIST_features.png``: features upsampled by nearest, bilinearly and by the
  model, in the same colours (if it keeps the number of channels);
- ``LIST_trace.png``: where a point of the finest map comes from, at each
  coarser level;
- ``kernels.html``: a page that shows the kernels of the pixel that a reader
  clicks. It holds all that it needs, and needs no network.

Usage::

    python tools/analysis/visualize_kernels.py CONFIG CHECKPOINT IMAGE \
        [--points X,Y ...] [--out DIR] [--cfg-options KEY=VALUE ...]

Points are in pixels of the image file, from its upper left corner. By default
they are inside an object, on its edge, at its corner, and at the border of the
image; the object is one that the model finds.
"""

import argparse
import math
import os.path as osp
import sys
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from mmengine.registry import init_default_scope

from mmcarafe.visualization.page import kernels_page
from mmcarafe.visualization.pictures import (
    EXPECTED,
    draw,
    edge_points,
    finest_chains,
    has_kernels,
    look,
    name_points,
    prepare,
    read_image,
    steepness,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tools, for _cli
import _checkpoints  # noqa: E402
import _cli  # noqa: E402
from _cli import CFG_OPTIONS, fail, say, some  # noqa: E402

SCORE = 0.3  # of a detection that counts as found


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file, of mmdet or of mmseg')
    parser.add_argument('checkpoint', help='file or URL')
    parser.add_argument('image', help='image file')
    parser.add_argument(
        '--points',
        nargs='+',
        metavar='X,Y',
        help='column and row in the image, in pixels (default: inside an '
        'object, on its edge, at its corner, and at the border)',
    )
    parser.add_argument(
        '--out',
        metavar='DIR',
        help='folder for the pictures (default: work_dirs/CONFIG/kernels)',
    )
    parser.add_argument('--cfg-options', **CFG_OPTIONS)
    return parser.parse_args()


def read_points(words, image):
    """The points of ``--points``, or None without."""
    if words is None:
        return None
    pixels = []
    for word in words:
        try:
            x, y = map(float, word.split(','))
        except ValueError:
            fail(f'--points: expected X,Y such as 40,25, got {word}')
        pixels.append((x, y))
    with value_errors('--'):
        return name_points(pixels, image)


@contextmanager
def value_errors(prefix=''):
    """Report in one line what the package raised, naming the argument."""
    try:
        yield
    except ValueError as error:
        fail(f'{prefix}{error}')


def build(cfg, args):
    """The model, with the weights of the checkpoint."""
    model = _cli.build_model(cfg)
    if not has_kernels(model):
        fail(f'config {args.config}: its model has {EXPECTED}')
    checkpoint = _checkpoints.load(args.checkpoint)
    _checkpoints.check_weights(model, args.checkpoint, checkpoint)
    test_cfg = getattr(model, 'test_cfg', None) or {}
    if test_cfg.get('mode') == 'slide':
        say(
            'the config tests by a sliding window; here the whole image is one'
        )
    return model.eval()


# Points, in pixels of the image file


def choose_points(image, sample):
    """Where kernels should differ, and a sentence that says how it was chosen.

    Args:
        image (ndarray[H, W, 3]): the image.
        sample (DataSample): the model's prediction.
    """
    found = _found(sample)
    if found is None:
        how = (
            'the model finds no object in the image, so the points are on its '
            'strongest edges'
        )
        return edge_points(image), how
    (left, top, right, bottom), mask, what = found
    if mask is None:
        x, y = (left + right) / 2, (top + bottom) / 2
        edge = _on_ray(steepness(image), (x, y), (right - x, 0))
        corner = _corner(image, found[0])
    else:
        (x, y), edge, corner = _of_mask(mask)
    points = {
        'inside an object': (x, y),
        'on its edge': edge,
        'at its corner': corner,
        'at the border': (0.5, y),
    }
    height, width = image.shape[:2]
    points = {
        name: tuple(
            float(min(max(value, 0.5), length - 0.5))
            for value, length in zip(point, (width, height))
        )
        for name, point in points.items()
    }
    return points, f'the points belong to {what}, which the model finds'


def _found(sample):
    """Box, mask or None, and description of what the model is surest of."""
    if 'pred_sem_seg' in sample:
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        values, counts = np.unique(labels, return_counts=True)
        background = values[counts.argmax()]
        number, parts, stats, _ = cv2.connectedComponentsWithStats(
            (labels != background).astype(np.uint8)
        )
        if number < 2:
            return None
        # The largest that is not cut off by the border, if there is one.
        x, y, w, h, area = stats[1:].T
        whole = (x > 0) & (y > 0)
        whole &= (x + w < labels.shape[1]) & (y + h < labels.shape[0])
        best = 1 + int((area + area.sum() * whole).argmax())
        mask = parts == best
        area = int(stats[best, 4])
        return stats[best, :4], mask, f'a region of {area} pixels'
    found = sample.pred_instances
    found = found[found.scores >= SCORE]
    if len(found) == 0:
        return None
    best = int(found.scores.argmax())
    box = found.bboxes[best].tolist()
    mask = None
    if 'masks' in found and found.masks[best].any():
        mask = np.asarray(found.masks[best].cpu()).astype(bool)
    return box, mask, f'an object of score {found.scores[best].item():.2f}'


def _of_mask(mask):
    """Points inside, on the edge and farthest out, of ``bool[H, W]``."""
    padded = np.pad(mask.astype(np.uint8), 1)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    rows, columns = np.nonzero(mask & (depth <= 1.5))
    away = np.hypot(rows - y, columns - x)
    near, far = away.argmin(), away.argmax()
    return [
        (c + 0.5, r + 0.5)
        for c, r in (
            (x, y),
            (columns[near], rows[near]),
            (columns[far], rows[far]),
        )
    ]


def _on_ray(edges, start, to):
    """The steepest place between half the way and a little beyond all of it.

    An object's box only says about where its edge is.
    """
    shares = np.linspace(0.5, 1.1, 61)
    x = np.clip(start[0] + shares * to[0], 0, edges.shape[1] - 1)
    y = np.clip(start[1] + shares * to[1], 0, edges.shape[0] - 1)
    best = edges[y.astype(int), x.astype(int)].argmax()
    return int(x[best]) + 0.5, int(y[best]) + 0.5


def _corner(image, box):
    """The sharpest corner in a box, but for its middle."""
    left, top, right, bottom = box
    allowed = np.zeros(image.shape[:2], np.uint8)
    for share, value in ((1.1, 255), (0.5, 0)):
        x, y = ((a + b) / 2 for a, b in ((left, right), (top, bottom)))
        w, h = (share * (b - a) / 2 for a, b in ((left, right), (top, bottom)))
        rows, columns = (
            slice(max(0, round(at - far)), max(0, round(at + far)))
            for at, far in ((y, h), (x, w))
        )
        allowed[rows, columns] = value
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    grey = cv2.GaussianBlur(grey, (0, 0), 1)
    found = cv2.goodFeaturesToTrack(grey, 1, 0.01, 1, mask=allowed)
    if found is None:  # all of it is even
        return right, bottom
    x, y = found[0, 0]
    return x + 0.5, y + 0.5


def main():
    args = parse_args()
    cfg = _cli.read_config(args, 'model', 'default_scope', 'test_dataloader')
    name = osp.splitext(osp.basename(args.config))[0]
    out = Path(args.out or osp.join('work_dirs', name, 'kernels'))
    if out.exists() and not out.is_dir():
        fail(f'--out: expected a folder, {out} is a file')
    with value_errors():
        image = read_image(args.image)
    points = read_points(args.points, image)
    init_default_scope(cfg.default_scope)
    model = build(cfg, args)
    with _cli.user_errors('test_dataloader.dataset.pipeline'):
        data = prepare(cfg, image)
    seen = look(model, data, image)
    if points is None:
        points, how = choose_points(image, seen.sample)
        say(how)
    for label, (x, y) in points.items():
        say(f'point {label}: column {math.floor(x)}, row {math.floor(y)}')
    places = seen.places(points)
    with value_errors():
        figures = draw(seen, places)
    page = kernels_page(seen.image, seen.drawn, places, seen.input_size)
    pictured = [
        each.name
        for chain in finest_chains(seen.drawn).values()
        for each in chain
    ]
    rest = [each for each in seen.drawn if each.name not in pictured]
    for what, records in (
        ('only on the page', rest),
        ('not drawn', seen.others),
    ):
        if records:
            names = [f'{each.name} ({each.kind})' for each in records]
            say(f'{what}: {some(names, 6)}')

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(out / f'{name}.png')
            say(f'wrote {out / name}.png')
        (out / 'kernels.html').write_text(page, encoding='utf-8')
        say(f'wrote {out}/kernels.html')
    except OSError as error:
        fail(f'--out: cannot write into {out}: {error.strerror}')


if __name__ == '__main__':
    main()
