r"""Draw what a trained model's upsamplers do to one image.

For each list of upsamplers that leads from a coarse map to the finest
(``neck.upsample_modules`` of a detector; those of FPN and of FUSE in a
``CARAFEUPerHead``) it writes four pictures:

- ``LIST_kernels.png``: the pixels that chosen points are made of;
- ``LIST_spread_and_shift.png``: how even the kernels are over the image, and
  where their centres of mass lie;
- ``LIST_features.png``: features upsampled by nearest, bilinearly and by the
  model, in the same colours;
- ``LIST_trace.png``: where a point of the finest map comes from, at each
  coarser level.

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
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, init_default_scope

from mmcarafe.upsamplers import CARAFE, SAPA, DySample, FreqFusion
from mmcarafe.visualization import KernelRecorder, chains

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tools, for _cli
import _checkpoints  # noqa: E402
import _cli  # noqa: E402
from _cli import CFG_OPTIONS, fail, say, some  # noqa: E402

MOST = 6  # points, for which a picture has room
KINDS = (CARAFE, SAPA, FreqFusion, DySample)
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


def read_image(path):
    """``ndarray[H, W, 3]``, in OpenCV's order of colours."""
    if not osp.isfile(path):
        fail(f'image: there is no file {path}')
    image = (
        cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
        if (osp.getsize(path))
        else None
    )
    if image is None:
        fail(f'image: expected an image, {path} is none that OpenCV can read')
    return image


def read_points(words, image):
    """The points of ``--points``, or None without."""
    if words is None:
        return None
    height, width = image.shape[:2]
    if len(words) > MOST:
        fail(f'--points: expected at most {MOST} points, got {len(words)}')
    points = {}
    for word in words:
        try:
            x, y = map(float, word.split(','))
        except ValueError:
            fail(f'--points: expected X,Y such as 40,25, got {word}')
        if not (0 <= x < width and 0 <= y < height):
            fail(
                f'--points: expected X from 0 to {width - 1} and Y from 0 to '
                f'{height - 1}, inside the image, got {word}'
            )
        points[f'({x:g}, {y:g})'] = (x + 0.5, y + 0.5)  # their centres
    return points


def build(cfg, args):
    """The model, with the weights of the checkpoint."""
    model = _cli.build_model(cfg)
    if not any(isinstance(module, KINDS) for module in model.modules()):
        names = ', '.join(f'mmcarafe.{kind.__name__}' for kind in KINDS)
        fail(
            f'config {args.config}: its model has no upsampler with kernels, '
            f'expected one of {names}'
        )
    checkpoint = _checkpoints.load(args.checkpoint)
    _checkpoints.check_weights(model, args.checkpoint, checkpoint)
    test_cfg = getattr(model, 'test_cfg', None) or {}
    if test_cfg.get('mode') == 'slide':
        say(
            'the config tests by a sliding window; here the whole image is one'
        )
        test_cfg.mode = 'whole'
    return model.eval()


def prepare(cfg, image):
    """Run the test pipeline.

    Returns:
        dict: what a model's ``test_step`` takes.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if not dataset.get('pipeline'):
        fail('config: test_dataloader.dataset has no pipeline')
    steps = [
        step
        for step in dataset.pipeline
        if 'Annotations' not in str(step.get('type'))
    ]
    load = dict(type=f'{cfg.default_scope}.LoadImageFromNDArray')
    with _cli.user_errors('test_dataloader.dataset.pipeline'):
        pipeline = Compose(
            [TRANSFORMS.build(step) for step in (load, *steps[1:])]
        )
        data = pipeline(dict(img=image, img_id=0))
    return {key: [value] for key, value in data.items()}


# Points, in pixels of the image file


def choose_points(image, sample):
    """Where kernels should differ, and a sentence that says how it was chosen.

    Args:
        image (ndarray[H, W, 3]): the image.
        sample (DataSample): the model's prediction.
    """
    height, width = image.shape[:2]
    edges = _edges(image)
    border, found = {}, _found(sample)
    if found is None:
        points = {
            f'strong edge {i + 1}': point
            for i, point in enumerate(_strongest(edges, 3))
        }
        how = (
            'the model finds no object in the image, so the points are on its '
            'strongest edges'
        )
        border['at the border'] = (0.5, height / 2)
    else:
        (left, top, right, bottom), mask, what = found
        if mask is None:
            x, y = (left + right) / 2, (top + bottom) / 2
            to = right - x, bottom - y
            edge = _on_ray(edges, (x, y), (to[0], 0))
            corner = _corner(image, found[0])
        else:
            (x, y), edge, corner = _of_mask(mask)
        points = {
            'inside an object': (x, y),
            'on its edge': edge,
            'at its corner': corner,
        }
        how = f'the points belong to {what}, which the model finds'
        border['at the border'] = (0.5, min(max(y, 0.5), height - 0.5))
    limits = width - 0.5, height - 0.5
    points = {
        name: tuple(
            float(min(max(value, 0.5), limit))
            for value, limit in zip(point, limits)
        )
        for name, point in {**points, **border}.items()
    }
    return points, how


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


def _edges(image):
    """How steep the image is, ``[H, W]``."""
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1)
    right, down = (
        cv2.Sobel(smooth, cv2.CV_32F, *order) for order in ((1, 0), (0, 1))
    )
    return np.hypot(right, down).sum(2)


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


def _strongest(edges, number):
    """The steepest places, each a sixth of the image away from the others."""
    edges = edges.copy()
    reach = math.ceil(max(edges.shape) / 6)
    points = []
    for _ in range(number):
        y, x = np.unravel_index(edges.argmax(), edges.shape)
        points.append((x + 0.5, y + 0.5))
        edges[
            max(0, y - reach) : y + reach, max(0, x - reach) : x + reach
        ] = -1
    return points


# What is drawn


def choose_chains(records):
    """Those that are drawn: they see the whole image, and end finest.

    Args:
        records (list[Record]): of one image.
    """
    found = {
        name: chain
        for name, chain in chains(records).items()
        # which work on regions of the image, maybe on a single one
        if not name.startswith('roi_head.') and len(chain[0].before) == 1
    }
    sizes = {
        name: chain[0].after.shape[2:].numel() for name, chain in found.items()
    }
    finest = max(sizes.values(), default=0)
    return {
        name: chain for name, chain in found.items() if sizes[name] == finest
    }


def draw(image, chain, points, input_size):
    """Yield the end of each file's name, and the figure.

    A figure that the chain does not allow for is left out, and said so.
    """
    from mmcarafe.visualization import figures

    yield (
        'kernels',
        figures.kernels_figure(image, chain, points, input_size),
    )
    yield (
        'spread_and_shift',
        figures.statistics_figure(image, chain, input_size),
    )
    try:
        features = figures.features_figure(image, chain, input_size)
    except ValueError as error:
        say(f'no picture of features: {error}')
    else:
        yield 'features', features
    yield 'trace', figures.trace_figure(image, chain, points, input_size)


def main():
    args = parse_args()
    if find_spec('matplotlib') is None:
        fail('the pictures need matplotlib: pip install matplotlib')
    cfg = _cli.read_config(args, 'model', 'default_scope', 'test_dataloader')
    name = osp.splitext(osp.basename(args.config))[0]
    out = Path(args.out or osp.join('work_dirs', name, 'kernels'))
    if out.exists() and not out.is_dir():
        fail(f'--out: expected a folder, {out} is a file')
    image = read_image(args.image)
    points = read_points(args.points, image)
    init_default_scope(cfg.default_scope)
    model = build(cfg, args)
    data = model.data_preprocessor(prepare(cfg, image), False)
    (pixels,) = data['inputs']
    with KernelRecorder(model) as recorder, torch.no_grad():
        (sample,) = model(**data, mode='predict')
    drawn = choose_chains(recorder.records)
    if not drawn:
        fail(
            'the model has upsamplers with kernels, but ran none of them on '
            'the whole image'
        )
    if points is None:
        points, how = choose_points(image, sample)
        say(how)

    # as the model gets it, at its size
    height, width = sample.img_shape[:2]
    shown = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)[
        ..., ::-1
    ]
    shown = shown.astype(np.float32) / 255
    scale = width / image.shape[1], height / image.shape[0]
    places = {
        label: (x * scale[0], y * scale[1]) for label, (x, y) in points.items()
    }
    for label, (x, y) in points.items():
        say(f'point {label}: column {math.floor(x)}, row {math.floor(y)}')
    used = [each.name for chain in drawn.values() for each in chain]
    others = [
        f'{each.name} ({each.kind})'
        for each in recorder.records
        if each.name not in used
    ]
    if others:
        say(f'not drawn: {some(others, 6)}')

    figures = {
        f'{name.replace(".", "_") or "model"}_{end}.png': figure
        for name, chain in drawn.items()
        for end, figure in draw(shown, chain, places, tuple(pixels.shape[1:]))
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, figure in figures.items():
            figure.savefig(out / file)
            say(f'wrote {out / file}')
    except OSError as error:
        fail(f'--out: cannot write into {out}: {error.strerror}')


if __name__ == '__main__':
    main()
