"""torch.compile, torch.export and ONNX, with dynamic sizes."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from packaging.version import parse
from test_swap_any import Unet
from torch import nn
from torch.testing import assert_close

from mmcarafe import CARAFE, DySample, FreqFusion, swap_upsample
from mmcarafe.ops import carafe, export

UPERNET = 'configs/shapes/upernet-carafe_r18_shapes.py'
# N, H, W. torch.export takes sizes of 1 for constants, so the smallest level,
# which is halved once more, needs at least 3 rows.
SIZES = [(2, 97, 131), (1, 128, 192), (3, 65, 250)]
SMALLER = (1, 33, 64)

needs_export = pytest.mark.skipif(
    not hasattr(torch.export, 'Dim')
    or not hasattr(torch.export.Dim, 'DYNAMIC'),
    reason='torch.export of this torch has no Dim.DYNAMIC',
)
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec('onnxruntime') is None,
    reason='onnxruntime is not installed',
)


class Masks(nn.Module):
    """The operator on ready masks, made of its input."""

    def forward(self, x):
        masks = x[:, :1].repeat(1, 9, 1, 1).repeat_interleave(2, 2)
        return carafe(x, masks.repeat_interleave(2, 3).softmax(1), 3)


class Detector(nn.Module):
    """A backbone, so that the levels' sizes belong together, and the neck."""

    def __init__(self):
        super().__init__()
        from mmdet.models import ResNet

        from mmcarafe import CARAFEFPN

        init_default_scope('mmdet')
        self.backbone = ResNet(18, base_channels=8, stem_channels=8)
        self.neck = CARAFEFPN([8, 16, 32, 64], 8, 5, upsample_cfg=SMALL)

    def forward(self, image):
        return self.neck(self.backbone(image))


class Pyramid(nn.Module):
    """Two levels for a neck; the coarser one is half of the finer."""

    def __init__(self, neck):
        super().__init__()
        self.neck = neck

    def forward(self, x):
        finer = nn.functional.interpolate(x, scale_factor=2)
        return self.neck((finer, torch.cat([x, -x], 1)))[0]


class Guided(nn.Module):
    """An upsampler with a guide, which is made of its input."""

    def __init__(self, upsampler):
        super().__init__()
        self.upsampler = upsampler

    def forward(self, x):
        finer = nn.functional.interpolate(x, scale_factor=2)
        return torch.cat(self.upsampler(x, finer.cos()), 1)


def module(**kwargs):
    defaults = dict(channels=8, compressed_channels=4)
    return CARAFE(**{**defaults, **kwargs}), 8


# The new ONNX exporter is slow: it takes time for each upsampler's taps.
SMALL = dict(type='mmcarafe.CARAFE', up_kernel=3, compressed_channels=8)


def neck():
    pytest.importorskip('mmdet')
    return Detector(), 3


def swapped(**cfg):
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    return Pyramid(MODELS.build(dict(in_channels=[8, 16], **cfg))), 8


def pafpn():
    return swapped(
        type='mmcarafe.CARAFEPAFPN',
        out_channels=8,
        num_outs=2,
        upsample_cfg=SMALL,
    )


def yolox():
    return swapped(
        type='mmcarafe.swap_upsample',
        of='YOLOXPAFPN',
        out_channels=8,
        num_csp_blocks=1,
        upsample_cfg=SMALL,
    )


def unet():
    """With F.interpolate in its blocks led to upsamplers."""
    if parse(torch.__version__) < parse('2.6'):
        pytest.skip('torch.compile does not know torch function modes')
    example = torch.randn(1, 3, 16, 24)
    return swap_upsample(Unet(), SMALL, example), 3


def head():
    pytest.importorskip('mmseg')
    cfg = Config.fromfile(ROOT / UPERNET)
    init_default_scope('mmseg')
    cfg.model.auxiliary_head = None
    cfg.model.decode_head.pool_scales = (1, 3)
    for place in ('ppm', 'fpn', 'fuse'):
        cfg.model.decode_head[f'{place}_upsample_cfg'] = SMALL
    return MODELS.build(cfg.model), 3


MODELS_OF = {
    'module': module,
    'two_groups': lambda: module(
        up_kernel=3, up_group=2, normalizer='sigmoid_normalized'
    ),
    'renormalized': lambda: module(
        up_kernel=3, up_group=2, border='renormalize', init='bilinear'
    ),
    'renormalized_sigmoids': lambda: module(
        scale_factor=3,
        up_kernel=3,
        normalizer='sigmoid_normalized',
        border='renormalize',
    ),
    'times_three': lambda: module(
        scale_factor=3, up_kernel=3, normalizer='sigmoid', out_channels=4
    ),
    'dysample': lambda: (DySample(8, style='pl', dyscope=True), 8),
    'freqfusion': lambda: (
        Guided(
            FreqFusion(
                8,
                lowpass_kernel=3,
                up_group=2,
                compressed_channels=8,
                feature_resample=True,
            )
        ),
        8,
    ),
    'ready_masks': lambda: (Masks(), 8),
    'neck': neck,
    'pafpn': pafpn,
    'yolox': yolox,
    'unet': unet,
    'head': head,
}
# How close two ways of sampling come. grid_sample, which the models themselves
# run, has positions from -1 to 1 in fp32: they are off by up to 250 / 2^23 of
# a pixel, and by twice that in FreqFusion, which samples the upsampled map.
SAMPLED = dict(dysample=1e-4, freqfusion=2e-4)
for_each_model = pytest.mark.parametrize('name', MODELS_OF)
# mmseg's warning, whenever one of its heads is built
pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
]


def build(name, smaller=True):
    """A model whose weights differ from pixel to pixel, and its inputs."""
    model, channels = MODELS_OF[name]()
    for parameter_name, parameter in model.named_parameters():
        if re.search(r'content_encoder2?\.weight', parameter_name):
            nn.init.normal_(parameter, std=0.1)
        if 'offset' in parameter_name:  # by about a pixel
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    sizes = [*SIZES, SMALLER] if smaller else SIZES
    images = [torch.randn(n, channels, h, w) for n, h, w in sizes]
    return model.eval(), images


def dynamic():
    auto = torch.export.Dim.DYNAMIC
    return ({0: auto, 2: auto, 3: auto},)


@for_each_model
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()  # its limit of recompilations is per function
    model, images = build(name)
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend='eager'
    )
    with torch.no_grad():
        for image in images:
            assert_close(compiled(image), model(image))


@for_each_model
def test_compiles_with_its_backward(name):
    """Forward and backward in one graph each, as training compiles them."""
    torch._dynamo.reset()
    model, images = build(name)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')

    def gradients(model_or_compiled):
        image = images[0].clone().requires_grad_()
        outs = model_or_compiled(image)
        outs = [outs] if isinstance(outs, torch.Tensor) else outs
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = sum(out.square().mean() for out in outs)
        return torch.autograd.grad(
            total, [image, *parameters], allow_unused=True
        )

    for got, want in zip(gradients(compiled), gradients(model)):
        assert_close(got, want)


@needs_export
@for_each_model
def test_torch_export(name):
    model, images = build(name, smaller=False)
    with torch.no_grad():
        program = torch.export.export(
            model, (images[0],), dynamic_shapes=dynamic()
        )
        targets = {str(node.target) for node in program.graph.nodes}
        sampled = name in SAMPLED
        if sampled:
            assert 'aten.gather.default' in targets
        if name != 'dysample':
            assert 'mmcarafe.reassemble.default' in targets
        close = dict(rtol=0, atol=SAMPLED[name]) if sampled else {}
        for image in images:
            assert_close(program.module()(image), model(image), **close)


@pytest.fixture
def export_onnx(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import export_onnx

    return export_onnx


@needs_onnx
@pytest.mark.parametrize('exporter', ['torchscript', 'dynamo'])
@for_each_model
def test_onnx(name, exporter, export_onnx, tmp_path):
    import onnx
    import onnxruntime

    if exporter == 'dynamo' and not export_onnx.has_dynamo():
        pytest.skip('this torch has the old exporter only')
    model, images = build(name)
    file = str(tmp_path / 'model.onnx')
    outputs = [f'level{i}' for i in range(5)] if name == 'neck' else ['out']
    export_onnx.export(model, images[0], file, exporter, 17, outputs)
    proto = onnx.load(file)
    assert [(o.domain, o.version) for o in proto.opset_import] == [('', 17)]
    assert {node.domain for node in proto.graph.node} == {''}
    # TensorRT compiles it wrongly.
    assert 'GridSample' not in {node.op_type for node in proto.graph.node}
    assert not proto.functions
    session = onnxruntime.InferenceSession(
        file, providers=['CPUExecutionProvider']
    )
    for image in images:
        with torch.no_grad():
            expected = model(image)
        if isinstance(expected, torch.Tensor):
            expected = [expected]
        (given,) = session.get_inputs()
        outs = session.run(None, {given.name: image.numpy()})
        assert len(outs) == len(expected)
        for out, want in zip(outs, expected):
            # of the largest value, as the tool checks
            atol = 1e-5 * max(1, want.abs().max().item())
            if name in SAMPLED:
                atol *= SAMPLED[name] / 1e-5
            assert_close(torch.from_numpy(out), want, rtol=0, atol=atol)


@needs_onnx
def test_opset_13(export_onnx, tmp_path):
    import onnx

    model, images = build('two_groups')
    file = str(tmp_path / 'model.onnx')
    export_onnx.export(model, images[0], file, 'torchscript', 13)
    proto = onnx.load(file)
    assert [(o.domain, o.version) for o in proto.opset_import] == [('', 13)]
    onnx.checker.check_model(proto, full_check=True)


@needs_onnx
def test_onnx_holds_no_unfolded_features(export_onnx, tmp_path):
    """No value is larger than the output; unfolded, it would be 6 times."""
    import onnx
    import onnxruntime

    model, _ = module(channels=32)  # more values than the 100 logits have
    file = str(tmp_path / 'model.onnx')
    image = torch.zeros(1, 32, 8, 8)
    export_onnx.export(model.eval(), image, file, 'torchscript', 17)
    proto = onnx.load(file)
    del proto.graph.output[:]
    for node in proto.graph.node:
        for name in node.output:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    values = session.run(None, dict(image=image.numpy()))
    assert len(values) > 25
    assert max(value.size for value in values) == 32 * 16 * 16


@pytest.mark.parametrize('size', [(1, 1), (2, 5), (4, 6), (7, 13)])
@pytest.mark.parametrize('bins', [1, 2, 3, 6])
def test_adaptive_pooling(bins, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    want = nn.functional.adaptive_avg_pool2d(x, bins)
    assert_close(export.adaptive_avg_pool2d(x, (bins, bins)), want)


def run_tool(*args):
    return subprocess.run(
        [sys.executable, ROOT / 'tools/export_onnx.py', *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_onnx
@pytest.mark.parametrize('exporter', ['torchscript', 'dynamo'])
def test_tool(exporter, export_onnx, tmp_path):
    pytest.importorskip('mmseg')
    if exporter == 'dynamo' and not export_onnx.has_dynamo():
        pytest.skip('this torch has the old exporter only')
    import onnxruntime
    from mmseg.apis import inference_model, init_model

    config = tmp_path / 'config.py'
    # One tap: the other tests export more, and this one all of the tool.
    small = dict(fpn_upsample_cfg=dict(SMALL, up_kernel=1))
    small.update(ppm_upsample_cfg=None, fuse_upsample_cfg=None)
    config.write_text(
        f'_base_ = {str(ROOT / UPERNET)!r}\n'
        f'model = dict(pretrained=None, decode_head={small})\n'
    )
    cfg = Config.fromfile(config)
    cfg.test_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='PackSegInputs'),
    ]
    cfg.test_dataloader.dataset.pipeline = cfg.test_pipeline
    model = init_model(cfg, device='cpu')
    checkpoint = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    out = tmp_path / 'model.onnx'
    process = run_tool(
        *(config, checkpoint, '--out', out, '--exporter', exporter)
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('largest difference') == 3

    image = torch.randint(256, (70, 101, 3), dtype=torch.uint8).numpy()
    session = onnxruntime.InferenceSession(out)
    blob = image.transpose(2, 0, 1)[None].astype('float32')
    (logits,) = session.run(None, dict(image=blob))
    expected = inference_model(model, image).seg_logits.data
    assert_close(torch.from_numpy(logits[0]), expected, rtol=0, atol=1e-5)


@needs_onnx
def test_tool_writes_nothing_when_the_check_fails(
    export_onnx, tmp_path, monkeypatch
):
    pytest.importorskip('mmseg')
    segment = export_onnx.segment
    monkeypatch.setattr(
        export_onnx, 'segment', lambda *args: segment(*args) + 1e-4
    )
    out = tmp_path / 'model.onnx'
    monkeypatch.setattr(sys, 'argv', ['', UPERNET, '--out', str(out)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match='onnxruntime differs from PyTorch'):
        export_onnx.main()
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_tool_compares_with_what_was_not_changed_for_the_export(
    export_onnx, tmp_path, monkeypatch
):
    """A wrong pooling in the file is a difference, not what PyTorch does."""
    pytest.importorskip('mmseg')
    monkeypatch.setattr(
        export_onnx,
        'adaptive_avg_pool2d',
        lambda x, size: export.adaptive_avg_pool2d(x + 1, size),
    )
    out = tmp_path / 'model.onnx'
    monkeypatch.setattr(sys, 'argv', ['', UPERNET, '--out', str(out)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match='onnxruntime differs from PyTorch'):
        export_onnx.main()
    assert not out.exists()


@needs_onnx
def test_tool_names_the_other_exporter(
    export_onnx, tmp_path, monkeypatch, capsys
):
    def fails(*args):
        raise RuntimeError('an operator that is unknown')

    pytest.importorskip('mmseg')
    monkeypatch.setattr(export_onnx, 'export', fails)
    out = tmp_path / 'model.onnx'
    monkeypatch.setattr(sys, 'argv', ['', UPERNET, '--out', str(out)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(RuntimeError, match='an operator that is unknown'):
        export_onnx.main()
    assert '--exporter dynamo may work' in capsys.readouterr().err


@needs_onnx
def test_tool_refuses_weights_of_another_model(tmp_path):
    pytest.importorskip('mmseg')
    checkpoint = tmp_path / 'weights.pth'
    torch.save(dict(state_dict={}, meta={}), checkpoint)
    process = run_tool(UPERNET, checkpoint, '--out', tmp_path / 'model.onnx')
    assert process.returncode == 1
    assert f'{checkpoint} does not fit this config' in process.stderr
    assert ' weights fit; missing: backbone.' in process.stderr
    assert not (tmp_path / 'model.onnx').exists()


@needs_onnx
@pytest.mark.parametrize(
    'config', [UPERNET, 'configs/shapes/upernet_r18_shapes.py']
)
def test_tool_exports_whole_configs(config, tmp_path):
    """CARAFE of K=5 in all places, and the baseline."""
    pytest.importorskip('mmseg')
    out = tmp_path / 'model.onnx'
    process = run_tool(config, '--out', out)
    assert process.returncode == 0, process.stderr
    assert out.exists()


@pytest.mark.parametrize(
    'args, message',
    [
        (['missing.py'], 'there is no file missing.py'),
        ([UPERNET, 'missing.pth'], 'there is no checkpoint missing.pth'),
        ([UPERNET, '--opset', '18'], '--opset is 18, expected 13 to 17'),
        (
            [UPERNET, '--opset', '16', '--exporter', 'dynamo'],
            '--opset is 16, expected 17 to 17',
        ),
        ([UPERNET, '--out', 'no/model.onnx'], '--out: there is no folder no'),
        ([UPERNET, '--out', 'tests'], 'tests is a folder, expected a file'),
        (
            ['configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'],
            'is not an mmseg config',
        ),
        (
            [UPERNET, '--cfg-options', 'model.test_cfg.mode=slide'],
            'model.test_cfg.mode: expected whole',
        ),
    ],
)
@needs_onnx
def test_tools_mistakes_end_in_one_line(args, message):
    pytest.importorskip('mmseg')
    process = run_tool(*args)
    assert process.returncode == 1
    assert message in process.stderr.splitlines()[-1]
