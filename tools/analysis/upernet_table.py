"""Parameters and FLOPs of UPerNet with CARAFE in PPM, FPN and FUSE.

Prints the table of the README, one row for each of the eight combinations.
Nothing is loaded or run: the model is built on PyTorch's meta device.

What is counted: convolutions, matrix products and CARAFE's reassembly, a
multiply-add as 2 FLOPs, for one image, in the backbone and the decode head.
The auxiliary head, which only training uses, is left out, and so are biases,
normalisation, activations, softmax and bilinear resizing.

Usage::

    python tools/analysis/upernet_table.py
"""

import argparse
import math
import warnings
from itertools import product
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import mmcarafe.ops  # noqa: F401  (registers the operator counted here)

CONFIG = (
    Path(__file__).parents[2]
    / 'configs/upernet/upernet-carafe_r50_4xb4-80k_ade20k-512x512.py'
)
PLACES = ('ppm', 'fpn', 'fuse')


@register_flop_formula(torch.ops.mmcarafe.carafe)
def reassembly(features, weights, normalizer, out_shape=None, **kwargs):
    """K*K multiply-adds for each value of the output."""
    return 2 * weights[2] * math.prod(out_shape)  # [N, G, K*K, S, S, H, W]


def count(cfg, size):
    """Build a segmentor from its config and count.

    Args:
        cfg (dict): the config's ``model``.
        size (tuple[int, int]): height and width of the image.

    Returns:
        tuple[int, int]: parameters and FLOPs.
    """
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmseg's, about its own losses
        model = MODELS.build({**cfg, 'auxiliary_head': None}).eval()
        image = torch.empty(1, 3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops()


def table(cfg, size):
    """The rows of a Markdown table."""
    yield '| PPM | FPN | FUSE | parameters | FLOPs |'
    yield '|:-:|:-:|:-:|-:|-:|'
    for combination in product((False, True), repeat=len(PLACES)):
        for place, on in zip(PLACES, combination):
            key = f'{place}_upsample_cfg'
            cfg.decode_head[key] = dict(type='mmcarafe.CARAFE') if on else None
        parameters, flops = count(cfg, size)
        marks = ' | '.join('✓' if on else ' ' for on in combination)
        yield f'| {marks} | {parameters / 1e6:.2f} M | {flops / 1e9:.1f} G |'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', nargs='?', default=CONFIG)
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        default=(512, 512),
        metavar=('H', 'W'),
        help='height and width of the image (default: 512 512)',
    )
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    head = cfg.model.get('decode_head', {}).get('type')
    if head != 'mmcarafe.CARAFEUPerHead':
        parser.error(
            f'decode_head.type is {head}, expected mmcarafe.CARAFEUPerHead'
        )
    init_default_scope(cfg.default_scope)
    cfg.model.pretrained = None
    for row in table(cfg.model, args.shape):
        print(row)


if __name__ == '__main__':
    main()
