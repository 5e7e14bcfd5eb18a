"""Write the generated tables of README.md and docs/*.md anew.

A table stands between two comments, of which the first holds the command that
prints it::

    <!-- by: python tools/analysis/upernet_table.py -->
    <!-- end -->

Usage::

    python tools/update_docs.py           # writes
    python tools/update_docs.py --check   # names what would change
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(
    r'(<!-- by: python (?P<command>[^\n]+) -->\n)(?P<text>.*?)(<!-- end -->)',
    re.DOTALL,
)


def pages():
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def output(command):
    """What a command prints, with blank lines around.

    Raises:
        subprocess.CalledProcessError: it failed; its errors were printed.
    """
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', *shlex.split(command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return f'\n{process.stdout.strip()}\n\n'


def updated(page):
    """The page's text with each table as its command prints it now."""
    return TABLE.sub(
        lambda found: found[1] + output(found['command']) + found[4],
        page.read_text(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing')
    args = parser.parse_args()
    changed = False
    for page in pages():
        text = updated(page)
        if text == page.read_text():
            continue
        changed = True
        print(page.relative_to(ROOT))
        if not args.check:
            page.write_text(text)
    sys.exit(args.check and changed)


if __name__ == '__main__':
    main()
