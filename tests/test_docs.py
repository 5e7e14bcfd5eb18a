"""README and docs: code runs, tables are current, links lead somewhere."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DefaultScope
from update_docs import TABLE, output

from mmcarafe.registry import MODELS

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

# Warnings of mmseg and mmdet when a model is built
pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
    pytest.mark.filterwarnings('ignore:For binary segmentation, we suggest'),
    pytest.mark.filterwarnings('ignore:DeprecationWarning. pretrained is a'),
]
BLOCK = re.compile(
    r'(?:<!-- needs: (?P<needs>.+) -->\n\n)?```python\n(?P<code>.*?)```',
    re.DOTALL,
)
# [text](target), also of a picture
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
PAGES = sorted(
    [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md')]
)


def test_no_table_is_overlooked():
    for page in PAGES:
        text = page.read_text()
        assert text.count('<!-- by:') == len(TABLE.findall(text))


@pytest.mark.parametrize(
    'found',
    [
        pytest.param(found, id=f'{page.name} {number}')
        for page in PAGES
        for number, found in enumerate(TABLE.finditer(page.read_text()))
    ],
)
def test_table(found, tmp_path):
    """`make docs` writes it anew."""
    command = found['command'].replace('work_dirs/', f'{tmp_path}/')
    assert output(command) == found['text']


@pytest.fixture(scope='module')
def names():
    """What the blocks of each page have defined."""
    return {}


@pytest.mark.parametrize(
    'page, number, block',
    [
        pytest.param(page, number, block, id=f'{page.name} {number}')
        for page in PAGES
        for number, block in enumerate(BLOCK.finditer(page.read_text()))
    ],
)
def test_code(page, number, block, names, tmp_path):
    """The blocks of a page in order, in one namespace; configs are built."""
    for name in (block['needs'] or '').split():
        pytest.importorskip(name)
    if '_base_' in block['code']:
        build(block['code'], tmp_path / f'{page.stem}_{number}.py')
        return
    code = compile(block['code'], f'{page.name} {number}', 'exec')
    exec(code, names.setdefault(page, {}))


def build(code, path):
    path.write_text(code.replace("'./configs/", f"'{ROOT}/configs/"))
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        assert MODELS.build(cfg.model)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links(page):
    """Files are there, and so are the headings that a link names."""
    for target in LINK.findall(without_code(page.read_text())):
        if re.match(r'https?://', target):
            continue
        path, _, heading = target.partition('#')
        file = (page.parent / unquote(path)).resolve() if path else page
        assert file.exists(), target
        if heading:
            assert heading in headings(file), target


def without_code(text):
    return re.sub(r'```.*?```', '', text, flags=re.DOTALL)


def headings(file):
    """The anchors that GitHub gives to a page's headings."""
    lines = re.findall(r'^#+ (.+)$', without_code(file.read_text()), re.M)
    return {
        re.sub(r'[^\w\- ]', '', x).lower().replace(' ', '-') for x in lines
    }


def test_pictures_are_small_and_shown():
    text = ''.join(page.read_text() for page in PAGES)
    for file in (ROOT / 'docs/images').iterdir():
        assert file.stat().st_size <= 300_000, file.name
        assert f'images/{file.name}' in text


def test_readme_is_short():
    assert len(Path(ROOT / 'README.md').read_text().splitlines()) <= 130
