"""Every config: loaded, built, initialised, run forward and backward."""

import importlib.metadata

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

# Upsampler -> the layer that predicts, and the standard deviation of the
# weights that it starts with
PREDICTORS = {
    'CARAFE': ('content_encoder', 0.001),
    'DySample': ('offset', 0.001),
    'FreqFusion': ('content_encoder', 0.001),
    'SAPA': ('q', 0.02),
}
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob('configs/[!_]*/*.py')
)


def without_downloads(cfg):
    """Drop the weights that the backbones would fetch."""
    for value in cfg.values() if isinstance(cfg, dict) else cfg:
        if isinstance(value, (dict, list)):
            without_downloads(value)
    if isinstance(cfg, dict):
        if (cfg.get('init_cfg') or {}).get('type') == 'Pretrained':
            cfg['init_cfg'] = None
        cfg.pop('pretrained', None)


def few_proposals(cfg):
    """Most of a detector's time would go to the boxes of random weights."""
    train, test = cfg.get('train_cfg') or {}, cfg.get('test_cfg') or {}
    if 'rcnn' in train:
        train.rpn_proposal.max_per_img = test.rpn.max_per_img = 50
        train.rcnn.sampler.num = 32


def detection_batch(cfg):
    from mmdet.testing import demo_mm_inputs

    batch = demo_mm_inputs(
        2,
        [(3, 97, 131), (3, 101, 90)],
        num_items=[2, 1],
        with_mask='mask_head' in cfg.model.get('roi_head', {}),
    )
    for sample in batch['data_samples']:
        sample.gt_instances.labels.zero_()  # the class that all models have
    return batch


def segmentation_batch(cfg):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    size = (97, 131)
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    labels = torch.randint(cfg.model.decode_head.num_classes, (2, 1, *size))
    labels[..., :9] = 255  # ignored
    samples = [
        SegDataSample(
            gt_sem_seg=PixelData(data=data),
            metainfo=dict(img_shape=size, ori_shape=size),
        )
        for data in labels
    ]
    return dict(inputs=list(images), data_samples=samples)


def test_nothing_is_installed_for_mmsegs_configs(monkeypatch):
    """mmengine would install the other mmsegmentation over its fork."""
    try:
        importlib.metadata.distribution('onedl-mmsegmentation')
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('onedl-mmsegmentation is not installed')
    import mmengine.utils.package_utils

    import mmcarafe.registry  # noqa: F401  (names the distribution)

    def call(command):
        raise AssertionError(f'{command} is run')

    monkeypatch.setattr(mmengine.utils.package_utils, 'call_command', call)
    name = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
    from mmengine.hub import get_config

    assert get_config(name).default_scope == 'mmseg'


# mmseg's warning, whenever one of its heads is built
@pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated')
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False')
@pytest.mark.filterwarnings('ignore:For binary segmentation, we suggest')
# mmdet's in YOLOX's loss, and that of onedl-mmdetection
@pytest.mark.filterwarnings('ignore:torch.meshgrid. in an upcoming release')
@pytest.mark.filterwarnings('ignore:`torch.cuda.amp.autocast.args...:')
@pytest.mark.parametrize('path', CONFIGS)
def test_config(path):
    cfg = Config.fromfile(ROOT / path)
    pytest.importorskip(cfg.default_scope)
    without_downloads(cfg.model)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (97, 131)  # else padded to 512
    else:
        few_proposals(cfg.model)
    # YOLOX's resizing of batches asks a runner for its iteration
    cfg.model.data_preprocessor.pop('batch_augments', None)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()

    upsamplers = [m for m in model.modules() if type(m).__name__ in PREDICTORS]
    assert {type(module).__name__ for module in upsamplers} == {
        name for name in PREDICTORS if name.lower() in path
    }
    predictors = []
    for module in upsamplers:
        layer, std = PREDICTORS[type(module).__name__]
        predictors.append(getattr(module, layer).weight)
        assert predictors[-1].std().item() == pytest.approx(std, rel=0.1)

    if cfg.default_scope == 'mmseg':
        batch = segmentation_batch(cfg)
    else:
        batch = detection_batch(cfg)
    model.train()
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite()
    loss.backward()
    for module in upsamplers:
        for parameter in module.parameters():
            assert parameter.grad.isfinite().all()
    for weight in predictors:
        assert weight.grad.any()

    model.eval()
    with torch.no_grad():
        results = model(
            **model.data_preprocessor(batch, False), mode='predict'
        )
    assert len(results) == 2
