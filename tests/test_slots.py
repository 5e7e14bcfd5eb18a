"""Every upsampler in every slot of every neck and head."""

import importlib.util

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.testing import assert_close

import mmcarafe
from mmcarafe.upsamplers import UPSAMPLERS

SLOTS = ('neck', 'pafpn', 'ppm', 'fpn', 'fuse', 'segformer')
IN_CHANNELS = [8, 16, 16, 32]
C = 16
# mmseg's warnings, whenever one of its heads is built
pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
]
for_each = [
    pytest.mark.parametrize('slot', SLOTS),
    pytest.mark.parametrize('kind', UPSAMPLERS),
]


def in_each_slot(test):
    for mark in for_each:
        test = mark(test)
    return test


class Levels(nn.Module):
    """Four levels out of one map, halved with rounding up as a backbone's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        levels = [image]
        for channels in IN_CHANNELS[1:]:
            x = nn.functional.max_pool2d(levels[-1], 1, stride=2)
            levels.append(torch.cat([x, -x], 1)[:, :channels])
        outs = self.model(levels)
        return outs[0] if isinstance(outs, tuple) else outs


def build(slot, kind):
    """The model with this upsampler in this slot alone."""
    cfg = dict(type=kind)
    if slot in ('neck', 'pafpn'):
        pytest.importorskip('mmdet')
        cls = dict(neck='CARAFEFPN', pafpn='CARAFEPAFPN')[slot]
        return getattr(mmcarafe, cls)(IN_CHANNELS, C, 4, upsample_cfg=cfg)
    pytest.importorskip('mmseg')
    arguments = dict(
        in_channels=IN_CHANNELS,
        in_index=[0, 1, 2, 3],
        channels=C,
        num_classes=5,
        dropout_ratio=0,
        norm_cfg=dict(type='GN', num_groups=4),
    )
    if slot == 'segformer':
        return mmcarafe.CARAFESegformerHead(**arguments, upsample_cfg=cfg)
    cfgs = {
        f'{place}_upsample_cfg': cfg if place == slot else None
        for place in ('ppm', 'fpn', 'fuse')
    }
    return mmcarafe.CARAFEUPerHead(**arguments, **cfgs)


def upsamplers(model, kind):
    cls = UPSAMPLERS[kind].cls
    return [m for m in model.modules() if isinstance(m, cls)]


@in_each_slot
def test_one_step_of_training_on_odd_sizes(slot, kind):
    model = build(slot, kind)
    levels = Levels(model)
    image = torch.randn(2, IN_CHANNELS[0], 65, 91)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    out = levels(image)
    assert out.shape[2:] == (65, 91)
    out.square().mean().backward()
    optimizer.step()
    found = upsamplers(model, kind)
    assert len(found) == dict(neck=3, pafpn=3, ppm=4, segformer=6).get(slot, 3)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    names = {module: name for name, module in model.named_modules()}
    for key, _ in found[0].named_parameters():
        # A bias that shifts all scores of a window alike has no gradient, and
        # PPM's coarsest map is constant.
        assert key.endswith('bias') or any(
            not torch.equal(p, before[f'{names[module]}.{key}'])
            for module in found
            for p in [module.get_parameter(key)]
        ), key


@in_each_slot
def test_initialisation_survives_the_parents(slot, kind):
    cls = UPSAMPLERS[kind].cls
    if not hasattr(cls, 'init_weights'):
        pytest.skip(f'{cls.__name__} has no initialisation of its own')
    model = build(slot, kind)
    fresh = [dict(m.named_parameters()) for m in upsamplers(model, kind)]
    expected = [
        {name: p.detach().clone() for name, p in each.items()}
        for each in fresh
    ]
    model.init_cfg = dict(type='Constant', layer='Conv2d', val=3, bias=3)
    model.init_weights()
    for module, values in zip(upsamplers(model, kind), expected):
        for name, parameter in module.named_parameters():
            value = values[name]
            if value.unique().numel() <= 2:  # a constant
                assert torch.equal(parameter, value), name
            elif value.numel() < 64:  # too few for a standard deviation
                assert parameter.abs().max() < 3 * value.abs().max(), name
            else:
                assert_close(
                    parameter.std(), value.std(), rtol=0.5, atol=0, msg=name
                )


@in_each_slot
def test_bf16(slot, kind):
    model = Levels(build(slot, kind)).bfloat16().eval()
    image = torch.randn(1, IN_CHANNELS[0], 65, 91).bfloat16()
    with torch.no_grad():
        out = model(image)
        expected = model.float()(image.float())
    assert out.dtype == torch.bfloat16
    # Of the largest value: a dozen convolutions, each rounded to 8 bits. The
    # worst seen on a CPU was 0.011.
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < 0.03


@pytest.mark.skipif(
    importlib.util.find_spec('onnxruntime') is None,
    reason='onnxruntime is not installed',
)
@in_each_slot
def test_onnx_at_another_size(slot, kind, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.syspath_prepend(ROOT / 'tools')
    import export_onnx

    model = Levels(build(slot, kind)).eval()
    file = str(tmp_path / 'model.onnx')
    example = torch.randn(1, IN_CHANNELS[0], 64, 96)
    export_onnx.export(model, example, file, 'torchscript', 17)
    session = onnxruntime.InferenceSession(
        file, providers=['CPUExecutionProvider']
    )
    image = torch.randn(2, IN_CHANNELS[0], 65, 91)
    (out,) = session.run(None, dict(image=image.numpy()))
    with torch.no_grad():
        expected = model(image)
    atol = 1e-4 * max(1, expected.abs().max().item())
    assert_close(torch.from_numpy(out), expected, rtol=0, atol=atol)
