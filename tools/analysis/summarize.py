"""Say in one line what a run scored and where it left its files.

Usage::

    python tools/analysis/summarize.py work_dirs/demo
"""

import argparse
import json
import sys
from pathlib import Path

# What each kind of model is judged by: name in the log, name to print, and
# what one unit of it is.
SCORES = (('coco/bbox_mAP', 'box AP', 1), ('mIoU', 'mIoU', 0.01))


def newest(paths, what, hint):
    """The file of ``paths`` that was written last."""
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise FileNotFoundError(f'no {what}; {hint}')
    return max(paths, key=lambda path: path.stat().st_mtime)


def summarize(work_dir):
    """Find the newest training and test run of a work directory.

    Args:
        work_dir (str | Path): as given to tools/train.py and tools/test.py.

    Returns:
        str: one line with the score and the paths.

    Raises:
        FileNotFoundError: something that a complete run leaves is missing.
        ValueError: the test run measured none of :data:`SCORES`.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise FileNotFoundError(f'{work_dir} is not a folder')
    train = f'run tools/train.py with --work-dir {work_dir}'
    test = f'run tools/test.py with --work-dir {work_dir} --show-dir pictures'

    # Training writes its curves, testing TIMESTAMP/TIMESTAMP.json.
    curves = newest(
        work_dir.glob('*/vis_data/scalars.json'),
        f'training log in {work_dir}',
        train,
    )
    stamp = curves.parent.parent
    log = newest(
        [stamp / f'{stamp.name}.log'], f'training log in {stamp}', train
    )
    checkpoint = newest(
        work_dir.glob('*.pth'), f'checkpoint in {work_dir}', train
    )
    result = newest(
        (
            path
            for path in work_dir.rglob('*.json')
            if path.stem == path.parent.name
        ),
        f'test result in {work_dir}',
        test,
    )
    picture = newest(
        (
            path
            for path in result.parent.rglob('*')
            if path.suffix in ('.jpg', '.png')
        ),
        f'pictures in {result.parent}',
        test,
    )

    metrics = json.loads(result.read_text())
    for key, name, unit in SCORES:
        if key in metrics:
            score = f'{name} {metrics[key] * unit:.3f}'
            break
    else:
        raise ValueError(
            f'{result} holds none of {[key for key, *_ in SCORES]}'
        )
    return (
        f'{score} · log {log} · checkpoint {checkpoint} · '
        f'pictures {picture.parent}'
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', help='of the run to summarize')
    args = parser.parse_args()
    try:
        print(summarize(args.work_dir))
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
