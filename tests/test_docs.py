"""README and docs: code runs, tables are current, links lead somewhere."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DefaultScope

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
TABLE = re.compile(r'<!-- by: python (.+?) -->\n(.*?)<!-- end -->', re.DOTALL)
BLOCK = re.compile(
    r'(?:<!-- needs: (?P<needs>.+) -->\n\n)?```python\n(?P<code>.*?)```',
    re.DOTALL,
)
# [text](target), also of a picture
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
PAGES = sorted(
    [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md')]
)


def named(values):
    return [pytest.param(*each, id=each[0].name) for each in values]


def test_no_table_is_overlooked():
    for page in PAGES:
        text = page.read_text()
        assert text.count('<!-- by:') == len(TABLE.findall(text))


@pytest.mark.parametrize(
    'page, command, table',
    [
        pytest.param(page, *found, id=f'{page.name} {number}')
        for page in PAGES
        for number, found in enumerate(TABLE.findall(page.read_text()))
    ],
)
def test_table(page, command, table, tmp_path):
    """`make docs` writes it anew."""
    command = command.replace('work_dirs/', f'{tmp_path}/')
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', *shlex.split(command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0
    assert process.stdout.strip() == table.strip()


@pytest.mark.parametrize(
    'page, blocks',
    named(
        (page, blocks)
        for page in PAGES
        for blocks in [
            [m.groupdict() for m in BLOCK.finditer(page.read_text())]
        ]
        if blocks
    ),
)
def test_code(page, blocks, tmp_path):
    """In order, in one namespace; configs are built."""
    names = {}
    for number, block in enumerate(blocks):
        missing = [
            name
            for name in (block['needs'] or '').split()
            if importlib.util.find_spec(name) is None
        ]
        if missing:
            print(f'{page.name}, block {number}: {missing} not installed')
        elif '_base_' in block['code']:
            build(block['code'], tmp_path / f'{page.stem}_{number}.py')
        else:
            exec(
                compile(block['code'], f'{page.name} {number}', 'exec'), names
            )


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
