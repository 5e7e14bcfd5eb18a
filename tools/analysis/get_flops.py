r"""Parameters and FLOPs of a detector or a segmentor at inference.

Convolutions, matrix products and CARAFE's weighted sums count, a multiply-add
as 2 FLOPs, for one image. Biases, normalisation, activations, softmax,
interpolation and RoIAlign do not, nor does the auxiliary head, which only
training uses. A two-stage detector gets as many proposals as its ``test_cfg``
allows. No weights are loaded.

Usage::

    python tools/analysis/get_flops.py CONFIG [--shape H W] \
        [--cfg-options KEY=VALUE ...]
"""

import argparse
import copy
import math
import sys
import warnings
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement, InstanceData
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tools, for _cli
from _cli import CFG_OPTIONS, fail, read_config, user_errors  # noqa: E402


def build(cfg):
    """A config's model for inference, on PyTorch's default device.

    Args:
        cfg (dict): the config's ``model``.
    """
    cfg = copy.deepcopy(cfg)  # building writes into it
    if 'auxiliary_head' in cfg:
        cfg.update(auxiliary_head=None)
    with user_errors('model'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmseg's, about its own losses
        return MODELS.build(cfg).eval()


def count(model, shape):
    """Run a detector or a segmentor on one image and count.

    Args:
        model (nn.Module): on any device, also PyTorch's meta device where
            all its operators know it.
        shape (tuple[int, int]): height and width of the image.

    Returns:
        tuple[int, int]: parameters and FLOPs.
    """
    parameters = list(model.parameters())
    image = parameters[0].new_zeros(1, 3, *shape)
    # what detectors like DETR make their masks from
    metainfo = dict(img_shape=shape, batch_input_shape=shape)
    samples = [BaseDataElement(metainfo=metainfo)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if hasattr(model, 'roi_head'):
            _run_two_stages(model, image, samples)
        else:
            model(image, samples)
    return sum(p.numel() for p in parameters), counter.get_total_flops()


def _run_two_stages(model, image, samples):
    # How many boxes survive NMS depends on the weights; a trained detector
    # usually reaches the maximum.
    corners = image.new_tensor([0, 0, *image.shape[:1:-1]])  # x, y, x, y
    boxes = corners.expand(model.test_cfg.rpn.max_per_img, 4)
    features = model.extract_feat(image)
    model.rpn_head(features)
    model.roi_head(features, [InstanceData(bboxes=boxes)], samples)


def parse_args(description, config=None):
    """Read and check the command line.

    Args:
        description (str): of the tool.
        config (Path, optional): the default.

    Returns:
        tuple[Config, list[int]]: the config, and height and width of the
        image as the model gets it.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        'config',
        nargs='?' if config else None,
        default=config,
        help='config file, of mmdet or of mmseg',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="height and width of the image, which are rounded up to mmdet's "
        'pad_size_divisor (default: 800 1333 for mmdet, 512 512 for mmseg)',
    )
    parser.add_argument('--cfg-options', **CFG_OPTIONS)
    args = parser.parse_args()
    cfg = read_config(args, 'model', 'default_scope')
    is_mmseg = cfg.default_scope == 'mmseg'
    shape = args.shape or ([512, 512] if is_mmseg else [800, 1333])
    if min(shape) < 1:
        fail(f'--shape is {shape}, expected two ints >= 1')
    preprocessor = cfg.model.get('data_preprocessor') or {}
    divisor = preprocessor.get('pad_size_divisor', 1)
    shape = [math.ceil(length / divisor) * divisor for length in shape]
    init_default_scope(cfg.default_scope)
    return cfg, shape


def main():
    cfg, shape = parse_args(__doc__.splitlines()[0])
    if 'roi_head' in cfg.model and 'rpn_head' not in cfg.model:
        fail('model has a roi_head, expected an rpn_head too')
    parameters, flops = count(build(cfg.model), shape)
    print(f'image       1 x 3 x {shape[0]} x {shape[1]}')
    print(f'parameters  {parameters / 1e6:.2f} M')
    print(f'FLOPs       {flops / 1e9:.1f} G, a multiply-add as 2')


if __name__ == '__main__':
    main()
