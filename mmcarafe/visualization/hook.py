"""Pictures of the kernels, while a model is trained."""

import random
from contextlib import contextmanager
from typing import List, Optional, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from mmcarafe.registry import HOOKS
from mmcarafe.visualization.pictures import (
    EXPECTED,
    draw,
    edge_points,
    has_kernels,
    look,
    name_points,
    prepare,
    read_image,
)


@HOOKS.register_module()
class KernelVisualizationHook(Hook):
    """Draw what the upsamplers do to one image, at first and in between.

    ::

        custom_hooks = [
            dict(
                type='mmcarafe.KernelVisualizationHook',
                interval=500,
                image='path/to/image.png')
        ]

    The pictures are those of ``tools/analysis/visualize_kernels.py``: kernels
    at chosen points, spread and shift, features and trace. They go to the
    backends of the run's visualizer, whichever it has: files in
    ``vis_data/vis_image``, TensorBoard and so on, each under a name that stays
    the same and the number of iterations. The image goes through the test
    pipeline of the config.

    The training takes the same course as without the hook, to the bit. One
    drawing takes some seconds, for the pictures more than for the model.

    Args:
        interval (int): in iterations. The first pictures are of the model as
            the training starts.
        image (str): an image file.
        points (list[tuple[float, float]], optional): columns and rows, in
            pixels of the file, at most 6. By default three strong edges and
            one point at the border.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``image`` is no image, a point is outside of it, or, before
            the training starts, no upsampler with kernels sees the image.
    """

    priority = 'LOW'  # as late as the hooks that log

    def __init__(
        self,
        interval: int,
        image: str,
        points: Optional[List[Tuple[float, float]]] = None,
    ):
        if type(interval) is not int:
            raise TypeError(
                f'interval is {interval!r}, expected an int, in iterations'
            )
        if interval < 1:
            raise ValueError(f'interval is {interval}, expected 1 or more')
        if not isinstance(image, str):
            raise TypeError(f'image is {image!r}, expected the path of a file')
        self.interval = interval
        self.image = read_image(image)
        if points is None:
            self.points = edge_points(self.image)
        else:
            self.points = name_points(_pairs(points), self.image)

    def check(self, cfg: Config, model: nn.Module) -> None:
        """Check the hook against the run that it belongs to.

        Raises:
            ValueError: the model has no upsampler with kernels, or the config
                no test pipeline.
        """
        if not has_kernels(model):
            raise ValueError(f'the model has {EXPECTED}')
        with undisturbed(model):  # a pipeline may be random
            self._data = prepare(cfg, self.image)

    def before_train(self, runner) -> None:
        """Check, and draw once: what fails must not do so much later."""
        self.check(runner.cfg, _unwrapped(runner))
        self._draw(runner, runner.iter)

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._draw(runner, runner.iter + 1)

    @master_only
    def _draw(self, runner, step):
        model = _unwrapped(runner)
        with undisturbed(model):
            model.eval()
            seen = look(model, self._data, self.image)
            figures = draw(seen, seen.places(self.points))
        for name, figure in figures.items():
            figure.canvas.draw()
            pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
            pixels = np.ascontiguousarray(pixels)
            runner.visualizer.add_image(name, pixels, step)


def _pairs(points):
    if not isinstance(points, (list, tuple)):
        raise TypeError(f'points is {points!r}, expected a list of (X, Y)')
    for point in points:
        if not (
            isinstance(point, (list, tuple))
            and len(point) == 2
            and all(isinstance(each, (int, float)) for each in point)
        ):
            raise TypeError(
                f'points has {point!r}, expected a column and a row such as '
                '(40, 25)'
            )
    return points


def _unwrapped(runner):
    model = runner.model
    return model.module if is_model_wrapper(model) else model


@contextmanager
def undisturbed(model: nn.Module):
    """Leave modes and random numbers as they are now."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
