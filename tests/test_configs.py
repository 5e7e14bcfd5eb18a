"""Every config: loaded, built, initialised, run forward and backward."""

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmcarafe

CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob('configs/*/*.py')
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


def detection_batch(cfg):
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(
        2,
        [(3, 97, 131), (3, 101, 90)],
        num_items=[2, 1],
        num_classes=3,
        with_mask='mask_head' in cfg.model.get('roi_head', {}),
    )


@pytest.mark.parametrize('path', CONFIGS)
def test_config(path):
    cfg = Config.fromfile(ROOT / path)
    pytest.importorskip(cfg.default_scope)
    without_downloads(cfg.model)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()

    upsamplers = [m for m in model.modules() if isinstance(m, mmcarafe.CARAFE)]
    assert bool(upsamplers) == ('carafe' in path)
    for module in upsamplers:
        std = module.content_encoder.weight.std().item()
        assert std == pytest.approx(0.001, rel=0.1)

    batch = detection_batch(cfg)
    model.train()
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite()
    loss.backward()
    for module in upsamplers:
        assert module.channel_compressor.weight.grad.isfinite().all()
        assert module.content_encoder.weight.grad.any()

    model.eval()
    with torch.no_grad():
        results = model(
            **model.data_preprocessor(batch, False), mode='predict'
        )
    assert len(results) == 2
