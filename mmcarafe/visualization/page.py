"""A page on which a reader clicks a pixel and sees the kernels that serve it.

It needs matplotlib. Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image  # which matplotlib requires
from torch import Tensor

from mmcarafe.visualization.figures import (
    HEAT,
    brightened,
    heading,
    list_of,
    number_of,
    stride_of,
)
from mmcarafe.visualization.kernels import (
    Record,
    as_maps,
    chains,
    own_places,
)

TEMPLATE = Path(__file__).with_name('page.html')
LEVELS = 127  # int8, less one, so that both signs have as many
MOST = 8  # groups whose weights are kept


def kernels_page(
    image: np.ndarray,
    records: 'list[Record]',
    points: 'dict[str, tuple[float, float]]',
    input_size: 'tuple[int, int] | None' = None,
) -> str:
    """Make a page of HTML with all kernels in it, which needs no network.

    A click on the image shows, for each module, the K×K weights that make the
    pixel there, their window in the image, and how even they are; for modules
    that follow each other (see :func:`chains`) also the trace (see
    :func:`trace`). For DySample the window shows where it reads.

    Weights are rounded: by at most 1/127 of the largest one of their kernel,
    and less where they are small. So are DySample's distances. A module takes
    (K*K + 4) * G bytes for each pixel of its output, and a third more as text.
    Of more than 8 groups, as the dynamic filter has, the page has only the
    mean weights, and no trace.

    Args:
        image (ndarray[H_I, W_I, 3]): from 0 to 1, as the model gets it, but
            without padding.
        records (list[Record]): in the order of the calls; those without
            kernels are left out. Of a batch, the first image is shown.
        points (dict[str, tuple[float, float]]): name -> column and row in the
            image, from 0 to W_I and H_I. The page opens with the first; each
            has a button.
        input_size (tuple[int, int], optional): rows and columns of the padded
            image; by default those of ``image``.

    Returns:
        str: to be saved as UTF-8.

    Raises:
        ValueError: no record has kernels, or there is no point.
    """
    input_size = input_size or image.shape[:2]
    records = [record for record in records if record.has_kernels]
    if not records:
        raise ValueError('records: expected at least one with kernels')
    if not points:
        raise ValueError('points is empty, expected at least one')
    lists = {}
    # what ends finest comes first
    for chain in sorted(
        chains(records).values(), key=lambda c: -c[0].after.shape[2:].numel()
    ):
        others = [
            record
            for record in reversed(records)
            if list_of(record) == list_of(chain[0])
            and not any(record is each for each in chain)
        ]
        traceable = all(map(_keeps_groups, chain))
        lists[list_of(chain[0])] = dict(
            # those that are traced come first, finest first
            traced=len(chain) if traceable else 0,
            steps=[_step(record, input_size) for record in chain + others],
        )
    height, width = image.shape[:2]
    data = dict(
        image=_data_url(image),
        width=width,
        height=height,
        points={name: list(map(float, at)) for name, at in points.items()},
        colors=[
            '#{:02x}{:02x}{:02x}'.format(*color)
            for color in colormaps[HEAT](np.arange(256), bytes=True)[:, :3]
        ],
        lists=lists,
    )
    # No name can end the script that the data stand in.
    text = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')
    return TEMPLATE.read_text(encoding='utf-8').replace('/* DATA */', text)


def _keeps_groups(record):
    return record.positions is not None or record.group_size <= MOST


def _step(record, input_size):
    """What the page knows of one module."""
    if record.weights is not None:
        values = as_maps(record.weights)[0]
        if not _keeps_groups(record):
            values = values.mean(0, keepdim=True)
    else:
        own = own_places(
            record.before.shape[2:], record.scale_factor, record.positions
        )
        values = record.positions[0] - own
    return dict(
        name=record.name,
        label=number_of(record.name),
        sizes=heading(record, input_size).split(' pixels')[0],
        kind=record.kind,
        scale=record.scale_factor,
        stride=stride_of(input_size, record.before.shape[2:]),
        height=record.before.shape[2],
        width=record.before.shape[3],
        k=record.kernel_size,  # null: DySample's positions
        groups=len(values),
        of=record.group_size,
        **_quantize(values),
    )


def _quantize(values: Tensor) -> dict:
    """Signed roots of ``[G, V, S*H, S*W]``, in units of each kernel.

    Roots, because small weights are many: rounded away, their sum is missed.
    """
    values = values.detach().float().cpu()
    units = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / LEVELS**2
    steps = (values.abs() / units).sqrt().round() * values.sign()
    steps = steps.to(torch.int8)
    return dict(
        steps=_base64(steps.contiguous().numpy().tobytes()),
        units=_base64(units.numpy().astype('<f4').tobytes()),
    )


def _base64(data):
    return base64.b64encode(data).decode('ascii')


def _data_url(image):
    file = io.BytesIO()
    pixels = (brightened(image) * 255).round().astype(np.uint8)
    # without subsampling, which would shift colours by a pixel
    Image.fromarray(pixels).save(file, 'JPEG', quality=92, subsampling=0)
    return f'data:image/jpeg;base64,{_base64(file.getvalue())}'
