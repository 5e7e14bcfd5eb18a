"""What each upsampler does and costs, and the AP that papers report with it.

Prints the table of docs/cost.md for ×2. Parameters, and FLOPs for one source
pixel, a multiply-add as 2 FLOPs. The CARAFE paper counts the biases of CARAFE,
as multiply-adds, but not of the others, so both counts are shown. The dynamic
filter predicts a K×K reassembly kernel for each channel: it is CARAFE with as
many groups as channels. The guide of an upsampler that wants one has as many
channels as the map that is upsampled; its convolutions count too.

Usage::

    python tools/analysis/upsampler_table.py [--channels C]
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmcarafe.upsamplers import COMPARED, UPSAMPLERS, build_upsampler

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for _measure
from _measure import fail, find_inputs  # noqa: E402


def count(cfg, channels, scale_factor=2):
    """Count what an upsampler costs, on PyTorch's meta device.

    Args:
        cfg (dict): of the upsampler.
        channels (int): C, of both maps.
        scale_factor (int): S.

    Returns:
        tuple[int, int, int]: parameters, and FLOPs per source pixel without
        and with the biases.
    """
    height, width = 8, 8
    with torch.device('meta'):
        module = build_upsampler(
            cfg, channels, scale_factor, guide_channels=channels
        )
        features = torch.empty(1, channels, height, width)
    biases = 0

    def add_biases(conv, inputs, out):
        nonlocal biases
        if conv.bias is not None:
            biases += 2 * out.numel()

    for conv in module.modules():
        if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
            conv.register_forward_hook(add_biases)
    inputs = find_inputs(module, features, scale_factor)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    flops = counter.get_total_flops()
    return (
        sum(p.numel() for p in module.parameters()),
        flops // (height * width),
        (flops + biases) // (height * width),
    )


def table(channels):
    """The rows of a Markdown table."""
    yield (
        '| upsampler | what it does | guide | parameters | FLOPs '
        '| with biases | AP in the CARAFE paper | AP in later papers |'
    )
    yield '|---|---|:-:|-:|-:|-:|-:|-:|'
    for name, cfg in COMPARED.items():
        row = UPSAMPLERS[cfg['type']]
        cells = (
            name,
            row.what,
            '✓' if getattr(row.cls, 'guided', False) else '',
            *(f'{n:,}' for n in count(cfg, channels)),
            row.first_ap,
            row.later_ap,
        )
        yield f'| {" | ".join(cells)} |'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--channels', type=int, default=256, help='C (default: 256)'
    )
    channels = parser.parse_args().channels
    if channels < 1:
        fail(f'--channels is {channels}, expected an int >= 1')
    try:
        rows = list(table(channels))
    except ValueError as error:
        fail(f'--channels is {channels}: {error}')
    print(*rows, sep='\n')


if __name__ == '__main__':
    main()
