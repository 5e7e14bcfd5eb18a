"""Parameters and FLOPs of UPerNet with CARAFE in PPM, FPN and FUSE.

Prints the table of docs/upernet.md, a row for each of the eight combinations.
No weights are loaded: the model is built and run on PyTorch's meta device.

get_flops.py says what is counted.

Usage::

    python tools/analysis/upernet_table.py
"""

from itertools import product
from pathlib import Path

import torch
from get_flops import build, count, fail, parse_args

CONFIG = (
    Path(__file__).parents[2]
    / 'configs/upernet/upernet-carafe_r50_4xb4-80k_ade20k-512x512.py'
)
PLACES = ('ppm', 'fpn', 'fuse')


def table(cfg, size):
    """The rows of a Markdown table."""
    yield '| PPM | FPN | FUSE | parameters | FLOPs |'
    yield '|:-:|:-:|:-:|-:|-:|'
    for combination in product((False, True), repeat=len(PLACES)):
        for place, on in zip(PLACES, combination):
            key = f'{place}_upsample_cfg'
            cfg.decode_head[key] = dict(type='mmcarafe.CARAFE') if on else None
        with torch.device('meta'):
            model = build(cfg)
        parameters, flops = count(model, size)
        marks = ' | '.join('✓' if on else ' ' for on in combination)
        yield f'| {marks} | {parameters / 1e6:.2f} M | {flops / 1e9:.1f} G |'


def main():
    cfg, shape = parse_args(__doc__.splitlines()[0], CONFIG)
    head = cfg.model.get('decode_head', {}).get('type')
    if head != 'mmcarafe.CARAFEUPerHead':
        fail(f'decode_head.type is {head}, expected mmcarafe.CARAFEUPerHead')
    cfg.model.pretrained = None
    print(*table(cfg.model, shape), sep='\n')


if __name__ == '__main__':
    main()
