"""swap_upsample with an example input, in models of every common structure.

Those here are built as others build theirs: torchvision's feature pyramid,
the decoders of segmentation_models.pytorch, and YOLOs.
"""

import copy
import io
import math
import re
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mmcarafe import CARAFE, SAPA, swap_upsample
from mmcarafe.upsamplers.swap import ByChannels

CARAFE_CFG = dict(type='mmcarafe.CARAFE', compressed_channels=4)


def conv(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Pyramid(nn.Module):
    """An encoder: maps of 4, 8 and 12 channels, at strides 1, 2 and 4."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [conv(3, 4), conv(4, 8, stride=2), conv(8, 12, stride=2)]
        )

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Layers(nn.Module):
    """A decoder of nn.Upsample layers, with the logits resized by another."""

    def __init__(self):
        super().__init__()
        self.encoder = Pyramid()
        self.up1 = nn.UpsamplingNearest2d(scale_factor=2)
        self.fuse1 = conv(20, 8)
        self.up2 = nn.Upsample(scale_factor=2)
        self.head = nn.Sequential(
            conv(12, 6),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 2, 1),
            nn.Upsample(scale_factor=2, mode='bilinear'),
            nn.Softmax(1),
        )

    def forward(self, x):
        high, middle, x = self.encoder(x)
        x = self.fuse1(torch.cat([self.up1(x), middle], 1))
        return self.head(torch.cat([self.up2(x), high], 1))


class UnetBlock(nn.Module):
    def __init__(self, inputs, skip, outputs):
        super().__init__()
        self.conv = conv(inputs + skip, outputs)

    def forward(self, x, height, width, skip=None):
        x = F.interpolate(x, size=(height, width), mode='nearest')
        return self.conv(torch.cat([x, skip], 1))


class Unet(nn.Module):
    """As in segmentation_models.pytorch: blocks upsample to a skip's size."""

    def __init__(self):
        super().__init__()
        self.encoder = Pyramid()
        self.blocks = nn.ModuleList([UnetBlock(12, 8, 8), UnetBlock(8, 4, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        *skips, x = self.encoder(x)
        for block, skip in zip(self.blocks, skips[::-1]):
            x = block(x, *skip.shape[2:], skip=skip)
        return self.head(x)


class FPNBlock(nn.Module):
    def __init__(self, skip):
        super().__init__()
        self.skip_conv = nn.Conv2d(skip, 8, 1)

    def forward(self, x, skip):
        x = F.interpolate(x, scale_factor=2.0, mode='nearest')
        return x + self.skip_conv(skip)


class SMPFPN(nn.Module):
    """As in segmentation_models.pytorch: blocks upsample by a factor."""

    def __init__(self):
        super().__init__()
        self.encoder = Pyramid()
        self.p3 = nn.Conv2d(12, 8, 1)
        self.p2, self.p1 = FPNBlock(8), FPNBlock(4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        c1, c2, c3 = self.encoder(x)
        x = self.p1(self.p2(self.p3(c3), c2), c1)
        return F.interpolate(self.head(x), scale_factor=2, mode='bilinear')


class FeaturePyramidNetwork(nn.Module):
    """Works and is called as torchvision's."""

    def __init__(self, in_channels, out_channels=8):
        super().__init__()
        self.inner_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, out_channels, 1)) for c in in_channels
        )
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1))
            for c in in_channels
        )
        self.extra_blocks = None

    def get_result_from_inner_blocks(self, x, index):
        return self.inner_blocks[index](x)

    def get_result_from_layer_blocks(self, x, index):
        return self.layer_blocks[index](x)

    def forward(self, x):
        names, maps = list(x.keys()), list(x.values())
        merged = self.get_result_from_inner_blocks(maps[-1], -1)
        outs = [self.get_result_from_layer_blocks(merged, -1)]
        for i in range(len(maps) - 2, -1, -1):
            lateral = self.get_result_from_inner_blocks(maps[i], i)
            size = lateral.shape[-2:]
            merged = lateral + F.interpolate(merged, size=size)
            outs.insert(0, self.get_result_from_layer_blocks(merged, i))
        if self.extra_blocks is not None:
            outs, names = self.extra_blocks(outs, maps, names)
        return OrderedDict(zip(names, outs))


FeaturePyramidNetwork.__module__ = 'torchvision.ops.feature_pyramid_network'


class Detector(nn.Module):
    """As torchvision's: the pyramid is in the backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.body = Pyramid()
        self.backbone.fpn = FeaturePyramidNetwork([4, 8, 12])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        maps = self.backbone.body(x)
        maps = OrderedDict((f'feat{i}', x) for i, x in enumerate(maps))
        outs = self.backbone.fpn(maps)
        assert list(outs) == ['feat0', 'feat1', 'feat2']
        return [self.head(x) for x in outs.values()]


class Concat(nn.Module):
    def forward(self, x):
        return torch.cat(x, 1)


class Yolo(nn.Module):
    """As ultralytics': a list of layers that say where their input is from."""

    def __init__(self):
        super().__init__()
        layers = [
            (-1, conv(3, 4)),
            (-1, conv(4, 8, stride=2)),
            (-1, conv(8, 12, stride=2)),
            (-1, nn.Upsample(scale_factor=2, mode='nearest')),
            ([-1, 1], Concat()),
            (-1, conv(20, 8)),
            (-1, nn.Upsample(None, 2, 'nearest')),
            ([-1, 0], Concat()),
            (-1, conv(12, 4)),
        ]
        self.model = nn.Sequential(*(layer for _, layer in layers))
        for i, (source, layer) in enumerate(layers):
            layer.i, layer.f = i, source
            layer.type = type(layer).__name__
            layer.np = sum(p.numel() for p in layer.parameters())

    def forward(self, x):
        outs = []
        for m in self.model:
            if m.f != -1:
                x = [x if j == -1 else outs[j] for j in m.f]
            x = m(x)
            outs.append(x)
        return x


class Mixed(nn.Module):
    """Interpolates in its own forward, before and after children that do."""

    def __init__(self):
        super().__init__()
        self.encoder = Pyramid()
        self.reduce = nn.Conv2d(12, 8, 1)
        self.block = FPNBlock(8)
        self.layer = nn.Upsample(scale_factor=2)
        self.to_size = nn.Upsample(size=(16, 24))
        self.fpn = FeaturePyramidNetwork([4, 8, 12])
        self.head = nn.Conv2d(48, 2, 1)

    def forward(self, x):
        c1, c2, c3 = self.encoder(x)
        size = c1.shape[2:]
        reduced = self.reduce(c3)
        pooled = F.adaptive_avg_pool2d(c2, (4, 6))
        fine = [
            F.interpolate(pooled, size),
            self.layer(self.block(reduced, c2)),
            F.interpolate(c2, scale_factor=2),
            self.to_size(c2),
            self.fpn(OrderedDict(a=c1, b=c2, c=c3))['a'],
            F.interpolate(reduced, size),
        ]
        x = self.head(torch.cat(fine, 1))
        return F.interpolate(x, scale_factor=2)


OUTPUT = 'it resizes the output: no layer with parameters follows it'
# Upsamplers that each gets, with their channels; and what the log says is left
# alone.
MODELS = {
    Layers: ({'up1': 12, 'up2': 8}, {('head.3', OUTPUT)}),
    Unet: (
        {
            'blocks.0.upsample_modules.0': 12,
            'blocks.1.upsample_modules.0': 8,
        },
        set(),
    ),
    SMPFPN: (
        {'p2.upsample_modules.0': 8, 'p1.upsample_modules.0': 8},
        {('SMPFPN', OUTPUT)},
    ),
    Detector: (
        {
            'backbone.fpn.upsample_modules.0': 8,
            'backbone.fpn.upsample_modules.1': 8,
        },
        set(),
    ),
    Yolo: ({'model.3': 12, 'model.6': 8}, set()),
    Mixed: (
        {
            'block.upsample_modules.0': 8,
            'layer': 8,
            'upsample_modules.1': 8,
            'upsample_modules.2': 8,
            'fpn.upsample_modules.0': 8,
            'fpn.upsample_modules.1': 8,
        },
        {
            ('Mixed', 'its input was pooled to a fixed size'),
            ('to_size', 'its size is fixed: (16, 24)'),
            ('Mixed', OUTPUT),
        },
    ),
}
every_model = pytest.mark.parametrize(
    'build', MODELS, ids=lambda build: build.__name__
)


def image(height=16, width=24):
    return torch.randn(2, 3, height, width)


def outputs(model, x):
    out = model(x)
    return out if isinstance(out, list) else [out]


@pytest.fixture
def log(monkeypatch):
    """The lines that go to mmengine's current log."""
    lines = []

    def print_log(message, logger):
        assert logger == 'current'
        lines.append(message)

    monkeypatch.setattr('mmengine.logging.print_log', print_log)
    return lines


@every_model
def test_only_the_upsampling_changes(build):
    """With the interpolation that was there, all is as it was."""
    model, x = build().eval(), image()
    with torch.no_grad():
        expected = outputs(model, x)
        names = list(model.state_dict())
        assert swap_upsample(model, 'nearest', x) is model
        assert_close(outputs(model, x), expected, rtol=0, atol=0)
    assert list(model.state_dict()) == names
    new = [
        name for name, m in model.named_modules() if name in MODELS[build][0]
    ]
    assert len(new) == len(MODELS[build][0])


@every_model
def test_what_is_replaced_and_what_is_left_alone(build, log):
    model = build()
    before = model.state_dict()
    swap_upsample(model, CARAFE_CFG, image())
    added = {n: m for n, m in model.named_modules() if isinstance(m, CARAFE)}
    upsamplers, left = MODELS[build]
    assert {n: m.channels for n, m in added.items()} == upsamplers
    assert all(m.training for m in added.values())
    after = model.state_dict()
    assert {n for n in after if n not in before} == {
        f'{name}.{key}' for name in added for key in added[name].state_dict()
    }
    said = '\n'.join(log)
    found = re.findall('the interpolation in (.+) is left alone: (.+)', said)
    assert set(found) == left
    for name in upsamplers:
        place = re.sub(r'\.?upsample_modules.*', '', name) or build.__name__
        assert f'mmcarafe: the upsampling in {place} is replaced' in log


def test_without_mmengine_it_is_printed(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, 'mmengine.logging')
    swap_upsample(SMPFPN(), CARAFE_CFG, image())
    assert capsys.readouterr().out.splitlines() == [
        'mmcarafe: the upsampling in p2 is replaced',
        'mmcarafe: the upsampling in p1 is replaced',
        f'mmcarafe: the interpolation in SMPFPN is left alone: {OUTPUT}',
    ]


@every_model
def test_all_new_parameters_are_trained(build):
    model, x = build(), image()
    names = {name for name, _ in model.named_parameters()}
    swap_upsample(model, CARAFE_CFG, x)
    new = {n: p for n, p in model.named_parameters() if n not in names}
    before = {name: p.detach().clone() for name, p in new.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(out.square().mean() for out in outputs(model, x)).backward()
    optimizer.step()
    for name, parameter in new.items():
        assert parameter.grad.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


@every_model
def test_copies_are_equal_and_their_own(build, monkeypatch):
    model, x = swap_upsample(build(), CARAFE_CFG, image()).eval(), image()
    file = io.BytesIO()
    with monkeypatch.context() as patch:
        # torchvision's may not be there
        patch.setattr(FeaturePyramidNetwork, '__module__', __name__)
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    rebuilt = swap_upsample(build(), CARAFE_CFG, image()).eval()
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = outputs(model, x)
        for other in (copy.deepcopy(model), loaded, rebuilt):
            assert_close(outputs(other, x), expected, rtol=0, atol=0)
            for parameter in other.parameters():
                parameter.fill_(1)
        assert_close(outputs(model, x), expected, rtol=0, atol=0)


@every_model
def test_compiles_without_a_graph_break(build):
    torch._dynamo.reset()
    model, x = swap_upsample(build(), CARAFE_CFG, image()).eval(), image()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        assert_close(outputs(compiled, x), outputs(model, x))


@every_model
def test_a_second_time_there_is_nothing_left(build):
    model = swap_upsample(build(), CARAFE_CFG, image())
    before = list(model.modules())
    with pytest.raises(ValueError, match=f'{build.__name__} holds no upsamp'):
        swap_upsample(model, 'nearest', image())
    assert list(model.modules()) == before


@pytest.mark.parametrize('build', [Unet, Detector])
def test_odd_sizes(build):
    """Found out with odd sizes, and run with others."""
    model = swap_upsample(build(), CARAFE_CFG, image(25, 33))
    for height, width in [(25, 33), (26, 35), (24, 32)]:
        out = outputs(model, image(height, width))[0]
        assert out.shape == (2, 2, height, width)


def test_an_odd_map_is_cropped():
    """7 pixels were halved to 4; the upsampled 8 lose the last."""
    model = swap_upsample(Unet(), 'nearest', image(7, 7)).eval()
    seen = []
    model.blocks[1].conv.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model.blocks[0].register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    model(image(7, 7))
    low, high = seen
    repeated = low.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(high[:, :8], repeated[:, :, :7, :7])


def test_the_dry_run_leaves_the_model_as_it_is():
    model, x = Layers(), image()
    model.fuse1.append(nn.Dropout())
    model.encoder.eval()  # frozen
    grad_modes = []
    handle = model.register_forward_hook(
        lambda *_: grad_modes.append(torch.is_grad_enabled())
    )
    flags = {m: m.training for m in model.modules()}
    before = copy.deepcopy(model.state_dict())
    random, image_before = torch.get_rng_state(), x.clone()
    with pytest.raises(ValueError, match="'no such upsampler'"):
        swap_upsample(model, 'no such upsampler', x)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, image_before) and not vars(x)
    assert {m: m.training for m in model.modules()} == flags
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert grad_modes == [False]
    handle.remove()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not vars(module).keys() & {'upsample_modules', 'init_weights'}
    swap_upsample(model, CARAFE_CFG, x)
    for module, training in flags.items():
        assert module.training == training


# Layers


def test_a_layer_keeps_what_others_stored_on_it():
    model = Yolo()
    layer = model.model[6]
    layer.channels = 'of others'
    counts = []
    handle = layer.register_forward_hook(lambda *_: counts.append(1))
    swap_upsample(model, CARAFE_CFG, image())
    counts.clear()  # of the dry run
    new = model.model[6]
    assert isinstance(new, CARAFE)
    assert (new.i, new.f, new.type, new.np) == (6, -1, 'Upsample', 0)
    assert (new.channels, new.scale_factor) == (8, 2)
    assert not hasattr(new, 'align_corners')
    assert [m.i for m in model.model] == list(range(9))
    model(image())
    assert counts == [1]
    handle.remove()
    model(image())
    assert counts == [1]


class Shared(nn.Module):
    """One layer under two names, with 12 and 8 channels."""

    def __init__(self):
        super().__init__()
        self.encoder = Pyramid()
        self.up = nn.Upsample(scale_factor=2)
        self.branch = nn.ModuleDict(dict(up=self.up))
        self.conv = conv(12, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv(self.up(self.encoder(x)[-1]))
        return self.head(self.branch['up'](x))


def test_a_shared_layer():
    model = swap_upsample(Shared(), CARAFE_CFG, image())
    assert type(model.up) is ByChannels
    assert model.branch['up'] is model.up
    assert {k: m.channels for k, m in model.up.items()} == {'12': 12, '8': 8}
    assert model(image()).shape == (2, 2, 16, 24)


def test_as_many_channels_everywhere_share_one_upsampler():
    model = Shared()
    model.conv = conv(12, 12)
    model.head = nn.Conv2d(12, 2, 1)
    swap_upsample(model, CARAFE_CFG, image())
    assert type(model.up) is CARAFE
    assert model.branch['up'] is model.up


class Between(nn.Module):
    """One interpolation between two convolutions."""

    def __init__(self, interpolate):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.interpolate = interpolate
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.interpolate(self.first(x)))


def layer(**kwargs):
    return lambda: Between(nn.Upsample(**kwargs))


def function(**kwargs):
    return lambda: Between(lambda x: F.interpolate(x, **kwargs))


def inside(change):
    """Between the convolutions also something else happens to the maps."""
    return lambda: Between(
        nn.Sequential(Function(change), nn.Upsample(scale_factor=2))
    )


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def assigned(x):
    y = torch.zeros(2, 8, 16, 24)
    y[:] = x
    return y


@torch.jit.script
def scripted(x):
    return x * 2


def weight_normed():
    model = layer(scale_factor=2)()
    for conv in (model.first, model.last):
        conv.bias = None
        torch.nn.utils.parametrizations.weight_norm(conv)
    return model


@pytest.mark.parametrize(
    'build',
    [
        layer(scale_factor=4, mode='bicubic'),
        layer(scale_factor=(2.0, 2.0), mode='nearest-exact'),
        function(scale_factor=3),
        function(size=(32, 48), mode='bilinear', align_corners=True),
        function(size=(31, 47)),
        # no parameter is an argument of these convolutions
        weight_normed,
        # data from other sources
        inside(lambda x: x + torch.ones(16, 24)),
        inside(assigned),
        # torch does not show what happens here
        inside(scripted),
        # as in squeeze and excitation
        inside(lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid()),
    ],
)
def test_is_replaced(build):
    model, x = build(), image()
    expected = model(x).shape
    swap_upsample(model, CARAFE_CFG, x)
    (new,) = [m for m in model.modules() if isinstance(m, CARAFE)]
    assert model(x).shape == expected
    assert new.scale_factor == math.ceil(expected[2] / 16)


def pooled(**kwargs):
    def build():
        model = layer(**kwargs)()
        model.first = nn.Sequential(
            nn.AdaptiveAvgPool2d((8, 12)), model.first, nn.ReLU()
        )
        return model

    return build


def averaged():
    model = function(size=(2, 2))()
    mean = Function(lambda x: x.mean((2, 3), keepdim=True))
    model.first = nn.Sequential(model.first, mean)
    return model


def tiny(**kwargs):
    """2x2 pixels, of which half as many more are 3."""

    def build():
        model = function(**kwargs)()
        model.first = nn.Sequential(nn.AvgPool2d((8, 12)), model.first)
        return model

    return build


def taken():
    model = function(scale_factor=2)()
    model.upsample_modules = nn.Identity()
    return model


def unused():
    model = Between(nn.Identity())
    model.unused = nn.Upsample(scale_factor=2)
    return model


def bound():
    model = layer(scale_factor=2)()
    forward = model.interpolate.forward
    model.interpolate.forward = lambda x: forward(x)
    return model


def named(name):
    def build():
        model = nn.Sequential()
        model.add_module(name, layer(scale_factor=2)())
        return model

    return build


class Twice(nn.Module):
    """One module by two factors."""

    def __init__(self):
        super().__init__()
        self.between = function(size=(32, 48))()
        self.between.last = nn.Conv2d(8, 3, 1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        halved = F.avg_pool2d(x, 2)
        return self.last(self.between(x) + self.between(halved))


class Embedded(nn.Module):
    """As in a vision transformer: embeddings of positions are interpolated."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.positions = nn.Parameter(torch.zeros(1, 8 * 12, 8))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        positions = self.positions.mT.unflatten(2, (8, 12))
        positions = F.interpolate(positions, (16, 24), mode='bicubic')
        return self.last(self.first(x) + positions)


@pytest.mark.parametrize(
    'build, reason',
    [
        (layer(scale_factor=8), 'its factor 8 is above 4'),
        (layer(scale_factor=1.5), 'from 16x24 to 24x36 is no whole factor'),
        (tiny(scale_factor=1.5), 'from 2x2 to 3x3 is no whole factor'),
        (taken, 'the module has upsample_modules already'),
        (Twice, r'its factor is one of \[2, 4\]'),
        (layer(scale_factor=(1, 2)), 'from 16x24 to 16x48 is no whole'),
        (layer(scale_factor=0.5), 'from 16x24 to 8x12 is no whole factor'),
        (layer(size=(32, 48)), r'its size is fixed: \(32, 48\)'),
        (function(size=(32, 45)), 'from 16x24 to 32x45 is no whole factor'),
        (function(size=(16, 24)), 'from 16x24 to 16x24 is no whole factor'),
        (function(scale_factor=2, mode='area'), "its mode is 'area'"),
        (pooled(scale_factor=2), 'its input was pooled to a fixed size'),
        (averaged, 'from 1x1 to 2x2 does not tell the factor'),
        (unused, 'in unused is left alone: the dry run does not see it'),
        (bound, 'somebody set another forward on this instance'),
        (
            named('encoder'),
            'in encoder.interpolate is left alone: it is in the encoder',
        ),
        (
            named('backbone'),
            'in backbone.interpolate .*: it is in the backbone',
        ),
        (Embedded, 'it resizes the input: no layer with parameters prec'),
        (
            lambda: nn.Sequential(
                nn.Upsample(None, 2), Between(nn.Identity())
            ),
            'in 0 is left alone: it resizes the input: no layer with param',
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Upsample(None, 2)),
            f'in 1 is left alone: {OUTPUT}',
        ),
        (
            lambda: nn.Conv2d(3, 3, 1),
            'it interpolates nothing with example_input',
        ),
    ],
)
def test_is_left_alone(build, reason):
    model = build()
    with pytest.raises(ValueError, match=f'no upsampling .*{reason}'):
        swap_upsample(model, CARAFE_CFG, image())


def test_a_layer_that_is_left_alone_once_is_left_alone():
    """It also resizes the output."""
    model = Shared()
    model.head = nn.Identity()
    with pytest.raises(ValueError, match=f'in up is left alone: {OUTPUT}'):
        swap_upsample(model, CARAFE_CFG, image())


def test_a_size_may_be_one_number():
    model = function(size=32)()
    swap_upsample(model, CARAFE_CFG, image(16, 16))
    assert model(image(16, 16)).shape == (2, 2, 32, 32)


# torchvision's pyramid


def test_the_pyramid_upsamples_with_a_guide():
    model = FeaturePyramidNetwork([4, 8, 12])
    maps = OrderedDict(
        a=torch.randn(2, 4, 13, 22),
        b=torch.randn(2, 8, 7, 11),
        c=torch.randn(2, 12, 4, 6),
    )
    swap_upsample(model, 'SAPA', (maps,))
    assert {type(m) for m in model.upsample_modules.values()} == {SAPA}
    outs = model(maps)
    laterals = [conv(x) for conv, x in zip(model.inner_blocks, maps.values())]
    for i in (1, 0):
        # the guide of 7 or 13 pixels is extended to 8 or 14
        height, width = laterals[i].shape[2:]
        guide = F.pad(
            laterals[i], (0, width % 2, 0, height % 2), mode='replicate'
        )
        # the coarsest level is upsampled first
        up = model.upsample_modules[str(1 - i)](laterals[i + 1], guide)
        laterals[i] = laterals[i] + up[:, :, :height, :width]
    for i, name in enumerate('abc'):
        assert_close(outs[name], model.layer_blocks[i](laterals[i]))
    model.extra_blocks = lambda outs, maps, names: (
        [*outs, maps[-1] + 1],
        [*names, 'pool'],
    )
    outs = model(maps)
    assert list(outs) == ['a', 'b', 'c', 'pool']
    assert torch.equal(outs['pool'], maps['c'] + 1)


def test_the_pyramid_upsamples_by_other_factors():
    """By 1, which stays, and by 4, to a size that is not a multiple."""
    model = FeaturePyramidNetwork([4, 8, 12])
    maps = OrderedDict(
        a=torch.randn(2, 4, 13, 22),
        b=torch.randn(2, 8, 4, 6),
        c=torch.randn(2, 12, 4, 6),
    )
    swap_upsample(model, 'nearest', (maps,))
    assert list(model.upsample_modules) == ['1']
    a, b, c = (conv(x) for conv, x in zip(model.inner_blocks, maps.values()))
    upsampled = (b + c).repeat_interleave(4, 2).repeat_interleave(4, 3)
    merged = [a + upsampled[:, :, :13, :22], b + c, c]
    outs = model(maps)
    for out, conv, x in zip(outs.values(), model.layer_blocks, merged):
        assert_close(out, conv(x))


# What the arguments may be


@pytest.mark.parametrize(
    'example_input',
    [
        (OrderedDict(a=torch.zeros(1, 8, 8, 8), b=torch.zeros(1, 8, 4, 4)),),
        [dict(a=torch.zeros(1, 8, 8, 8), b=torch.zeros(1, 8, 4, 4))],
        dict(x=dict(a=torch.zeros(1, 8, 8, 8), b=torch.zeros(1, 8, 4, 4))),
    ],
    ids=['tuple', 'list', 'dict'],
)
def test_arguments_of_the_model(example_input):
    model = FeaturePyramidNetwork([8, 8])
    swap_upsample(model, CARAFE_CFG, example_input)
    assert type(model.upsample_modules['0']) is CARAFE


def test_dtype_of_the_model():
    model, x = Unet().double(), image().double()
    swap_upsample(model, CARAFE_CFG, x)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model, x = Unet(), image()
    with torch.autocast('cpu', torch.bfloat16):
        swap_upsample(model, CARAFE_CFG, x)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_errors_leave_the_model():
    model = Unet()
    before = list(model.modules())
    classes = list(map(type, before))
    with pytest.raises(
        ValueError,
        match='upsample_cfg for blocks.0 is .* SAPA wants a guide',
    ):
        swap_upsample(model, 'SAPA', image())
    # the first has 12 channels, the second 8
    with pytest.raises(
        ValueError, match='upsample_cfg for blocks.1 is .* divisor of .* = 8'
    ):
        swap_upsample(model, dict(type='CARAFE', up_group=3), image())
    with pytest.raises(
        ValueError,
        match=r'Unet fails with example_input, a Tensor with tensors of '
        r'\[\(2, 4, 16, 24\)\]: RuntimeError: .* to have 3 channels',
    ) as error:
        swap_upsample(model, CARAFE_CFG, torch.randn(2, 4, 16, 24))
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(
        TypeError, match='example_input is a int, expected a Tensor, or a tu'
    ):
        swap_upsample(model, CARAFE_CFG, 3)
    with pytest.raises(ValueError, match='Unet holds no .* Pass example_inpu'):
        swap_upsample(model, CARAFE_CFG)
    assert list(model.modules()) == before
    assert list(map(type, before)) == classes
    assert all(module.training for module in before)


# With OpenMMLab


def test_known_classes_come_first():
    """mmdet's neck, between modules that only a dry run finds."""
    pytest.importorskip('mmdet')
    from mmdet.models.necks import FPN

    from mmcarafe import CARAFEFPN

    class Model(Unet):
        def __init__(self):
            super().__init__()
            self.neck = FPN([4, 8, 12], 8, 3)
            self.blocks = nn.ModuleList(
                [UnetBlock(8, 8, 8), UnetBlock(8, 8, 4)]
            )

        def forward(self, x):
            *skips, x = self.neck(tuple(self.encoder(x)))
            for block, skip in zip(self.blocks, skips[::-1]):
                x = block(x, *skip.shape[2:], skip=skip)
            return self.head(F.interpolate(x, scale_factor=2))

    model, x = Model().eval(), image()
    with torch.no_grad():
        expected = model(x)
        swap_upsample(copy.deepcopy(model), CARAFE_CFG, x)
        swap_upsample(model, 'nearest', x)
        assert_close(model(x), expected, rtol=0, atol=0)
    assert isinstance(model.neck, CARAFEFPN)
    assert list(model.upsample_modules) == ['0']


def test_init_weights_reaches_the_new_upsamplers():
    """A parent initialises all convolutions, as mmengine's init_cfg says."""
    from mmengine.model import BaseModule

    class Model(BaseModule):
        def __init__(self):
            super().__init__(dict(type='Normal', layer='Conv2d', std=1.0))
            self.encoder, self.block = Pyramid(), UnetBlock(12, 8, 8)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            fine, middle, coarse = self.encoder(x)
            x = self.block(coarse, *middle.shape[2:], skip=middle)
            return self.head(F.interpolate(x, fine.shape[2:]))

    for upsample_cfg in (CARAFE_CFG, 'DySample'):
        model = swap_upsample(Model(), upsample_cfg, image())
        model.init_weights()
        assert model.head.weight.std() > 0.1
        for module in (model, model.block):
            (new,) = module.upsample_modules.values()
            conv = getattr(new, 'content_encoder', None) or new.offset
            assert conv.weight.std().item() == pytest.approx(0.001, rel=0.2)
