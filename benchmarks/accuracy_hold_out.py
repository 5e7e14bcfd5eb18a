"""Make a data set to choose settings on, from training images alone.

    python benchmarks/accuracy_hold_out.py data/nuclei data/nuclei_hold_out

Every fourth training image, in the order of the file names, becomes a
validation image of the new data set; the others stay training images. The old
validation images are not in it, so what accuracy.py finds there, with
``--data-root``, may decide about settings. Images are linked, not copied.
"""

import argparse
import json
from pathlib import Path

EVERY = 4
VALIDATION = {'train': 'val', 'training': 'validation'}


def hold_out(source, target):
    """Link the images and maps of ``source``, and divide its annotations.

    Args:
        source (Path): made by tools/dataset_converters/nuclei.py or shapes.py.
        target (Path): must not exist.

    Returns:
        tuple[int]: number of training and of validation images.
    """
    counts = None
    for training, validation in VALIDATION.items():
        for folder in sorted(source.glob(f'*/{training}')):
            kept, held = divide(folder.iterdir(), key=lambda file: file.name)
            for split, files in ((training, kept), (validation, held)):
                new = target / folder.parent.name / split
                new.mkdir(parents=True)
                for file in files:
                    (new / file.name).symlink_to(file.resolve())
            if folder.parent.name == 'images':
                counts = len(kept), len(held)
        for file in source.glob(f'annotations/*{training}.json'):
            content = json.loads(file.read_text())
            parts = divide(content['images'], key=lambda x: x['file_name'])
            for split, images in zip((training, validation), parts):
                ids = {image['id'] for image in images}
                boxes = [
                    box
                    for box in content['annotations']
                    if box['image_id'] in ids
                ]
                name = file.name.replace(training, split)
                (target / 'annotations').mkdir(parents=True, exist_ok=True)
                (target / 'annotations' / name).write_text(
                    json.dumps(dict(content, images=images, annotations=boxes))
                )
    return counts


def divide(items, key):
    """Those that stay, and every fourth."""
    items = sorted(items, key=key)
    return [x for i, x in enumerate(items) if i % EVERY], items[::EVERY]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path)
    parser.add_argument('target', type=Path, help='a new folder')
    args = parser.parse_args()
    if not any((args.source / 'images' / x).is_dir() for x in VALIDATION):
        parser.error(
            f'source: {args.source} has no folder images/train or '
            'images/training'
        )
    if args.target.exists():
        parser.error(f'target: {args.target} exists, expected a new folder')
    kept, held = hold_out(args.source, args.target)
    print(f'{args.target}: {kept} training and {held} validation images')


if __name__ == '__main__':
    main()
