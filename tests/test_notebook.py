"""The notebook of docs: that it runs, and what its readers see of it."""

import base64
import io
import json
import os
import re
import sys

import matplotlib.image
import pytest
from conftest import ROOT, run

NOTEBOOK = ROOT / 'docs' / 'fifteen_minutes.ipynb'
# What replaces the sizes of the cell that is tagged with "parameters".
REDUCED = dict(TRAIN_IMAGES=8, TEST_IMAGES=2, EPOCHS=1)
SAVE_FIGURES = """
for number in plt.get_fignums():
    plt.figure(number).savefig(f'figure_{number}.png')
kernels.savefig('kernels.png')
"""
# Output that is the same for all sizes.
FIXED = re.compile(r'.*(?: parameters| pixels become .*)')


@pytest.fixture(scope='module')
def cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    return [
        {**cell, 'source': ''.join(cell['source'])}
        for cell in notebook['cells']
        if cell['cell_type'] == 'code'
    ]


@pytest.fixture(scope='module')
def outputs(cells):
    return [output for cell in cells for output in cell['outputs']]


def text_of(outputs):
    return '\n'.join(
        ''.join(output.get('text', output.get('data', {}).get('text/plain')))
        for output in outputs
    )


def pictures(outputs):
    return [
        base64.b64decode(output['data']['image/jpeg'])
        for output in outputs
        if 'image/jpeg' in output.get('data', {})
    ]


@pytest.fixture(scope='module')
def finished(cells, tmp_path_factory):
    """The folder in which all cells have run, and what they printed."""
    # Data and results go beside the package, whose folder this is then.
    root = tmp_path_factory.mktemp('notebook')
    for name in ('configs', 'demo', 'mmcarafe', 'tools'):
        (root / name).symlink_to(ROOT / name)
    lines = []
    for cell in cells:
        # Without Jupyter there are no magics.
        lines.append(re.sub(r'^%.*\n', '', cell['source'], flags=re.M))
        if 'parameters' in cell['metadata'].get('tags', ()):
            lines += [f'{name} = {value}' for name, value in REDUCED.items()]
    script = root / 'docs' / 'notebook.py'
    script.parent.mkdir()
    script.write_text('\n'.join([*lines, SAVE_FIGURES]), encoding='utf-8')
    env = {**os.environ, 'PYTHONPATH': str(root), 'MPLBACKEND': 'agg'}
    return root, run(sys.executable, script, cwd=script.parent, env=env)


def test_runs_to_its_figures(finished, outputs):
    root, printed = finished
    assert (root / 'data/shapes/images/training/00007.jpg').is_file()
    assert not (root / 'data/shapes/images/training/00008.jpg').exists()
    assert (root / 'work_dirs/fifteen_minutes/epoch_1.pth').is_file()
    figures = sorted(root.glob('*.png'))
    assert len(figures) == len(pictures(outputs)) == 4
    for figure in figures:  # neither empty nor of one colour
        assert matplotlib.image.imread(figure)[..., :3].std() > 0.05
    shown = FIXED.findall(text_of(outputs))
    assert len(shown) == 5  # of two necks and three upsamplers
    # else the committed outputs are of older code
    assert shown == FIXED.findall(printed)


def test_is_committed_with_its_outputs(cells, outputs):
    assert NOTEBOOK.stat().st_size <= 400_000
    assert [cell['execution_count'] for cell in cells] == [
        *range(1, len(cells) + 1)
    ]
    for picture in pictures(outputs):
        height, width = matplotlib.image.imread(
            io.BytesIO(picture), format='jpeg'
        ).shape[:2]
        assert 500 <= width <= 900 and height < 900


def test_outputs_tell_nothing_of_the_machine(cells, outputs):
    assert {output.get('name', 'stdout') for output in outputs} == {'stdout'}
    assert 'error' not in {output['output_type'] for output in outputs}
    text = text_of(outputs)
    # paths from the root, times of the day, durations
    assert not re.search(r'(^|[\s\'"(])/\w|\d:\d\d|\d ?s\b', text)
    # whose execution times Jupyter would keep
    assert {tuple(cell['metadata']) for cell in cells} == {(), ('tags',)}


def test_links_lead_to_files():
    links = re.findall(r'\]\(([^):]+)\)', NOTEBOOK.read_text(encoding='utf-8'))
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link.partition('#')[0]).is_file(), link
