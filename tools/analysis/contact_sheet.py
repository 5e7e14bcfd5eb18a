r"""Show on one page what a trained model makes of a few test images.

A row for each image, evenly chosen from the test set: truth, prediction,
errors, and, if the model has upsamplers with kernels, the kernels that serve a
point on an object's edge, at each level of the first list of upsamplers.

Usage::

    python tools/analysis/contact_sheet.py CONFIG CHECKPOINT \
        [--images N] [--out FILE] [--data-root DIR] \
        [--cfg-options KEY=VALUE ...]
"""

import argparse
import os.path as osp
import sys
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from PIL import Image, ImageDraw
from visualize_kernels import choose_points

from mmcarafe.visualization.comparison import (
    GAP,
    INK,
    MAP_ERRORS,
    MARGIN,
    OBJECT_ERRORS,
    PAGE,
    SMALL,
    Classes,
    Key,
    Panel,
    compose,
    letters,
    map_panels,
    object_panels,
    resize,
)
from mmcarafe.visualization.figures import HEAT, POINT, window_at
from mmcarafe.visualization.pictures import finest_chains, look, read_image

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tools, for _cli
import _checkpoints  # noqa: E402
import _cli  # noqa: E402
import _data  # noqa: E402
from _cli import CFG_OPTIONS, DATA_ROOT, fail, say  # noqa: E402
from _pictures import map_of, objects_of  # noqa: E402

SCALE = 2  # sharp where a page shows it 880 pixels wide
LABELS = 1.5  # smaller letters than elsewhere: panels are small, too
SHARE = 0.11  # of a row's width, for the enlarged kernels


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file, of mmdet or of mmseg')
    parser.add_argument('checkpoint', help='file or URL')
    parser.add_argument(
        '--images', type=int, default=4, help='how many (default: 4)'
    )
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='the picture (default: work_dirs/CONFIG/contact_sheet.png)',
    )
    parser.add_argument('--data-root', **DATA_ROOT)
    parser.add_argument('--cfg-options', **CFG_OPTIONS)
    return parser.parse_args()


def row(model, dataset, index, score_thr):
    """The panels of an image, the classes in it, and how it is called.

    Returns:
        tuple[list[Panel], list[Key]]
    """
    data = pseudo_collate([dataset[index]])
    image = read_image(data['data_samples'][0].img_path)
    seen = look(model, data, image)
    sample = seen.sample
    chain = next(iter(finest_chains(seen.drawn).values()), None)

    height, width = image.shape[:2]
    room = PAGE - 2 * MARGIN - (4 if chain else 2) * GAP
    wide = room * (1 - SHARE) / 4 if chain else room / 3
    size = int(wide * SCALE), max(8, int(wide * SCALE * height / width))
    kinds = Classes(
        dataset.metainfo.get('classes'), dataset.metainfo.get('palette')
    )
    shown = image[..., ::-1].copy()
    if 'pred_panoptic_seg' in sample:
        fail('config: expected boxes, masks or semantic maps, got panoptic')
    if 'pred_instances' in sample:
        panels, legend = object_panels(
            shown,
            objects_of(sample.pred_instances),
            objects_of(sample.get('gt_instances')),
            kinds,
            score_thr,
            objects_of(sample.get('ignored_instances')),
            size,
            LABELS,
        )
    else:
        panels, legend = map_panels(
            shown,
            map_of(sample.pred_sem_seg),
            map_of(sample.get('gt_sem_seg')),
            kinds,
            size,
            LABELS,
        )
    if chain:
        points, _ = choose_points(image, sample)
        point = points.get('on its edge', next(iter(points.values())))
        panels += kernel_panels(shown, chain, point, seen, size)
    return panels, dict(legend)['Classes']


def kernel_panels(image, chain, point, seen, size):
    """The windows of a point in the image, and the kernels, coarsest first."""
    at = np.array(point) * seen.scale
    windows = [
        window_at(record, at, seen.input_size) for record in chain[::-1]
    ]
    where = Image.fromarray(resize(image, size))
    draw = ImageDraw.Draw(where)
    enlarge = size[0] / seen.image.shape[1]
    for window in windows:
        k, stride = window['kernel_size'], window['stride'] * enlarge
        top, left = (stride * (each - k // 2) for each in window['center'])
        place = np.array([left, top, left + k * stride, top + k * stride])
        for color, out, wide in (('white', 2, 8), (INK, 0, 4)):
            draw.rectangle(
                tuple(place + [-out, -out, out, out]),
                outline=color,
                width=wide,
            )
    x, y = at * enlarge
    for color, wide in (('white', 9), (POINT, 5)):
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), outline=color, width=wide)
    room = int((PAGE - 2 * MARGIN - 4 * GAP) * SHARE * SCALE)
    return [
        Panel('Image, point, windows', np.asarray(where)),
        Panel('Kernels', _tiles(windows, room, size[1])),
    ]


def _tiles(windows, width, height):
    """Kernels below each other, each with the size of its pixels."""
    page = Image.new('RGB', (width, height), 'white')
    draw = ImageDraw.Draw(page)
    font = letters(SMALL * SCALE)
    step = height // len(windows)
    text = round(1.3 * SMALL * SCALE)
    side = max(8, min(width, step - text))
    for i, window in enumerate(windows):
        y = i * step
        if 'weights' in window:
            weights = window['weights']
            # from zero to the largest, as in the picture of kernels
            heat = PowerNorm(0.5, 0, max(weights.max(), 1e-9))(weights)
            tile = matplotlib.colormaps[HEAT](heat.clip(0, 1))[..., :3]
            tile = (255 * tile).astype(np.uint8)
            tile = resize(tile, (side, side), cv2.INTER_NEAREST)
            page.paste(Image.fromarray(tile), (0, y))
            caption = f'largest {weights.max():.0%}'
        else:
            draw.rectangle((0, y, side, y + side), fill='#dddddd')
            k = window['kernel_size']
            corner = np.array(window['center']) - k // 2
            for r, c in (window['positions'] - corner) * side / k:
                place = (c - 5, y + r - 5, c + 5, y + r + 5)
                draw.ellipse(place, fill=POINT, outline='white')
            caption = ''
        draw.text(
            (0, y + side + text / 2), caption, INK, font=font, anchor='lm'
        )
    return np.asarray(page)


def main():
    args = parse_args()
    if args.images < 1:
        fail(f'--images: expected at least 1, got {args.images}')
    cfg = _cli.read_config(args, 'model', 'default_scope', 'test_dataloader')
    name = osp.splitext(osp.basename(args.config))[0]
    out = Path(args.out or osp.join('work_dirs', name, 'contact_sheet.png'))
    if out.suffix not in ('.png', '.jpg'):
        fail(f'--out: expected a .png or .jpg file, got {out}')
    if args.data_root is not None:
        _cli.move_data_root(cfg, args.data_root)
    cfg.test_evaluator = None  # nothing is measured, so its files need not be
    _data.check_data(cfg, 'test')
    init_default_scope(cfg.default_scope)
    model = _cli.build_model(cfg)
    checkpoint = _checkpoints.load(args.checkpoint)
    _checkpoints.check_weights(model, args.checkpoint, checkpoint)
    model.eval()
    dataset = _data.build_dataset(cfg, 'test')

    hook = cfg.get('default_hooks', {}).get('visualization') or {}
    number = min(args.images, len(dataset))
    rows, classes, kinds = [], {}, set()
    for i in range(number):  # from the middle of equal parts
        index = (2 * i + 1) * len(dataset) // (2 * number)
        with _data.data_errors():
            panels, keys = row(
                model, dataset, index, hook.get('score_thr', 0.3)
            )
        rows.append(panels)
        classes.update((key.text, key) for key in keys)
        kinds.add(len(panels))
    errors = OBJECT_ERRORS if cfg.default_scope == 'mmdet' else MAP_ERRORS
    legend = [('Classes', [*classes.values()]), ('Errors', errors[:4])]
    if max(kinds) > 3:
        lines = (
            'how the pixels of each window are weighted to make the point',
            'in the ring, which is on an edge. The widest window, in the '
            'coarsest map, is above.',
        )
        legend.append(('Kernels', [Key(line, INK, '') for line in lines]))
    title = f'{name}: {len(rows)} of {len(dataset)} test images'
    picture = compose(title, rows, legend, SCALE)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(out)
    except OSError as error:
        fail(f'--out: cannot write {out}: {error.strerror}')
    say(f'wrote {out}')


if __name__ == '__main__':
    main()
