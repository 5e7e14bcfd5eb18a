"""One image through a model of OpenMMLab, and what there is to look at.

This is what ``tools/analysis/visualize_kernels.py`` and
:class:`mmcarafe.KernelVisualizationHook` share. It needs mmengine. Images are
``ndarray[H, W, 3]``, 8 bits in OpenCV's order of colours.
"""

import math
import os.path as osp
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS
from torch import nn

from mmcarafe.upsamplers import CARAFE, SAPA, DySample, FreqFusion
from mmcarafe.visualization import figures
from mmcarafe.visualization.kernels import (
    KernelRecorder,
    Record,
    chains,
    is_mmcv_carafe,
)

MOST = 6  # points, for which a picture has room
KINDS = (CARAFE, SAPA, FreqFusion, DySample)
EXPECTED = (
    'no upsampler with kernels, expected one of '
    + ', '.join(f'mmcarafe.{kind.__name__}' for kind in KINDS)
    + ", or mmcv's CARAFE with mmcarafe.drop_in"
)


@dataclass
class Look:
    """What a model did to one image.

    Attributes:
        image (ndarray[H_I, W_I, 3]): as the model got it, but without
            padding, from 0 to 1, in RGB.
        scale (tuple[float, float]): by which columns and rows of the file were
            multiplied.
        input_size (tuple[int, int]): rows and columns with padding.
        sample (DataSample): the prediction.
        drawn (list[Record]): what saw the whole image, with kernels; maybe
            none.
        others (list[Record]): the rest, for example in a head that works on
            regions.
    """

    image: np.ndarray
    scale: 'tuple[float, float]'
    input_size: 'tuple[int, int]'
    sample: object
    drawn: 'list[Record]'
    others: 'list[Record]'

    def places(self, points: dict) -> dict:
        """Points in pixels of the file, in pixels of :attr:`image`."""
        return {
            name: (x * self.scale[0], y * self.scale[1])
            for name, (x, y) in points.items()
        }


def read_image(path: str) -> np.ndarray:
    """Read an image file.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    if not osp.isfile(path):
        raise ValueError(f'image: there is no file {path}')
    data = np.fromfile(path, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        raise ValueError(
            f'image: expected an image, {path} is none that OpenCV can read'
        )
    return image


def name_points(pixels: 'list[tuple[float, float]]', image: np.ndarray):
    """Name points after their pixels, and move them to the pixels' centres.

    Args:
        pixels (list[tuple[float, float]]): columns and rows.
        image (ndarray[H, W, 3]): in which they must lie.

    Returns:
        dict[str, tuple[float, float]]

    Raises:
        ValueError: they are too many, or one is outside the image.
    """
    height, width = image.shape[:2]
    if not 0 < len(pixels) <= MOST:
        raise ValueError(
            f'points: expected at most {MOST} points, and one at least, got '
            f'{len(pixels)}'
        )
    points = {}
    for x, y in pixels:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f'points: expected X from 0 to {width - 1} and Y from 0 to '
                f'{height - 1}, inside the image, got {x:g},{y:g}'
            )
        points[f'({x:g}, {y:g})'] = (x + 0.5, y + 0.5)
    return points


def steepness(image: np.ndarray) -> np.ndarray:
    """How steep the image is at each pixel, ``[H, W]``."""
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1)
    right, down = (
        cv2.Sobel(smooth, cv2.CV_32F, *order) for order in ((1, 0), (0, 1))
    )
    return np.hypot(right, down).sum(2)


def edge_points(image: np.ndarray) -> 'dict[str, tuple[float, float]]':
    """Three strong edges, a sixth of the image apart, and the left border."""
    steep = steepness(image)
    reach = math.ceil(max(steep.shape) / 6)
    points = {}
    for i in range(3):
        y, x = np.unravel_index(steep.argmax(), steep.shape)
        points[f'strong edge {i + 1}'] = (x + 0.5, y + 0.5)
        rows, columns = (
            slice(max(0, at - reach), at + reach) for at in (y, x)
        )
        steep[rows, columns] = -1
    points['at the border'] = (0.5, image.shape[0] / 2)
    return points


def prepare(cfg: Config, image: np.ndarray) -> dict:
    """Run the test pipeline of a config.

    Returns:
        dict: what a model's ``test_step`` takes.

    Raises:
        ValueError: the config has no test pipeline, or no scope.
    """
    scope = cfg.get('default_scope')
    if scope is None:
        raise ValueError('config: expected a default_scope, mmdet or mmseg')
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    dataset = loader.get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if not dataset.get('pipeline'):
        raise ValueError(
            'config: test_dataloader.dataset has no pipeline, which says how '
            'the model gets its image'
        )
    first, *steps = dataset['pipeline']  # the first one reads the file
    if first.get('color_type', 'color') != 'color':
        raise ValueError(
            f'config: the pipeline reads images as {first["color_type"]!r}, '
            "expected 'color'"
        )
    steps = [s for s in steps if 'Annotations' not in str(s.get('type'))]
    load = dict(type=f'{scope}.LoadImageFromNDArray')
    with TRANSFORMS.switch_scope_and_registry(scope) as registry:
        pipeline = Compose([registry.build(step) for step in (load, *steps)])
        data = pipeline(dict(img=image, img_id=0))
    return {key: [value] for key, value in data.items()}


def has_kernels(model: nn.Module) -> bool:
    """Whether the model has upsamplers that can be drawn."""
    return any(
        isinstance(module, KINDS) or is_mmcv_carafe(module)
        for module in model.modules()
    )


def look(model: nn.Module, data: dict, image: np.ndarray) -> Look:
    """Run the model on one image, and record its upsamplers.

    A model that tests by a sliding window gets the whole image at once. The
    model should be in evaluation mode.

    Args:
        model (nn.Module): a detector of mmdet or a segmentor of mmseg.
        data (dict): from :func:`prepare`.
        image (ndarray[H, W, 3]): the same image.
    """
    data = model.data_preprocessor(data, False)
    (pixels,) = data['inputs']
    with _whole(model), KernelRecorder(model) as recorder, torch.no_grad():
        (sample,) = model(**data, mode='predict')
    drawn, others = [], []
    for record in recorder.records:
        # heads on regions of the image, of which there may be a single one
        of_regions = record.name.startswith('roi_head.')
        whole = len(record.before) == 1 and not of_regions
        (drawn if whole and record.has_kernels else others).append(record)
    height, width = sample.img_shape[:2]
    shown = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return Look(
        shown[..., ::-1].astype(np.float32) / 255,
        (width / image.shape[1], height / image.shape[0]),
        tuple(pixels.shape[1:]),
        sample,
        drawn,
        others,
    )


@contextmanager
def _whole(model):
    """Test without a sliding window, for a while."""
    settings = getattr(model, 'test_cfg', None) or {}
    if settings.get('mode') != 'slide':
        yield
        return
    settings['mode'] = 'whole'
    try:
        yield
    finally:
        settings['mode'] = 'slide'


def finest_chains(records: 'list[Record]') -> 'dict[str, list[Record]]':
    """Those of the :func:`chains` that end finest, for which figures are."""
    found = chains(records)
    sizes = {
        name: chain[0].after.shape[2:].numel() for name, chain in found.items()
    }
    finest = max(sizes.values(), default=0)
    return {
        name: chain for name, chain in found.items() if sizes[name] == finest
    }


def draw(look: Look, points: dict) -> 'dict[str, Figure]':
    """Draw all figures of each of the :func:`finest_chains`.

    Args:
        look (Look): from :func:`look`.
        points (dict[str, tuple[float, float]]): name -> column and row in
            ``look.image``.

    Returns:
        dict[str, Figure]: by ``LIST_kernels``, ``LIST_spread_and_shift``,
        ``LIST_features`` and ``LIST_trace``. Features are left out where an
        upsampler changes the number of channels.

    Raises:
        ValueError: no upsampler with kernels saw the whole image.
    """
    if not look.drawn:
        raise ValueError(
            'the model has upsamplers with kernels, but ran none of them on '
            'the whole image'
        )
    shown, size = look.image, look.input_size
    found = {}
    for name, chain in finest_chains(look.drawn).items():
        name = name.replace('.', '_') or 'model'
        found[f'{name}_kernels'] = figures.kernels_figure(
            shown, chain, points, size
        )
        found[f'{name}_spread_and_shift'] = figures.statistics_figure(
            shown, chain, size
        )
        if all(r.before.shape[1] == r.after.shape[1] for r in chain):
            found[f'{name}_features'] = figures.features_figure(
                shown, chain, size
            )
        found[f'{name}_trace'] = figures.trace_figure(
            shown, chain, points, size
        )
    return found
