"""Export a segmentor: python tools/export_onnx.py CONFIG [CHECKPOINT].

The file maps pixels to logits, for any batch and image size::

    image   float32 [N, 3, H, W]: 0 to 255, BGR, as cv2.imread reads them
    logits  float32 [N, classes, H, W]: argmax over the classes is the map

It uses ONNX's own operators only, and it is written only after onnxruntime has
computed the same from it as PyTorch.
"""

import argparse
import inspect
import os
import os.path as osp
import sys
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import _checkpoints
import _cli
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmcarafe.ops.export import adaptive_avg_pool2d

TOLERANCE = 1e-5  # of the largest logit
NEEDS = dict(torchscript=['onnx'], dynamo=['onnx', 'onnxscript'])


def parse_args():
    parser = argparse.ArgumentParser(description='Export a segmentor to ONNX')
    parser.add_argument('config', help='config file of mmseg')
    parser.add_argument(
        'checkpoint', nargs='?', help='file or URL (default: random weights)'
    )
    parser.add_argument(
        '--out', help='file to write (default: CONFIG.onnx in this folder)'
    )
    parser.add_argument(
        '--opset', type=int, default=17, help='13 to 17 (default); dynamo: 17'
    )
    parser.add_argument(
        '--exporter',
        choices=NEEDS,
        default='torchscript',
        help="torch's old exporter, or its new one, which takes minutes for "
        'a model of many upsamplers (default: %(default)s)',
    )
    parser.add_argument('--cfg-options', **_cli.CFG_OPTIONS)
    return parser.parse_args()


def has_dynamo():
    parameters = inspect.signature(torch.onnx.export).parameters
    return 'dynamic_shapes' in parameters and hasattr(
        getattr(torch.export, 'Dim', None), 'DYNAMIC'
    )


class PixelsToLogits(nn.Module):
    """A segmentor with its preprocessing, and logits as large as the image."""

    def __init__(self, segmentor):
        super().__init__()
        self.segmentor = segmentor

    def forward(self, image):
        preprocess = self.segmentor.data_preprocessor
        flip = getattr(preprocess, 'channel_conversion', None)
        if flip is None:  # onedl-mmsegmentation
            flip = preprocess._channel_conversion
        x = image.flip(1) if flip else image
        if preprocess._enable_normalize:
            x = (x - preprocess.mean) / preprocess.std
        logits = self.segmentor(x)
        return nn.functional.interpolate(
            logits,
            image.shape[2:],
            mode='bilinear',
            align_corners=self.segmentor.align_corners,
        )


@contextmanager
def pooling_by_products(model):
    """Pool by matrix products during export only, not in the comparison."""
    pools = [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    for pool in pools:
        bins = pool.output_size
        size = (bins, bins) if isinstance(bins, int) else bins
        pool.forward = partial(adaptive_avg_pool2d, size=size)
    try:
        yield
    finally:
        for pool in pools:
            del pool.forward


def export(model, image, file, exporter, opset, outputs=('logits',)):
    """Write ``model`` to ``file``, for any batch and any size of ``image``."""
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    names = dict(input_names=['image'], output_names=list(outputs))
    quiet = warnings.catch_warnings()
    with quiet, torch.no_grad(), pooling_by_products(model):
        # The exporters warn about their age, and about shapes that the old one
        # takes for constants, which the check after this would notice.
        warnings.simplefilter('ignore')
        if exporter == 'dynamo':
            dynamic = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
            torch.onnx.export(
                model,
                (image,),
                file,
                dynamo=True,
                opset_version=18,
                dynamic_shapes=(dynamic,),
                external_data=False,
                verbose=False,
                **names,
            )
            lower_opset(file, opset)
        else:
            torch.onnx.export(
                model,
                (image,),
                file,
                opset_version=opset,
                dynamic_axes=dict.fromkeys(['image', *outputs], axes),
                **names,
                **(dict(dynamo=False) if has_dynamo() else {}),
            )


def lower_opset(file, opset):
    """Rewrite a model of opset 18 for an older opset.

    torch's new exporter writes nothing older than 18, and onnx's converter
    lacks Pad and Resize. To these, 18 added only attributes that this removes
    where they have their default.
    """
    import onnx

    model = onnx.load(file)
    defaults = dict(antialias=0, keep_aspect_ratio_policy=b'stretch')
    for node in model.graph.node:
        if node.op_type == 'Resize':
            for attribute in list(node.attribute):
                value = onnx.helper.get_attribute_value(attribute)
                if defaults.get(attribute.name) == value:
                    node.attribute.remove(attribute)
    for imported in model.opset_import:
        if imported.domain == '':
            imported.version = opset
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def check(model, file):
    """Compare onnxruntime with PyTorch, for several batches and sizes."""
    import onnx
    import onnxruntime

    graph = onnx.load(file)
    domains = {node.domain for node in graph.graph.node} | {
        function.domain for function in graph.functions
    }
    if domains - {'', 'ai.onnx'}:
        _cli.fail(f'the model needs operators of {sorted(domains)}')
    session = onnxruntime.InferenceSession(
        file, providers=['CPUExecutionProvider']
    )
    for shape in [(2, 97, 131), (1, 128, 192), (1, 341, 250)]:
        image = torch.randint(256, (shape[0], 3, *shape[1:])).float()
        with torch.no_grad():
            expected = segment(model.segmentor, image)
        (logits,) = session.run(None, dict(image=image.numpy()))
        error = (torch.from_numpy(logits) - expected).abs().max().item()
        scale = expected.abs().max().item()
        print(
            f'{tuple(image.shape)}: largest difference {error:.1e}, '
            f'largest logit {scale:.1e}'
        )
        if not error <= TOLERANCE * max(1, scale):
            _cli.fail(f'onnxruntime differs from PyTorch by {error:.1e}')


def segment(segmentor, images):
    """The logits as mmseg predicts them."""
    from mmseg.structures import SegDataSample

    metainfo = dict(ori_shape=images.shape[2:], img_shape=images.shape[2:])
    samples = [SegDataSample(metainfo=metainfo) for _ in images]
    data = dict(inputs=list(images), data_samples=samples)
    data = segmentor.data_preprocessor(data, training=False)
    results = segmentor(**data, mode='predict')
    return torch.stack([result.seg_logits.data for result in results])


def main():
    args = parse_args()
    missing = [m for m in NEEDS[args.exporter] if not find_spec(m)]
    missing += [] if find_spec('onnxruntime') else ['onnxruntime']
    if missing:
        _cli.fail(f'please install what is missing: {" ".join(missing)}')
    if args.exporter == 'dynamo' and not has_dynamo():
        _cli.fail('--exporter dynamo needs a newer torch (2.6)')
    lowest = 17 if args.exporter == 'dynamo' else 13
    if not lowest <= args.opset <= 17:
        _cli.fail(f'--opset is {args.opset}, expected {lowest} to 17')
    cfg = _cli.read_config(args, 'model')
    if cfg.get('default_scope') != 'mmseg':
        _cli.fail(f'config {args.config} is not an mmseg config')
    if (cfg.model.get('test_cfg') or {}).get('mode', 'whole') != 'whole':
        _cli.fail(
            'model.test_cfg.mode: expected whole; the windows of slide are '
            'cut outside the model'
        )
    name = osp.splitext(osp.basename(args.config))[0]
    out = args.out or f'{name}.onnx'
    if osp.isdir(out):
        _cli.fail(f'--out: {out} is a folder, expected a file')
    if not osp.isdir(osp.dirname(out) or '.'):
        _cli.fail(f'--out: there is no folder {osp.dirname(out)}')
    if args.checkpoint:
        checkpoint = _checkpoints.load(args.checkpoint)

    init_default_scope('mmseg')
    with _cli.user_errors('model'):
        segmentor = MODELS.build(cfg.model)
    if segmentor.out_channels == 1:
        _cli.fail('decode_head.out_channels is 1, expected 2 or more classes')
    if segmentor.data_preprocessor.test_cfg:
        _cli.fail('data_preprocessor.test_cfg pads; expected None')
    if args.checkpoint:
        # which also loads them
        _checkpoints.check_weights(segmentor, args.checkpoint, checkpoint)
    model = PixelsToLogits(revert_sync_batchnorm(segmentor)).eval()
    with tempfile.TemporaryDirectory(dir=osp.dirname(out) or '.') as folder:
        file = osp.join(folder, 'model.onnx')
        image = torch.zeros(2, 3, 97, 131)  # its sizes have no common factor
        try:
            export(model, image, file, args.exporter, args.opset)
        except Exception:
            if args.exporter == 'torchscript' and has_dynamo():
                print('--exporter dynamo may work', file=sys.stderr)
            raise
        check(model, file)
        os.replace(file, out)
    print(f'{out} is written, opset {args.opset}')


if __name__ == '__main__':
    main()
