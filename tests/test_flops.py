"""The FLOP counters, and the tables of docs made with them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine import analysis
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.utils.flop_counter import FlopCounterMode

from mmcarafe import CARAFE
from mmcarafe.flops import enable
from mmcarafe.upsamplers import COMPARED, UPSAMPLERS
from mmcarafe.upsamplers.build import Upsampler

CARAFE_FPN = 'configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'
CARAFE_UPERNET = 'configs/shapes/upernet-carafe_r18_shapes.py'

# 2(C+1)C_m + 2(9 C_m + 1)S²K² + 2 S²K² C per source pixel; the 1s are biases,
# which the counters leave out
C, C_M, TAPS = 256, 64, 2**2 * 5**2
CONVOLUTIONS = 2 * C * C_M + 2 * 9 * C_M * TAPS
REASSEMBLY = 2 * TAPS * C


def run_tool(name, *args):
    return subprocess.run(
        [sys.executable, '-W', 'ignore', f'tools/analysis/{name}.py', *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def output_of(name, *args):
    process = run_tool(name, *args)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_torch_counts_forward_and_both_gradients():
    x = torch.ones(2, C, 3, 5, requires_grad=True)
    module = CARAFE(C)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert counter.get_total_flops() == 2 * 15 * (CONVOLUTIONS + REASSEMBLY)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 15 * (CONVOLUTIONS + REASSEMBLY)


@pytest.mark.parametrize('counter_comes', ['first', 'last'])
def test_torch_counts_without_the_host_projects(counter_comes):
    imports = [
        'from torch.utils.flop_counter import FlopCounterMode\n',
        'from mmcarafe.ops import carafe\n',
    ]
    if counter_comes == 'last':
        imports.reverse()
    code = (
        'import sys, torch\n'
        + ''.join(imports)
        + 'with FlopCounterMode(display=False) as counter:\n'
        '    carafe(torch.ones(1, 4, 3, 5), torch.ones(1, 25, 6, 10), 5)\n'
        "print(counter.get_total_flops(), 'mmengine' in sys.modules)\n"
    )
    output = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert output.split() == [str(2 * 25 * 4 * 60), 'False']


def test_mmengine_counts_multiply_adds():
    enable()
    result = analysis.get_model_complexity_info(
        CARAFE(C), (C, 3, 5), show_table=False, show_arch=False
    )
    assert result['flops'] == 15 * (CONVOLUTIONS + REASSEMBLY) / 2
    assert result['params'] == (C + 1) * C_M + (9 * C_M + 1) * TAPS


@pytest.mark.parametrize('config', [CARAFE_FPN, CARAFE_UPERNET])
def test_mmengine_counts_whole_models(config, monkeypatch):
    cfg = Config.fromfile(ROOT / config)
    pytest.importorskip(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis')
    import get_flops

    model = get_flops.build(cfg.model)
    if hasattr(model, 'roi_head'):
        model.forward = model.extract_feat
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, 3, 97, 131))
    expected = counter.get_flop_counts()['Global'][
        torch.ops.mmcarafe.reassemble
    ]
    analysis.get_model_complexity_info(
        model, (3, 97, 131), show_table=True, show_arch=True
    )
    analyzer = analysis.FlopAnalyzer(model, torch.ones(1, 3, 97, 131))
    by_operator = analyzer.by_operator()
    assert by_operator['reassemble'] == expected / 2 > 0


def test_the_papers_counts_are_reproduced():
    rows = {}
    for line in output_of('upsampler_table').splitlines()[2:]:
        cells = line[2:-2].replace(',', '').split(' | ')
        rows[cells[0]] = [int(n) for n in cells[3:6]]
    parameters, flops, with_biases = rows['CARAFE 5×5']
    assert (parameters, with_biases) == (74148, 199496)
    assert flops == CONVOLUTIONS + REASSEMBLY
    assert rows['deconvolution 3×3'][:2] == [590080, 1179648]
    assert rows['pixel shuffle 3×3'][1] == 2 * 9 * 256 * 4 * 256
    assert rows['nearest'] == [0, 0, 0]
    dynamic = 2 * C * C_M + C * (2 * 9 * C_M * TAPS) + REASSEMBLY
    assert rows['dynamic filter 5×5'][1] == dynamic
    assert rows['DySample'][:2] == [8224, 2 * C * 32]
    # of the guide's S*S pixels for each source pixel, too
    projections = 2 * C * 32 * (1 + 4)
    similarity = 2 * TAPS * 32
    assert rows['SAPA 5×5'] == [
        2 * (C + 1) * 32 + 2 * 2 * C,  # two convolutions and two norms
        projections + similarity + REASSEMBLY,
        projections + similarity + REASSEMBLY + 2 * 32 * (1 + 4),
    ]


def test_published_aps_stay_in_their_column():
    """The later papers' baseline is the better one, so all figures are."""
    both = 0
    for row in UPSAMPLERS.values():
        first, later = (float(ap or 'nan') for ap in row[3:])
        assert not first > 38 and not later < 37, row.name
        both += first < later
    assert both >= 4
    assert UPSAMPLERS['CARAFE'][3:] == ('37.8', '38.6')


def test_a_row_needs_no_published_ap():
    row = Upsampler(torch.nn.Upsample, 'name', 'what it does')
    assert row[3:] == ('', '')


@pytest.mark.parametrize(
    'table, rows', [('upsampler_table', len(COMPARED)), ('upernet_table', 8)]
)
def test_a_row_for_each(table, rows):
    if table == 'upernet_table':
        pytest.importorskip('mmseg')
    output = output_of(table)
    assert output.count('\n') == 2 + rows


def test_carafe_in_upernets_fpn_adds_only_itself(monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis')
    import get_flops
    import upernet_table

    cfg = Config.fromfile(upernet_table.CONFIG)
    init_default_scope('mmseg')
    head = cfg.model.decode_head
    head.update(ppm_upsample_cfg=None, fuse_upsample_cfg=None)
    counts = []
    for head.fpn_upsample_cfg in (None, dict(type='mmcarafe.CARAFE')):
        with torch.device('meta'):
            model = get_flops.build(cfg.model)
        counts.append(get_flops.count(model, (512, 512)))
    (parameters, flops), (with_parameters, with_flops) = counts
    c = head.channels
    assert with_parameters - parameters == 3 * (
        (c + 1) * C_M + (9 * C_M + 1) * TAPS
    )
    pixels = 16**2 + 32**2 + 64**2  # of P5, P4 and P3
    each = 2 * c * C_M + 2 * 9 * C_M * TAPS + 2 * TAPS * c
    assert with_flops - flops == pixels * each


def test_get_flops_of_a_segmentor():
    pytest.importorskip('mmseg')
    config = 'configs/upernet/upernet-carafe_r50_4xb4-80k_ade20k-512x512.py'
    output = output_of('get_flops', config)
    assert '65.12 M' in output and '480.4 G' in output  # as in upernet_table


def test_get_flops_of_a_detector(monkeypatch):
    """With the box head's layers for all 100 proposals."""
    pytest.importorskip('mmdet')
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis')
    import get_flops

    cfg = Config.fromfile(ROOT / CARAFE_FPN)
    init_default_scope('mmdet')
    model = get_flops.build(cfg.model)
    _, small = get_flops.count(model, (64, 96))
    _, large = get_flops.count(model, (128, 96))
    # what grows with the image is twice as much, the box head stays
    per_box = 7 * 7 * 64 * 256 + 256 * 256 + 256 * (7 + 24)
    assert 2 * small - large == 2 * 100 * per_box


def test_get_flops_pads_as_the_model_does():
    pytest.importorskip('mmdet')
    config = 'configs/yolox/yolox_s_pafpn-carafe_8xb8-300e_coco.py'
    output = output_of('get_flops', config, '--shape', '65', '90')
    assert '1 x 3 x 96 x 96' in output


def test_get_flops_of_a_cascade():
    pytest.importorskip('mmdet')
    config = 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'
    folder = Path(importlib.util.find_spec('mmdet').origin).parent
    path = str(folder / '.mim/configs' / config)
    assert 'FLOPs' in output_of('get_flops', path, '--shape', '64', '96')


def test_get_flops_of_a_changed_config():
    pytest.importorskip('mmseg')
    plain = 'model.decode_head.type=UPerHead'
    output = output_of('get_flops', CARAFE_UPERNET, '--cfg-options', plain)
    assert output == output_of(
        'get_flops', 'configs/shapes/upernet_r18_shapes.py'
    )
    assert output != output_of('get_flops', CARAFE_UPERNET)


@pytest.mark.parametrize(
    'tool, args, message',
    [
        ('get_flops', ['missing.py'], 'there is no file missing.py'),
        ('get_flops', [CARAFE_FPN, '--shape', '0', '9'], '--shape is [0, 9]'),
        ('upsampler_table', ['--channels', '0'], '--channels is 0'),
        ('upsampler_table', ['--channels', '6'], '--channels is 6: upsample_'),
        ('upernet_table', ['missing.py'], 'there is no file missing.py'),
        (
            'upernet_table',
            ['configs/shapes/upernet_r18_shapes.py'],
            'decode_head.type is UPerHead',
        ),
        (
            'get_flops',
            [CARAFE_FPN, '--cfg-options', 'modle.neck.type=FPN'],
            'the config has no modle, did you mean model?',
        ),
        (
            'upernet_table',
            ['--cfg-options', 'model.decode_head.chanels=64'],
            "unexpected keyword argument 'chanels'",
        ),
        ('summarize', ['missing'], 'missing is not a folder'),
    ],
)
def test_mistakes_end_in_one_line(tool, args, message):
    process = run_tool(tool, *args)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith('error: ') and message in line
    assert not process.stdout
