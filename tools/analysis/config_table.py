"""What each config upsamples with, and what was measured with it.

Prints the table of docs/configs.md. Where a config upsamples is read off the
model that it builds. The results, and the paper's, come from
configs/*/metafile.yml; notes below the table say how they were measured.

Usage::

    python tools/analysis/config_table.py
"""

import argparse
import string
import textwrap
from pathlib import Path

from get_flops import build, fail
from mmcv.ops import CARAFEPack
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from mmcarafe.upsamplers import UPSAMPLERS

ROOT = Path(__file__).resolve().parents[2]
# Upsamplers that have a paper, by its name for them.
NAMES = {
    row.cls: kind
    for kind, row in UPSAMPLERS.items()
    if kind == row.cls.__name__  # not 'nearest', 'deconv' and the like
}
NAMES[CARAFEPack] = 'CARAFE'
# Prefixes of modules' names, of which the first match counts, and what to call
# these places.
PLACES = (
    ('neck.', 'the neck'),
    ('roi_head.mask_head.', 'the mask head'),
    ('decode_head.ppm_', 'PPM'),
    ('decode_head.fpn_', 'FPN'),
    ('decode_head.fuse_', 'FUSE'),
    ('decode_head.', 'the head'),
    ('', 'another place'),
)


def metadata(root):
    """Config -> its entry in the metafiles that model-index.yml lists."""
    models = {}
    for path in load(root / 'model-index.yml')['Import']:
        for model in load(root / path)['Models']:
            if not (root / model['Config']).is_file():
                fail(f'{path}: there is no config {model["Config"]}')
            if model.get('Results') and not model.get('Metadata', {}).get(
                'Conditions'
            ):
                fail(
                    f'{path}: {model["Config"]} has Results, expected '
                    'Conditions under Metadata: how they were measured'
                )
            models[model['Config']] = model
    return models


def upsampling(cfg):
    """What the model of a config upsamples with, and where."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = build(cfg.model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if type(module) in NAMES
    }
    if not modules:
        return f"{cfg.default_scope}'s own"
    found = {
        next(place for place in PLACES if name.startswith(place[0]))
        for name in modules
    }
    where = [place for _, place in sorted(found, key=PLACES.index)]
    changed = any(
        getattr(module, 'border', 'zeros') == 'renormalize'
        for module in modules.values()
    )
    return (
        ' and '.join(sorted({NAMES[type(m)] for m in modules.values()}))
        + (' with both changes' if changed else '')
        + ' in '
        + ' and '.join(filter(None, [', '.join(where[:-1]), where[-1]]))
    )


def table(root):
    """The lines of a Markdown table, and of the notes below it."""
    models = metadata(root)
    notes = {}
    yield '| config | upsampling | result | the paper |'
    yield '|---|---|---|---|'
    for path in sorted(root.glob('configs/*/*.py')):
        config = path.relative_to(root).as_posix()
        cfg = Config.fromfile(path)
        model = models.get(config, {})
        about = model.get('Metadata', {})
        result = ', '.join(
            f'{value} {name}'
            for each in model.get('Results', [])
            for name, value in each['Metrics'].items()
        )
        if result:
            letter = string.ascii_lowercase[len(notes)]
            result += f' ({notes.setdefault(about["Conditions"], letter)})'
        name = f'[`{path.parent.name}/{path.stem}`](../{config})'
        yield (
            f'| {name} | {upsampling(cfg)} | {result or "not measured yet"} | '
            f'{about.get("Result of the paper", "")} |'
        )
    for note, letter in notes.items():
        yield ''
        yield textwrap.fill(
            f'({letter}) {note}',
            79,
            break_long_words=False,
            break_on_hyphens=False,
        )


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    # swap_upsample would log to stdout what it replaces
    MMLogger.get_instance('config_table', log_level='WARNING')
    print(*table(ROOT), sep='\n')


if __name__ == '__main__':
    main()
