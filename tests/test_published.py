"""mmdet's own CARAFE models and their checkpoints, through the drop-in.

The zoo's files cannot be downloaded here: state dicts of the same models are
saved in the two layouts that the zoo has, and loaded strictly.
"""

import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch.testing import assert_close

mmdet = pytest.importorskip('mmdet')
pytest.importorskip('mmcv._ext', reason='the drop-in patches mmcv.ops')


from mmcarafe import checkpoint  # noqa: E402

CONFIGS = Path(mmdet.__file__).parent / '.mim/configs/carafe'
NAMES = [
    'faster-rcnn_r50_fpn-carafe_1x_coco',
    'mask-rcnn_r50_fpn-carafe_1x_coco',
]


@pytest.fixture(autouse=True)
def enabled():
    from mmcarafe import drop_in

    drop_in.enable()
    checkpoint.enable()


def config(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    return cfg


def build(name):
    model = MODELS.build(config(name).model)
    for parameter_name, parameter in model.named_parameters():
        if 'content_encoder' in parameter_name:  # kernels that differ
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def meta(layout, name):
    """What the two generations of mmdet wrote beside the weights."""
    if layout == 'mmdet 2':
        return dict(
            env_info='sys.platform: linux\nPyTorch: 1.5.0\nMMCV: 0.6.2',
            config=config(name).pretty_text,
            mmdet_version='2.1.0',
            seed=None,
            exp_name=f'{name}.py',
            CLASSES=('person', 'bicycle'),
            epoch=12,
            iter=87960,
            hook_msgs={},
        )
    return dict(
        cfg=config(name).pretty_text,
        dataset_meta=dict(classes=('person', 'bicycle'), palette=[(1, 2, 3)]),
        epoch=12,
        iter=87960,
        mmengine_version='0.10.7',
    )


def plain_carafe(state, prefix, x):
    """CARAFE by unfolding, from the paper's description alone."""

    def conv(name, x, padding):
        return F.conv2d(
            x,
            state[f'{prefix}.{name}.weight'],
            state[f'{prefix}.{name}.bias'],
            padding=padding,
        )

    n, c, h, w = x.shape
    logits = conv('content_encoder', conv('channel_compressor', x, 0), 1)
    kernels = F.pixel_shuffle(logits, 2).softmax(1)  # [N, K*K, 2H, 2W]
    windows = F.unfold(x, 5, padding=2).view(n, c * 25, h, w)
    windows = F.interpolate(windows, scale_factor=2)  # nearest
    windows = windows.view(n, c, 25, 2 * h, 2 * w)
    return (windows * kernels[:, None]).sum(2)


def plain_fpn_carafe(state, inputs):
    """FPN_CARAFE with its learned P6, from the weights alone."""

    def conv(name, x, **kwargs):
        return F.conv2d(
            x,
            state[f'neck.{name}.conv.weight'],
            state[f'neck.{name}.conv.bias'],
            **kwargs,
        )

    levels = [conv(f'lateral_convs.{i}', x) for i, x in enumerate(inputs)]
    levels.append(conv('lateral_convs.4', inputs[-1], stride=2, padding=1))
    for i in range(4, 0, -1):
        up = plain_carafe(state, f'neck.upsample_modules.{i - 1}', levels[i])
        h, w = levels[i - 1].shape[2:]
        levels[i - 1] = levels[i - 1] + up[:, :, :h, :w]
    return [conv(f'fpn_convs.{i}', x, padding=1) for i, x in enumerate(levels)]


def published_neck():
    """Names and shapes of FPN_CARAFE's weights, as mmdet 2.1 wrote them."""
    for i, channels in enumerate((256, 512, 1024, 2048)):
        yield f'lateral_convs.{i}.conv.weight', (256, channels, 1, 1)
    yield 'lateral_convs.4.conv.weight', (256, 2048, 3, 3)
    for i in range(5):
        yield f'lateral_convs.{i}.conv.bias', (256,)
        yield f'fpn_convs.{i}.conv.weight', (256, 256, 3, 3)
        yield f'fpn_convs.{i}.conv.bias', (256,)
    for i in range(4):
        upsampler = f'upsample_modules.{i}'
        yield f'{upsampler}.channel_compressor.weight', (64, 256, 1, 1)
        yield f'{upsampler}.channel_compressor.bias', (64,)
        yield f'{upsampler}.content_encoder.weight', (100, 64, 3, 3)
        yield f'{upsampler}.content_encoder.bias', (100,)


@pytest.mark.filterwarnings('ignore:The given buffer is not writable')
@pytest.mark.parametrize('layout', ['mmdet 2', 'mmdet 3'])
@pytest.mark.parametrize('name', NAMES)
def test_published_layout_loads_strictly_and_runs(name, layout, tmp_path):
    source = build(name)
    state = source.state_dict()
    neck = {
        name[len('neck.') :]: tuple(value.shape)
        for name, value in state.items()
        if name.startswith('neck.')
    }
    assert neck == dict(published_neck())
    checkpoint = dict(meta=meta(layout, name), state_dict=state)
    file = tmp_path / f'{name}.pth'
    # PyTorch 1.5, with which mmdet 2's were written, did not zip them.
    zipped = layout == 'mmdet 3'
    torch.save(checkpoint, file, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(file) == zipped

    model = MODELS.build(config(name).model).eval()
    load_checkpoint(model, str(file), map_location='cpu', strict=True)
    model.double()  # so that rounding explains no difference
    state = {name: value.double() for name, value in state.items()}
    inputs = [
        torch.randn(1, c, *size, dtype=torch.float64)
        for c, size in zip(
            (256, 512, 1024, 2048), ((26, 38), (13, 19), (7, 10), (4, 5))
        )
    ]
    with torch.no_grad():
        outs = model.neck(inputs)
        expected = plain_fpn_carafe(state, inputs)
        assert len(outs) == len(expected) == 5
        for out, want in zip(outs, expected):
            assert_close(out, want)
        if 'mask' in name:
            head = model.roi_head.mask_head
            x = torch.randn(3, 256, 14, 14, dtype=torch.float64)
            prefix = 'roi_head.mask_head.upsample'
            assert_close(head.upsample(x), plain_carafe(state, prefix, x))
