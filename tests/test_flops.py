"""The README's table of UPerNet's parameters and FLOPs."""

import subprocess
import sys

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope

pytest.importorskip('mmseg')


@pytest.fixture
def upernet_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis')
    import upernet_table

    return upernet_table


def test_carafe_adds_what_the_paper_says(upernet_table):
    """2(C+1)C_m + 2(9 C_m + 1)S²K² + 2 S²K² C FLOPs for a source pixel.

    The 1s, which are biases, are not counted.
    """
    cfg = Config.fromfile(upernet_table.CONFIG)
    init_default_scope('mmseg')
    cfg.model.pretrained = None
    head = cfg.model.decode_head
    head.update(ppm_upsample_cfg=None, fuse_upsample_cfg=None)
    parameters, flops = upernet_table.count(cfg.model, (512, 512))
    head.fpn_upsample_cfg = None
    plain_parameters, plain_flops = upernet_table.count(cfg.model, (512, 512))

    c, taps = 512, 2**2 * 5**2
    each = (c + 1) * 64 + (9 * 64 + 1) * taps
    assert parameters - plain_parameters == 3 * each
    pixels = 16**2 + 32**2 + 64**2  # of P5, P4 and P3
    each = 2 * c * 64 + 2 * 9 * 64 * taps + 2 * taps * c
    assert flops - plain_flops == pixels * each


def test_readme_has_the_table():
    output = subprocess.run(
        [sys.executable, 'tools/analysis/upernet_table.py'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert output.count('\n') == 2 + 8
    assert output in (ROOT / 'README.md').read_text()


def test_other_models_are_refused():
    process = subprocess.run(
        [
            *(sys.executable, 'tools/analysis/upernet_table.py'),
            'configs/shapes/upernet_r18_shapes.py',
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.returncode == 2
    assert 'decode_head.type is UPerHead' in process.stderr
