"""The measured results: metafiles, and docs/configs.md, made of them."""

import pytest
from conftest import ROOT
from mmengine.fileio import load

METAFILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob('configs/*/metafile.yml')
)


@pytest.fixture
def config_table(monkeypatch):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis')
    import config_table

    return config_table


def test_index_names_all():
    assert load(ROOT / 'model-index.yml')['Import'] == METAFILES != []


@pytest.mark.parametrize('path', METAFILES)
def test_metafile_fits_its_configs(path):
    """In the form that mim, and mmengine's hub, read."""
    metafile = load(ROOT / path)
    collections = [each['Name'] for each in metafile['Collections']]
    for model in metafile['Models']:
        assert model['In Collection'] in collections
        folder = path.rpartition('/')[0]
        assert model['Config'] == f'{folder}/{model["Name"]}.py'
        assert (ROOT / model['Config']).is_file()
        for result in model.get('Results', []):
            assert {'Task', 'Dataset', 'Metrics'} == set(result)
            assert all(0 < x < 100 for x in result['Metrics'].values())
            assert model['Metadata']['Conditions']


def test_every_config_has_an_entry():
    """Else mim would not find it."""
    entries = sorted(
        model['Config']
        for path in METAFILES
        for model in load(ROOT / path)['Models']
    )
    assert entries == sorted(
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob('configs/*/*.py')
    )


def test_every_config_has_a_row():
    """tests/test_docs.py compares the table with what the tool prints."""
    configs = len(list(ROOT.glob('configs/*/*.py')))
    text = (ROOT / 'docs/configs.md').read_text()
    assert text.count('\n| [`') == configs


def test_a_result_and_its_note(config_table, tmp_path):
    folder = tmp_path / 'configs/shapes'
    folder.mkdir(parents=True)
    (tmp_path / 'model-index.yml').write_text(
        'Import:\n- configs/shapes/metafile.yml\n'
    )
    config = ROOT / 'configs/shapes/upernet_r18_shapes.py'
    (folder / 'x.py').write_text(f'_base_ = {str(config)!r}')
    (folder / 'metafile.yml').write_text(
        'Models:\n'
        '- Config: configs/shapes/x.py\n'
        '  Metadata: {Conditions: By hand., Result of the paper: 3 mIoU}\n'
        '  Results:\n'
        '  - Metrics: {mIoU: 1.5, aAcc: 2.5}\n'
    )
    *_, row, blank, note = config_table.table(tmp_path)
    assert row == (
        "| [`shapes/x`](../configs/shapes/x.py) | mmseg's own | "
        '1.5 mIoU, 2.5 aAcc (a) | 3 mIoU |'
    )
    assert (blank, note) == ('', '(a) By hand.')


def test_results_of_no_config(config_table, tmp_path):
    (tmp_path / 'model-index.yml').write_text('Import: [a.yml]')
    (tmp_path / 'a.yml').write_text('Models: [{Config: configs/gone.py}]')
    with pytest.raises(SystemExit, match='^error: a.yml: there is no config'):
        config_table.metadata(tmp_path)


def test_results_without_conditions(config_table, tmp_path):
    (tmp_path / 'model-index.yml').write_text('Import: [a.yml]')
    (tmp_path / 'x.py').touch()
    (tmp_path / 'a.yml').write_text(
        'Models: [{Config: x.py, Results: [{Metrics: {mIoU: 1.5}}]}]'
    )
    message = '^error: a.yml: x.py has Results, expected Conditions'
    with pytest.raises(SystemExit, match=message):
        config_table.metadata(tmp_path)
