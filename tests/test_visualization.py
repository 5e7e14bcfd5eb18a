"""Kernels and features made visible: what is recorded, and what is drawn."""

import json
import math
import re
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, save_untrained
from torch import nn

from mmcarafe.ops import reference
from mmcarafe.upsamplers import SAPA, FreqFusion, build_upsampler, match_size
from mmcarafe.upsamplers.carafe import bilinear_weights
from mmcarafe.visualization import (
    KernelRecorder,
    Record,
    center_of_mass,
    chains,
    entropy,
    principal_colors,
    trace,
)

C, H, W = 8, 5, 7  # not square, and large enough for a whole window


def upsampler(kind, channels=C, **options):
    """An upsampler whose kernels differ from pixel to pixel."""
    module = build_upsampler(
        dict(type=kind, **options), channels, guide_channels=C
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def record_one(module, batch=2):
    x = torch.randn(batch, C, H, W)
    inputs = [x]
    if getattr(module, 'guided', False):
        s = module.scale_factor
        inputs.append(torch.randn(batch, C, s * H, s * W))
    with KernelRecorder(module) as recorder, torch.no_grad():
        out = module(*inputs)
    out = out[1] if isinstance(out, tuple) else out
    (record,) = recorder.records
    assert torch.equal(record.before, x) and torch.equal(record.after, out)
    return record


@pytest.mark.parametrize(
    'kind, options',
    [
        ('CARAFE', {}),
        ('CARAFE', dict(up_kernel=3, up_group=2, scale_factor=3)),
        ('CARAFE', dict(border='renormalize')),
        ('CARAFE', dict(normalizer='sigmoid')),
        ('DynamicFilter', dict(up_kernel=3)),
        ('SAPA', {}),
        ('SAPA', dict(embedding_channels=None, up_kernel=3)),
        # of which it also upsamples maps of compressed channels, as many
        ('FreqFusion', dict(compressed_channels=8, up_group=2)),
    ],
)
def test_weights_remake_the_output(kind, options):
    scale = options.pop('scale_factor', 2)
    module = build_upsampler(
        dict(type=kind, **options), C, scale, guide_channels=C
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    record = record_one(module.eval())
    k = record.kernel_size
    assert record.kind == kind and record.scale_factor == scale
    assert k == options.get('up_kernel', 5)
    groups = C if kind == 'DynamicFilter' else options.get('up_group', 1)
    assert record.group_size == groups
    shape = (2, groups, k * k, scale, scale, H, W)
    assert record.weights.shape == shape
    out = reference.reassemble(record.before, record.weights, None)
    torch.testing.assert_close(out, record.after)
    corner = record.weights[:, :, 0, :, :, 0, 0]  # outside the map
    assert (corner == 0).all() == (options.get('border') == 'renormalize')
    if options.get('normalizer') != 'sigmoid':
        sums = record.weights.sum(2)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize('style', ['lp', 'pl'])
def test_positions_remake_the_output(style):
    module = upsampler('DySample', style=style, groups=2, dyscope=True)
    record = record_one(module)
    assert record.weights is None and record.group_size == 2
    for g in range(2):
        rows, columns = record.positions[:, g].unbind(1)
        # grid_sample counts from -1, the first edge, to 1, the last
        grid = torch.stack(
            [(2 * columns + 1) / W - 1, (2 * rows + 1) / H - 1], -1
        )
        half = slice(g * C // 2, (g + 1) * C // 2)
        out = F.grid_sample(
            record.before[:, half],
            grid,
            padding_mode='border',
            align_corners=False,
        )
        torch.testing.assert_close(
            out, record.after[:, half], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize('kind', ['nearest', 'deconv', 'pixel_shuffle'])
def test_others_have_no_kernels(kind):
    record = record_one(upsampler(kind))
    assert record.scale_factor == 2 and not record.has_kernels
    assert chains([record]) == {}
    with pytest.raises(ValueError, match='expected an upsampler with'):
        center_of_mass(record)


def test_a_model_is_left_as_it_was():
    """Names of nested modules, several calls; and no hooks stay."""
    model = nn.Sequential(
        nn.Conv2d(C, C, 1), nn.Sequential(upsampler('CARAFE'))
    )
    x = torch.randn(1, C, H, W)
    plain = model(x)
    with KernelRecorder(model) as recorder:
        assert torch.equal(model(x), plain)
        model(x).sum().backward()
    model(x)
    assert [each.name for each in recorder.records] == ['1.0'] * 2
    for record in recorder.records:
        assert not record.weights.requires_grad
        assert not record.after.requires_grad
    with pytest.raises(TypeError, match='model is a Tensor'):
        KernelRecorder(x)


def test_autocast():
    module = upsampler('CARAFE')
    x = torch.randn(1, C, H, W)
    with KernelRecorder(module) as recorder:
        with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
            module(x)
    (record,) = recorder.records
    assert record.weights.dtype == torch.float32
    out = reference.reassemble(x, record.weights, None)
    torch.testing.assert_close(out, record.after.float(), atol=0.05, rtol=0.05)


def test_freqfusion_upsamples_several_maps():
    """Scores of as many channels as x, with kernels that are not the last."""
    module = FreqFusion(18, lowpass_kernel=3, up_group=2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, guide = torch.randn(1, 18, H, W), torch.randn(1, 18, 2 * H, 2 * W)
    with KernelRecorder(module) as recorder, torch.no_grad():
        module(x, guide)
    with recorder, torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        module(x, guide)
    exact, rounded = recorder.records
    out = reference.reassemble(x, exact.weights, None)
    torch.testing.assert_close(out, exact.after)
    assert (rounded.weights - exact.weights).abs().mean() < 0.02
    with KernelRecorder(module) as recorder, torch.no_grad():
        module(x[:0], guide[:0])  # whose maps all lie nowhere
    assert recorder.records[0].weights.shape == (0, 2, 9, 2, 2, H, W)


# Functions of kernels


def fixed(weights, **more):
    """A record of kernels that are equal everywhere, ``[K*K, S, S]``."""
    taps, s, _ = weights.shape
    return Record(
        'up',
        'CARAFE',
        s,
        torch.zeros(1, C, H, W),
        torch.zeros(1, C, s * H, s * W),
        math.isqrt(taps),
        1,
        weights[None, None, ..., None, None].expand(1, 1, -1, -1, -1, H, W),
    )


def test_entropy():
    even = fixed(torch.full((25, 2, 2), 1 / 25)).weights
    assert entropy(even).shape == (1, 1, 2 * H, 2 * W)
    torch.testing.assert_close(entropy(even), torch.ones(1, 1, 2 * H, 2 * W))
    # one tap; four equal taps of sum 4: 0 and 2 bits, side by side
    weights = torch.zeros(9, 2, 2)
    weights[4, :, 0] = 1
    weights[:4, :, 1] = 1
    bits = entropy(fixed(weights).weights, normalized=False)
    assert (bits[..., ::2] == 0).all()
    torch.testing.assert_close(
        bits[..., 1::2], torch.full((1, 1, 2 * H, W), 2.0)
    )
    with pytest.raises(ValueError, match='weights are as low as -1'):
        entropy(-even * 25)


@pytest.mark.parametrize('scale_factor', [2, 3])
def test_center_of_mass(scale_factor):
    """Zero for bilinear interpolation; one tap to the right is one pixel."""
    weights = bilinear_weights(5, scale_factor)
    center = center_of_mass(fixed(weights))
    s = scale_factor
    assert center.shape == (1, 1, 2, s * H, s * W)
    torch.testing.assert_close(
        center, torch.zeros_like(center), atol=1e-6, rtol=0
    )
    right = center_of_mass(fixed(weights.roll(1, 0) * 3))
    expected = torch.tensor([0.0, 1.0])[:, None, None].expand(center.shape)
    torch.testing.assert_close(right, expected)


def test_center_of_mass_of_dysample():
    module = upsampler('DySample', groups=2)
    nn.init.zeros_(module.offset.weight)
    # to the right for both groups, then downwards, each for 4 subpixels
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(4)
    module.offset.bias.data.copy_(bias)
    center = center_of_mass(record_one(module))[0, :, :, 3, 3]
    expected = torch.tensor([[3.0, 1.0], [4.0, 2.0]]) / 4
    torch.testing.assert_close(center, expected)


class TopDown(nn.Module):
    """A pyramid of three levels whose finest two have an odd size."""

    sizes = [(5, 7), (9, 13), (17, 26)]

    def __init__(self, *kinds):
        super().__init__()
        self.ups = nn.ModuleList(kinds)

    def forward(self, levels):
        x = levels[-1]
        for up, finer in zip(reversed(self.ups), levels[-2::-1]):
            out = up(x, pad(finer, x)) if isinstance(up, SAPA) else up(x)
            x = finer + match_size(out, finer.shape[2:])
        return x

    def levels(self):
        return [torch.randn(1, C, *size) for size in reversed(self.sizes)]


def pad(finer, x):
    height, width = (2 * a - b for a, b in zip(x.shape[2:], finer.shape[2:]))
    return F.pad(finer, (0, width, 0, height))


@pytest.mark.parametrize(
    'kinds',
    [
        [('CARAFE', {}), ('CARAFE', {})],
        [('SAPA', {}), ('CARAFE', dict(up_group=2))],
        [('DySample', dict(groups=4)), ('CARAFE', dict(up_group=2))],
    ],
)
@pytest.mark.parametrize('pixel', [(0, 0), (16, 25), (8, 11)])
def test_trace_is_the_gradient_with_frozen_kernels(kinds, pixel):
    model = TopDown(*(upsampler(kind, **more) for kind, more in kinds))
    with KernelRecorder(model) as recorder, torch.no_grad():
        model(model.levels())
    (chain,) = chains(recorder.records).values()
    assert [each.name for each in chain] == ['ups.0', 'ups.1']
    maps = trace(chain, *pixel)

    fine, coarse = (
        torch.zeros(1, C, *each.before.shape[2:], requires_grad=True)
        for each in chain
    )
    x = coarse
    x = fine + apply(chain[1], x)[:, :, : fine.shape[2], : fine.shape[3]]
    x = apply(chain[0], x)
    # the mean over the channels of one pixel; each channel adds its own
    grads = torch.autograd.grad(
        x[0, :, pixel[0], pixel[1]].mean(), (fine, coarse)
    )
    for found, grad in zip(maps, grads):
        torch.testing.assert_close(found, grad[0].sum(0))
        assert found.count_nonzero() > 0


def apply(record, x):
    """What the record's kernels make of another map, plainly."""
    if record.weights is None:
        groups = x.chunk(record.group_size, 1)
        height, width = x.shape[2:]
        parts = []
        for part, (rows, columns) in zip(groups, record.positions[0]):
            grid = torch.stack(
                [(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1],
                -1,
            )
            parts.append(
                F.grid_sample(
                    part,
                    grid[None],
                    padding_mode='border',
                    align_corners=False,
                )
            )
        return torch.cat(parts, 1)
    s, k, g = record.scale_factor, record.kernel_size, record.group_size
    _, _, height, width = x.shape
    windows = F.unfold(x, k, padding=k // 2).view(
        g, -1, k * k, 1, 1, height, width
    )
    out = (windows * record.weights[0][:, None]).sum(2).flatten(0, 1)
    return out.permute(0, 3, 1, 4, 2).reshape(1, -1, s * height, s * width)


def test_trace_of_bilinear_interpolation():
    """By hand: between two pixels, and then between those of the next map."""
    weights = bilinear_weights(3, 2)
    fine, coarse = fixed(weights), fixed(weights)
    coarse.before = torch.zeros(1, C, 3, 4)
    coarse.after = torch.zeros(1, C, 6, 8)
    coarse.weights = coarse.weights[..., :3, :4]
    near, far = trace([fine, coarse], 5, 4)
    expected = torch.zeros(H, W)
    expected[2:4, 1:3] = torch.tensor([[0.1875, 0.5625], [0.0625, 0.1875]])
    torch.testing.assert_close(near, expected)
    torch.testing.assert_close(far.sum(), torch.tensor(1.0))
    rows, columns = far.sum(1), far.sum(0)
    # of rows 2 (3/4) and 3 (1/4) below: 1/4, 3/4 and 3/4, 1/4 of 0 .. 2
    torch.testing.assert_close(
        rows, torch.tensor([0.75 * 0.25, 0.75 * 0.75 + 0.25 * 0.75, 0.0625])
    )
    torch.testing.assert_close(
        columns,
        torch.tensor(
            [0.25 * 0.75 + 0.75 * 0.25, 0.25 * 0.25 + 0.75 * 0.75, 0, 0]
        ),
    )


def test_trace_says_what_it_cannot():
    record = fixed(bilinear_weights(3, 2))
    with pytest.raises(ValueError, match=r'\(10, 0\).* map of 10 x 14'):
        trace([record], 10, 0)
    with pytest.raises(ValueError, match='expected a chain, finest first'):
        trace([record, record], 0, 0)
    with pytest.raises(ValueError, match='chain is empty'):
        trace([], 0, 0)
    other = Record('up', 'EUCB', 2, record.before, record.after)
    with pytest.raises(ValueError, match='up is a EUCB, expected'):
        trace([other], 0, 0)


def test_chains_of_many_modules():
    """Of maps that are upsampled side by side, the last ones are a chain."""

    def step(name, height):
        record = fixed(bilinear_weights(3, 2))
        record.name = name
        record.before = torch.zeros(1, C, height, W)
        record.after = torch.zeros(1, C, 2 * height, 2 * W)
        return record

    wide = step('head.ups.0.0', 5)
    wide.before = torch.zeros(1, C, 5, 2 * W - 1)
    last = step('head.ups.0.1', 5)
    last.before = torch.zeros(1, C, 5, 2 * W - 1)
    first = step('head.ups.1.0', 3)
    records = [first, wide, last, step('ppm.0', 4), step('ppm.1', 4)]
    assert chains(records) == {
        'head.ups': [last, first],
        'ppm': [records[-1]],
    }


def test_principal_colors():
    """The axis of the largest spread is red, and its ends are 0 and 1."""
    known = torch.zeros(4, 10, 10)
    known[2] = torch.arange(100.0).view(10, 10)  # the largest spread
    known[1] = torch.arange(100.0).view(10, 10).T.cos()
    shown, moved = principal_colors(known, [known, known + 50])
    assert shown.shape == (10, 10, 3)
    assert shown.min() == 0 and shown.max() == 1
    red = shown[..., 0].flatten()
    assert (red.diff() >= 0).all() and red[0] == 0 and red[-1] == 1
    torch.testing.assert_close(
        red[50].item(), (50 - 1.98) / (97.02 - 1.98), atol=0.01, rtol=0
    )
    assert (moved[..., 0] >= shown[..., 0]).all()
    (two,) = principal_colors(known[1:3], [known[1:3]])
    assert (two[..., 2] == 0.5).all()


# Figures


@pytest.fixture
def figures():
    pytest.importorskip('matplotlib', reason='matplotlib is not installed')
    from mmcarafe.visualization import figures

    return figures


def one_hot(places, size=(10, 14)):
    """A record whose kernels are one tap, at a chosen output pixel."""
    weights = torch.zeros(1, 1, 25, 2, 2, H, W)
    weights[:, :, 12] = 1
    record = fixed(torch.zeros(25, 2, 2))
    for row, column, tap in places:
        weights[:, :, :, row % 2, column % 2, row // 2, column // 2] = 0
        weights[:, :, tap, row % 2, column % 2, row // 2, column // 2] = 1
    record.weights = weights
    record.name = 'neck.ups.0'
    record.before = torch.randn(1, C, H, W)
    record.after = torch.randn(1, C, 2 * H, 2 * W)
    return record


def test_strides(figures):
    assert figures.stride_of((97, 97), (4, 4)) == 32
    assert figures.stride_of((97, 97), (25, 25)) == 4
    assert figures.stride_of((64, 96), (64, 96)) == 1


def test_a_window_lies_where_it_is_read(figures):
    """Pixels of 8 in an image of 40 x 56; two rows above the point's own."""
    image = torch.rand(5 * 8, 7 * 8, 3).numpy()
    record = one_hot([(5, 9, 2)])  # tap 2: two rows up, same column
    point = (9 * 4 + 1.0, 5 * 4 + 1.0)  # in output pixel (5, 9), of 4 x 4
    figure = figures.kernels_figure(image, [record], {'here': point})
    left, right = figure.axes[:2]
    _, heat = left.images
    # around source pixel (2, 4): from 2 before it to 2 behind it
    assert heat.get_extent() == [16, 56, 40, 0]
    assert heat.get_array()[0, 2] == 1 and heat.get_array().sum() == 1
    assert right.images[0].get_extent() == [2, 7, 5, 0]
    (cross, _) = right.lines
    assert cross.get_xydata().tolist() == [[4.75, 2.75]]
    assert [box.get_xy() for box in left.patches] == [(16, 0)] * 2
    assert left.patches[0].get_width() == 40
    assert len(right.patches) == 0
    assert right.get_xlabel() == 'largest 100%'


def test_taps_outside_the_map_are_hatched(figures):
    image = torch.rand(40, 56, 3).numpy()
    points = {'first': (0.5, 0.5), 'last': (55.5, 39.5)}
    figure = figures.kernels_figure(image, [one_hot([])], points)
    for axis, row, column in ((figure.axes[1], 0, 0), (figure.axes[3], 4, 6)):
        window = {
            (x, y)
            for x in range(column - 2, column + 3)
            for y in range(row - 2, row + 3)
        }
        inside = {(x, y) for x in range(W) for y in range(H)}
        places = {patch.get_xy() for patch in axis.patches}
        assert places == window - inside


def test_the_outline_holds_nine_tenths(figures):
    image = torch.rand(40, 56, 3).numpy()
    record = one_hot([])
    weights = bilinear_weights(5, 2)[None, None, ..., None, None]
    record.weights = weights.expand(-1, -1, -1, -1, -1, H, W)
    points = {'a': (21.0, 21.0), 'b': (1.0, 1.0)}
    figure = figures.trace_figure(image, [record], points)
    axis, corner = figure.axes[:2]
    # 9/16, 3/16 and 3/16: 15/16 of it; an L of three pixels, twice 8 edges
    edges = [line for line in axis.lines if line.get_gid() != 'point']
    assert len(edges) == 2 * 8
    assert axis.get_xlabel() == 'sum 100%, largest 56%'
    assert corner.get_xlabel() == 'sum 56%, largest 56%'


def test_nothing_hides_the_pixel(figures):
    """Strokes point at the 4 x 4 pixels from above, below, left and right."""
    image = torch.rand(40, 56, 3).numpy()
    record = one_hot([])
    for draw in figures.trace_figure, figures.kernels_figure:
        axis = draw(image, [record], {'a': (21.0, 17.0)}).axes[0]
        strokes = [each for each in axis.lines if each.get_gid() == 'point']
        assert len(strokes) == 2 * 4  # each with a white rim
        sides = []
        for x, y in (stroke.get_data() for stroke in strokes):
            # from the centre of the pixel, at columns 20 .. 24, rows 16 .. 20
            x, y = (set(at - middle) for at, middle in ((x, 22), (y, 18)))
            across, along = sorted((x, y), key=len)
            assert across == {0} and min(map(abs, along)) > 2
            sides.append((min(x) > 0, max(x) < 0, min(y) > 0, max(y) < 0))
        assert all(sum(each) == 2 for each in zip(*sides))


def test_large_images_are_shown_closer(figures):
    """24 pixels of the map, the point in them; with the image's shape."""
    record = one_hot([])
    record.before = torch.zeros(1, C, 50, 70)
    record.after = torch.zeros(1, C, 100, 140)
    record.weights = torch.full((1, 1, 25, 2, 2, 50, 70), 1 / 25)
    image = torch.rand(400, 560, 3).numpy()  # pixels of 8 x 8
    points = {'inside': (300.5, 100.5), 'last': (559.5, 399.5)}
    for draw, second in (
        (figures.trace_figure, 1),
        (figures.kernels_figure, 2),
    ):
        figure = draw(image, [record], points)
        first, last = figure.axes[0], figure.axes[second]
        left, right = first.get_xlim()
        bottom, top = first.get_ylim()
        assert right - left == pytest.approx(24 * 8)
        assert bottom - top == pytest.approx(24 * 8 * 400 / 560)
        # the middle of the pixel of 4 x 4
        assert (left + right) / 2 == 302 and (bottom + top) / 2 == 102
        assert last.get_xlim()[1] == 560 and last.get_ylim()[0] == 400
        assert 'shown closer' in figure.texts[1].get_text()


@pytest.mark.parametrize('kind', ['CARAFE', 'DySample'])
def test_every_figure_fits_its_page(figures, kind):
    """Headings and labels lie inside, and do not cover each other."""
    model = TopDown(upsampler(kind), upsampler(kind))
    model.sizes = [(4, 6), (8, 12), (16, 24)]
    with KernelRecorder(model) as recorder, torch.no_grad():
        model(model.levels())
    (chain,) = chains(recorder.records).values()
    for record in chain:
        record.name = f'decode_head.fuse_upsample_modules.{record.name[-1]}'
    image = torch.rand(62, 93, 3).numpy()  # was padded to 64 x 96
    points = {'at the border': (0.5, 31.0), '(92, 61)': (92.5, 61.5)}
    drawn = [
        figures.kernels_figure(image, chain, points, (64, 96)),
        figures.statistics_figure(image, chain, (64, 96)),
        figures.features_figure(image, chain, (64, 96)),
        figures.trace_figure(image, chain, points, (64, 96)),
    ]
    for figure in drawn:
        assert figure.get_figwidth() == 8.8
        figure.canvas.draw()
        texts = list(figure.texts)
        for axis in figure.axes:
            texts += [axis.title, axis._left_title, axis.xaxis.label]
            texts += [axis.yaxis.label]
        texts = [text for text in texts if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        for text, box in zip(texts, boxes):
            name = text.get_text()
            assert box.count_overlaps(boxes) == 1, name  # itself
            assert figure.bbox.x0 <= box.x0, name
            assert box.x1 <= figure.bbox.x1, name
            assert figure.bbox.y0 <= box.y0, name
            assert box.y1 <= figure.bbox.y1, name


def test_features_with_other_channels_are_refused(figures):
    record = one_hot([])
    record.after = record.after[:, :3]
    with pytest.raises(ValueError, match='makes 3 channels of 8'):
        figures.features_figure(torch.rand(40, 56, 3).numpy(), [record])


# An image through a whole model


class Sliding(nn.Module):
    """A model that tests by a sliding window and has a head on regions."""

    def __init__(self):
        super().__init__()
        self.neck, self.roi_head = upsampler('CARAFE'), nn.Module()
        self.roi_head.up = upsampler('CARAFE')
        self.test_cfg = dict(mode='slide', stride=(2, 2))
        self.modes = []

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, mode):
        self.modes.append((mode, self.test_cfg['mode']))
        self.neck(inputs[0][None])
        self.roi_head.up(inputs[0][None])
        return [SimpleNamespace(img_shape=(4, 6))]


def test_look_sees_the_whole_image():
    pictures = pytest.importorskip(
        'mmcarafe.visualization.pictures', reason='mmengine is not installed'
    )
    model = Sliding()
    data = dict(inputs=[torch.randn(C, H, W)])
    image = torch.full((8, 18, 3), 255).byte().numpy()
    seen = pictures.look(model, data, image)
    assert model.modes == [('predict', 'whole')]
    assert model.test_cfg['mode'] == 'slide'  # as before
    assert [each.name for each in seen.drawn] == ['neck']
    assert [each.name for each in seen.others] == ['roi_head.up']
    assert seen.image.shape == (4, 6, 3) and seen.image.min() == 1
    assert seen.input_size == (H, W)
    assert seen.places({'a': (9.0, 4.0)}) == {'a': (3.0, 2.0)}
    seen.drawn.clear()
    with pytest.raises(ValueError, match='ran none of them on the whole'):
        pictures.draw(seen, {})


# The tool


SHAPES = 'configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'
NUCLEI = 'configs/nuclei/upernet-carafe_r18_nuclei.py'
NEAREST = 'configs/shapes/faster-rcnn_r18_fpn-nearest_shapes.py'


@pytest.fixture(scope='module')
def tool():
    for name in ('matplotlib', 'mmdet', 'mmseg'):
        pytest.importorskip(name, reason=f'{name} is not installed')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/analysis')
        import visualize_kernels

        yield visualize_kernels


@pytest.fixture(scope='module')
def files(tool, tmp_path_factory):
    """An image of a bright square, and an untrained model's checkpoints."""
    import cv2

    folder = tmp_path_factory.mktemp('files')
    cv2.imwrite(str(folder / 'image.png'), square())
    (folder / 'text.png').write_text('no image')
    (folder / 'empty.png').touch()
    for config in (SHAPES, NUCLEI, NEAREST):
        save_untrained(config, folder)
    return folder


def square():
    np = pytest.importorskip('numpy', reason='numpy is not installed')
    image = np.full((75, 90, 3), 40, np.uint8)
    image[20:50, 30:66] = (80, 160, 240)
    return image


def run(tool, monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('sys.argv', ['', *map(str, arguments)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmseg's, about its losses
        tool.main()


@pytest.mark.parametrize(
    'config, lists',
    [
        (SHAPES, ['neck_upsample_modules']),
        (
            NUCLEI,
            [
                'decode_head_fpn_upsample_modules',
                'decode_head_fuse_upsample_modules',
            ],
        ),
    ],
)
def test_pictures(tool, files, config, lists, tmp_path, monkeypatch, capsys):
    checkpoint = files / f'{Path(config).stem}.pth'
    out = tmp_path / 'new' / 'folder'
    arguments = [config, checkpoint, files / 'image.png', '--out', out]
    if config == NUCLEI:
        arguments += ['--points', '0,0', '89,74']
    run(tool, monkeypatch, *arguments)
    names = [
        f'{name}_{end}.png'
        for name in lists
        for end in ('kernels', 'spread_and_shift', 'features', 'trace')
    ]
    written = {path.name for path in out.iterdir()}
    assert written == {*names, 'kernels.html'}
    for name in names:
        header = (out / name).read_bytes()[:24]
        # sharp where a page shows it 880 pixels wide
        assert struct.unpack('>I', header[16:20]) == (2 * 880,)
    printed = capsys.readouterr().out
    assert [
        line.split('/')[-1]
        for line in printed.splitlines()
        if line.startswith('wrote ')
    ] == [*names, 'kernels.html']
    if config == NUCLEI:
        assert 'point (89, 74): column 89, row 74' in printed
        only = 'only on the page: decode_head.ppm_upsample_modules.0 (CARAFE)'
        assert only in printed
    else:
        # an untrained detector is sure of nothing
        assert 'the model finds no object' in printed
        assert 'point strong edge 1' in printed
        assert 'point at the border: column 0' in printed


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(config='none.py'), 'config: there is no file none.py'),
        (dict(image='none.png'), 'image: there is no file '),
        (dict(image='text.png'), 'image: expected an image, '),
        (dict(image='empty.png'), 'image: expected an image, '),
        (dict(points=['3']), '--points: expected X,Y such as 40,25, got 3'),
        (dict(points=['3,nan']), '--points: expected X from 0 to 89 and Y '),
        (
            dict(points=['4,5', '90,5']),
            '--points: expected X from 0 to 89 and Y from 0 to 74, inside '
            'the image, got 90,5',
        ),
        (dict(points=['1,1'] * 7), '--points: expected at most 6 points'),
        (dict(config=NEAREST), 'its model has no upsampler with kernels'),
        (dict(checkpoint='none.pth'), 'there is no checkpoint '),
        (
            dict(checkpoint=Path(NUCLEI).stem + '.pth'),
            ' does not fit this config: ',
        ),
        (dict(out='image.png'), '--out: expected a folder, '),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_mistakes_are_named(
    tool, files, changes, message, tmp_path, monkeypatch
):
    out = tmp_path / 'out'
    if 'out' in changes:
        out = files / changes['out']
    arguments = [
        changes.get('config', SHAPES),
        files / changes.get('checkpoint', Path(SHAPES).stem + '.pth'),
        files / changes.get('image', 'image.png'),
        *('--out', out),
    ]
    if 'points' in changes:
        arguments += ['--points', *changes['points']]
    with pytest.raises(SystemExit) as error:
        run(tool, monkeypatch, *arguments)
    assert str(error.value).startswith('error: ')
    assert message in str(error.value) and '\n' not in str(error.value)
    assert out.is_file() or not out.exists()


UPERNET = 'configs/nuclei/upernet-carafe_r18_nuclei.py'
MASK_RCNN = 'configs/mask_rcnn/mask-rcnn_r50_fpn-carafe_1x_coco.py'
SEGFORMER = (
    'configs/segformer/segformer-carafe_mit-b0_8xb2-160k_ade20k-512x512.py'
)
NUCLEUS = 'nuclei/images/val/0d3640c1f1b80f24.png'  # of 320 x 256
PHOTOGRAPH = 'ade20k_samples/images/validation/ADE_val_00000003.jpg'
SMALL = 'test_dataloader.dataset.pipeline.1.scale'


def arm(kind):
    return {
        f'model.decode_head.{place}_upsample_cfg.type': f'mmcarafe.{kind}'
        for place in ('ppm', 'fpn', 'fuse')
    }


@pytest.mark.parametrize(
    'config, image, options, kind, steps',
    [
        (UPERNET, NUCLEUS, arm('SAPA'), 'SAPA', 3),
        (UPERNET, NUCLEUS, arm('FreqFusion'), 'FreqFusion', 3),
        (UPERNET, NUCLEUS, arm('DySample'), 'DySample', 3),
        (SEGFORMER, PHOTOGRAPH, {SMALL: (256, 128)}, 'CARAFE', 3),
        (
            MASK_RCNN,
            PHOTOGRAPH,
            {
                SMALL: (160, 128),
                'model.backbone.depth': 18,
                'model.neck.in_channels': [64, 128, 256, 512],
                'model.test_cfg.rcnn.score_thr': 0.0,
                'model.test_cfg.rcnn.max_per_img': 3,
            },
            'CARAFE',
            3,
        ),
        (None, PHOTOGRAPH, {SMALL: (160, 128)}, 'CARAFEPack', 4),
    ],
    ids=['SAPA', 'FreqFusion', 'DySample', 'SegFormer', 'masks', 'mmdet'],
)
def test_real_images(
    tool,
    real_data,
    config,
    image,
    options,
    kind,
    steps,
    tmp_path,
    monkeypatch,
    capsys,
):
    """Untrained models of every kind."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from mmcarafe.visualization import figures

    monkeypatch.setattr(figures, 'DPI', 40)  # for the sake of time

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tool, 'SCORE', 0.0)  # whatever is found counts
    if config is None:  # mmdet's own neck, on our operator
        config = tmp_path / 'fpn_carafe.py'
        config.write_text(
            "_base_ = 'mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py'\n"
            "custom_imports = dict(imports=['mmcarafe.drop_in'])\n"
            'model = dict(backbone=dict(depth=18),'
            'neck=dict(in_channels=[64, 128, 256, 512]))'
        )
    cfg = Config.fromfile(config)
    if config != UPERNET:
        options = {**options, 'model.backbone.init_cfg': None}
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmseg's, about its losses
        model = MODELS.build(cfg.model)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    run(
        tool,
        monkeypatch,
        *(config, tmp_path / 'model.pth', real_data / image),
        *([] if config == MASK_RCNN else ['--points', '120,90']),
        *('--out', tmp_path / 'out', '--cfg-options'),
        *(f'{key}={value}' for key, value in options.items()),
    )
    page = (tmp_path / 'out/kernels.html').read_text(encoding='utf-8')
    data = json.loads(re.search('^const DATA = (.*);$', page, re.M)[1])
    first, *others = data['lists'].values()
    assert [each['stride'] for each in first['steps'][:steps]] == [
        8 * 2**i for i in range(steps)
    ]
    assert first['traced'] == steps
    assert {step['kind'] for step in first['steps']} == {kind}
    pictures = [file.stem for file in (tmp_path / 'out').glob('*.png')]
    assert len(pictures) == 4 * (2 if config == UPERNET else 1)
    assert len(others) == (2 if config == UPERNET else 0)
    printed = capsys.readouterr().out
    if config == MASK_RCNN:
        assert 'the points belong to an object of score' in printed
        assert 'roi_head.mask_head.upsample (CARAFE)' in printed


def test_points_of_a_box(tool):
    """On the edge and at a corner of what is in the box, not of the box."""
    found = instances(tool, [[0, 0, 90, 75], [28, 17, 70, 53]], [0.2, 0.9])
    points, how = tool.choose_points(square(), found)
    assert 'an object of score 0.90' in how
    assert [*points] == [
        'inside an object',
        'on its edge',
        'at its corner',
        'at the border',
    ]
    inside, edge, corner, border = points.values()
    assert inside == (49, 35) and border == (0.5, 35)
    assert abs(edge[0] - 66) < 1.5 and edge[1] == 35.5
    assert any(
        math.dist(corner, (x, y)) < 3 for x in (30, 66) for y in (20, 50)
    )


def instances(tool, boxes, scores):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    return DetDataSample(
        pred_instances=InstanceData(
            bboxes=torch.tensor(boxes).float(), scores=torch.tensor(scores)
        )
    )


def test_points_of_a_label_map(tool):
    """Of the largest region that the border does not cut off."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = torch.zeros(1, 75, 90)
    labels[:, 60:, :] = 1
    labels[:, 20:50, 30:66] = 2
    labels[:, 5:10, 5:10] = 2
    sample = SegDataSample(pred_sem_seg=PixelData(data=labels))
    points, how = tool.choose_points(square(), sample)
    assert f'a region of {30 * 36} pixels' in how
    inside, edge, corner, _ = points.values()
    assert labels[0, int(inside[1]), int(inside[0])] == 2
    assert edge[1] in (20.5, 49.5)  # the nearer sides
    assert corner[0] in (30.5, 65.5) and corner[1] in (20.5, 49.5)
    labels.zero_()
    points, how = tool.choose_points(square(), sample)
    assert 'finds no object' in how and 'strong edge 3' in points
