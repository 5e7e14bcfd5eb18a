"""Parameters of each upsampler, and its FLOPs for one source pixel.

Prints the README's table for ×2. A multiply-add is 2 FLOPs. The paper counts
the biases of CARAFE, as multiply-adds, but not of the others, so both counts
are shown. The dynamic filter predicts a K×K reassembly kernel for each
channel: it is CARAFE with as many groups as channels.

Usage::

    python tools/analysis/upsampler_table.py [--channels C]
"""

import argparse
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmcarafe.upsamplers import COMPARED, build_upsampler


def count(module, channels):
    """Parameters, and FLOPs per source pixel without and with the biases."""
    biases = 0

    def add_biases(conv, inputs, out):
        nonlocal biases
        if conv.bias is not None:
            biases += 2 * out.numel()

    for conv in module.modules():
        if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
            conv.register_forward_hook(add_biases)
    height, width = 8, 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(1, channels, height, width, device='meta'))
    flops = counter.get_total_flops()
    return (
        sum(p.numel() for p in module.parameters()),
        flops // (height * width),
        (flops + biases) // (height * width),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--channels', type=int, default=256, help='C (default: 256)'
    )
    args = parser.parse_args()
    if args.channels < 1:
        sys.exit(f'error: --channels is {args.channels}, expected an int >= 1')
    print('| upsampler | parameters | FLOPs | with biases |')
    print('|---|-:|-:|-:|')
    for name, cfg in COMPARED.items():
        with torch.device('meta'):
            module = build_upsampler(cfg, args.channels)
        numbers = count(module, args.channels)
        print(f'| {name} |', ' | '.join(f'{n:,}' for n in numbers), '|')


if __name__ == '__main__':
    main()
