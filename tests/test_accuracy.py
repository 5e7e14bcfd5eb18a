"""The accuracy benchmark: true pairs, and no line lost or written twice.

Two iterations on a few drawn images, in the layout of configs/nuclei.
"""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.optim import build_optim_wrapper

from mmcarafe import CARAFE

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

# Warnings of mmseg, mmdet and mmengine when a model is built and run
pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
    pytest.mark.filterwarnings('ignore:For binary segmentation, we suggest'),
]
SCRIPT = ROOT / 'benchmarks/accuracy.py'


@pytest.fixture
def accuracy():
    import accuracy

    threads = torch.get_num_threads()
    yield accuracy
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def nuclei(tmp_path_factory):
    """Disks on dark ground: 9 images to train with, 2 to test with."""
    root = tmp_path_factory.mktemp('nuclei')
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir()
    for split, count in (('train', 9), ('val', 2)):
        coco = dict(
            images=[],
            annotations=[],
            categories=[dict(id=1, name='nucleus')],
        )
        for folder in ('images', 'semantic'):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            height, width = 256 + 3 * number, 260
            image = rng.integers(60, size=(height, width, 3), dtype=np.uint8)
            labels = np.zeros((height, width), np.uint8)
            for x, y in ((40, 60), (130, 100), (210, 220)):
                x, y, radius = x + number, y - number, 9 + 2 * number
                cv2.circle(image, (x, y), radius, (180, 170, 160), -1)
                cv2.circle(labels, (x, y), radius, 1, -1)
                coco['annotations'].append(
                    dict(
                        id=len(coco['annotations']) + 1,
                        image_id=number,
                        category_id=1,
                        bbox=[x - radius, y - radius, 2 * radius, 2 * radius],
                        area=math.pi * radius**2,
                        iscrowd=0,
                    )
                )
            name = f'{number}.png'
            cv2.imwrite(str(root / 'images' / split / name), image)
            cv2.imwrite(str(root / 'semantic' / split / name), labels)
            coco['images'].append(
                dict(id=number, file_name=name, height=height, width=width)
            )
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(coco))
    return root


def arguments(nuclei, out, arms, seeds='0', iters=2, task='seg', jobs=0):
    return [
        *('--data', 'nuclei', '--task', task, '--data-root', str(nuclei)),
        *('--arms', *arms.split(), '--seeds', *seeds.split()),
        *('--iters', str(iters), '--jobs', str(jobs), '--out', str(out)),
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def recorded(nuclei, tmp_path_factory):
    """Two arms with two seeds, in one process."""
    out = tmp_path_factory.mktemp('recorded') / 'seg.jsonl'
    command = arguments(nuclei, out, 'carafe bilinear', '0 1')
    process = subprocess.run(
        [sys.executable, SCRIPT, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    return out


def test_pairs(recorded):
    """Equal starts and batches for a seed, other ones for another."""
    records = lines(recorded)
    assert [(r['arm'], r['seed']) for r in records] == [
        *(('carafe', 0), ('bilinear', 0), ('carafe', 1), ('bilinear', 1))
    ]
    carafe, bilinear, other, _ = records
    for key in ('start', 'batches'):
        assert carafe[key] == bilinear[key] != other[key]
    assert len({r['weights'] for r in records}) == 4


def test_what_a_line_says(recorded):
    carafe = lines(recorded)[0]
    assert set(carafe['metrics']) == {'mIoU', 'boundary IoU', 'pixel accuracy'}
    assert all(0 < x < 100 for x in carafe['metrics'].values())
    assert carafe['environment']['threads'] == 1
    assert len(carafe['environment']['commit']) in (7, 40)
    packages = ' '.join(carafe['environment']['packages'])
    assert re.search(r'mmsegmentation \d', packages)
    assert carafe['lr'] == carafe['optim_wrapper']['optimizer']['lr'] == 0.002
    assert [each['end'] for each in carafe['param_scheduler']] == [2, 2]
    assert carafe['seconds'] > carafe['seconds_training'] > 0


def test_unrounded_scores(accuracy):
    """By hand: of 6 pixels 5 are right; the IoUs are 3/4 and 2/3."""
    metric = accuracy.UnroundedIoU()
    metric.dataset_meta = dict(classes=('ground', 'nucleus'))
    truth = torch.tensor([[0, 0, 0, 1, 1, 1], [255] * 6])
    found = torch.tensor([[0, 0, 0, 1, 1, 0], [0] * 6])
    sample = dict(
        pred_sem_seg=dict(data=found), gt_sem_seg=dict(data=truth[None])
    )
    metric.process({}, [sample])
    scores = metric.evaluate(1)
    assert scores['mIoU'] == pytest.approx(850 / 12, abs=1e-9)
    assert scores['aAcc'] == pytest.approx(500 / 6, abs=1e-9)


def test_two_runs_are_equal_to_the_bit(
    recorded, nuclei, tmp_path, accuracy, monkeypatch
):
    """In another process, after another arm, with a model that draws."""
    forward = CARAFE.forward

    def draws(self, x):
        np.random.rand(3)
        return forward(self, x)

    monkeypatch.setattr(CARAFE, 'forward', draws)
    out = tmp_path / 'again.jsonl'
    accuracy.main(arguments(nuclei, out, 'carafe@fpn carafe'))
    first, *_ = lines(recorded)
    fpn, again = lines(out)
    assert fpn['batches'] == again['batches']
    assert fpn['weights'] != again['weights']
    for key in ('arm', 'seed', 'weights', 'start', 'batches', 'metrics'):
        assert again[key] == first[key]


def test_detectors(nuclei, tmp_path, accuracy):
    out = tmp_path / 'det.jsonl'
    accuracy.main(arguments(nuclei, out, 'nearest carafe', task='det'))
    nearest, carafe = lines(out)
    for key in ('start', 'batches'):
        assert nearest[key] == carafe[key]
    assert set(nearest['metrics']) == {'box AP', 'AP50', 'AP small'}
    assert all(0 <= x <= 100 for x in nearest['metrics'].values())


def test_shared_layers_are_copied(nuclei, tmp_path, accuracy):
    """Every one of them, and no layer of an upsampler."""
    args = accuracy.parse(arguments(nuclei, tmp_path / 'x', 'carafe'))
    accuracy.check(args)

    def build(arm):
        model = accuracy.MODELS.build(accuracy.configure(args, arm).model)
        model.init_weights()
        return model

    reference, model = build('bilinear'), build('carafe')
    accuracy.copy_weights(reference, model)
    shared, own = reference.state_dict(), model.state_dict()
    assert len(shared) > 100
    assert all(own[n].equal(value) for n, value in shared.items())
    assert all('upsample_modules' in n for n in own.keys() - shared.keys())
    assert len(own) > len(shared)

    del model.decode_head.conv_seg.bias
    with pytest.raises(RuntimeError, match='has no decode_head.conv_seg.bias'):
        accuracy.copy_weights(reference, model)
    model.decode_head.conv_seg = torch.nn.Conv2d(64, 3, 1)
    message = r'conv_seg.weight is \(3, 64, 1, 1\) in the model, expected'
    with pytest.raises(RuntimeError, match=message):
        accuracy.copy_weights(reference, model)


@pytest.mark.parametrize(
    'task, arm, rate',
    [
        ('seg', 'freqfusion:0.1', 0.002),
        ('seg', 'freqfusion@fpn:0.5', 0.01),
        ('seg', 'carafe', 0.02),
        ('det', 'sapa:0.1', 0.0001),
        ('det', 'sapa', 0.001),
    ],
)
def test_learning_rate_of_upsamplers(
    task, arm, rate, accuracy, nuclei, tmp_path
):
    """A factor reaches all their layers and no other layer."""
    args = accuracy.parse(
        arguments(nuclei, tmp_path / 'x', 'nearest', task=task)
    )

    def rates(arm):
        cfg = accuracy.configure(args, arm)
        model = accuracy.MODELS.build(cfg.model)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
        names = {value: name for name, value in model.named_parameters()}
        return {
            names[value]: group['lr']
            for group in optimizer.param_groups
            for value in group['params']
        }

    shared, all_rates = rates('nearest'), rates(arm)
    own = all_rates.keys() - shared.keys()
    assert own
    assert all(all_rates[name] == pytest.approx(rate) for name in own)
    assert all(all_rates[name] == lr for name, lr in shared.items())


@pytest.fixture
def quick(accuracy, recorded, monkeypatch):
    """Lines without training; counts what would have been trained."""
    like = lines(recorded)[0]
    trained = []

    def train(args, arm, seed):
        trained.append((arm, seed))
        return {**like, **accuracy.run_key(args, arm, seed)}

    monkeypatch.setattr(accuracy, 'train', train)
    monkeypatch.setattr(accuracy._cli, 'build_model', lambda cfg: None)
    return trained


@pytest.mark.parametrize('left', [1, 40, -1], ids='begun half whole'.split())
def test_resume_after_a_torn_line(
    left, accuracy, quick, nuclei, tmp_path, capsys
):
    """Finished lines are skipped; the torn one has this many bytes."""
    out = tmp_path / 'seg.jsonl'
    command = arguments(nuclei, out, 'bilinear carafe', '0 1')
    accuracy.main(command)
    everything = [('bilinear', 0), ('carafe', 0), ('bilinear', 1)]
    everything.append(('carafe', 1))
    assert quick == everything
    whole = out.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    out.write_bytes(whole[: -len(last)] + last[:left])

    quick.clear()
    accuracy.main(command)
    assert quick == everything[3:]
    assert out.read_bytes() == whole
    assert 'the torn last line is left out' in capsys.readouterr().out
    accuracy.main(command)
    assert quick == everything[3:]
    # another learning rate is another run
    accuracy.main([*command, '--lr', '0.1'])
    assert quick == everything[3:] + everything


def test_a_line_that_another_process_wrote(accuracy, recorded, tmp_path):
    out = tmp_path / 'seg.jsonl'
    record = lines(recorded)[0]
    accuracy.append(record, out)
    accuracy.append({**record, 'seconds': 1}, out)
    assert lines(out) == [record]


def test_a_run_that_fails(accuracy, nuclei, tmp_path, monkeypatch, capsys):
    """It is reported, and the other run still finishes."""
    command = accuracy.command

    def fails(args, arm, seed):
        if arm == 'carafe':
            return [sys.executable, '-c', 'import sys; sys.exit("boom")']
        return command(args, arm, seed)

    monkeypatch.setattr(accuracy, 'command', fails)
    out = tmp_path / 'seg.jsonl'
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit:
            accuracy.main(arguments(nuclei, out, 'carafe bilinear', jobs=2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "error: 1 of 2 runs failed: ['carafe with seed 0']" in str(exit)
    printed, errors = capsys.readouterr()
    assert 'carafe with seed 0 failed with exit code 1' in errors
    assert 'boom' in errors
    assert '[1/2] carafe with seed 0: failed; time left: unknown' in printed
    assert re.search(
        r'\[2/2] bilinear with seed 0: mIoU [\d.]+, boundary IoU [\d.]+, '
        r'pixel accuracy [\d.]+, \d+ s; time left: 0 min',
        printed,
    )
    assert [r['arm'] for r in lines(out)] == ['bilinear']


def test_a_call_that_is_killed(recorded, nuclei, tmp_path):
    """Its processes end with it."""
    process = subprocess.Popen(
        [
            *(sys.executable, SCRIPT),
            *arguments(nuclei, tmp_path / 'x', 'carafe', iters=10**6, jobs=1),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        first = next(line for line in process.stdout if ' of ' in line)
        assert first == '0 of 1 runs are there\n'
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
        deadline = time.monotonic() + 60
        while not children.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        (child,) = children.read_text().split()
        process.terminate()
        assert process.wait(60) == 143
    assert not Path(f'/proc/{child}').exists()


def test_report(accuracy, recorded, tmp_path, capsys):
    """Differences 1, 2 and 6: mean 3, sd sqrt(7), t(2) = 4.302653."""
    like = lines(recorded)[0]
    out = tmp_path / 'seg.jsonl'
    scores = {
        'bilinear': {0: 80.0, 1: 81.0, 2: 82.0, 3: 70.0},
        'carafe': {2: 88.0, 0: 81.0, 1: 83.0, 4: 99.0},
        'carafe-both': {0: 79.0},
    }
    for arm, by_seed in scores.items():
        for seed, x in by_seed.items():
            metrics = dict(mIoU=x, accuracy=None if arm == 'carafe' else x)
            accuracy.append(
                {**like, 'arm': arm, 'seed': seed, 'metrics': metrics}, out
            )
    figures, picture = tmp_path / 'x.json', tmp_path / 'x.png'
    accuracy.main(
        ['report', *map(str, (out, '--json', figures, '--plot', picture))]
    )
    (group,) = json.loads(figures.read_text())
    assert group['baseline'] == 'bilinear'
    found = group['arms']['carafe']['mIoU']
    assert (found['n'], found['mean']) == (4, 87.75)
    difference = found['difference']
    assert difference['seeds'] == {'0': 1, '1': 2, '2': 6}
    assert difference['mean'] == 3
    half = 4.302652729749464 * math.sqrt(7) / math.sqrt(3)
    assert difference['half_width'] == pytest.approx(half, rel=1e-9)
    assert group['arms']['carafe']['accuracy']['difference'] is None
    assert group['arms']['bilinear']['mIoU']['difference'] is None
    alone = group['arms']['carafe-both']['mIoU']['difference']
    assert (alone['mean'], alone['half_width']) == (-1, None)
    printed = capsys.readouterr().out
    assert '| carafe | 4 | 87.75 ± 8.06 | – | 3 | +3.00 ± 6.57 |' in printed
    assert '| carafe-both | 1 | 79.00 | 79.00 | 1 | −1.00 | −1.00 |' in printed
    assert "95% interval (Student's t over the pairs)" in printed
    assert cv2.imread(str(picture)).shape[1] == 996

    accuracy.main(['report', str(out), '--baseline', 'carafe'])
    printed = capsys.readouterr().out
    assert (
        '| bilinear | 4 | 78.25 ± 5.56 | 78.25 ± 5.56 | 3 | −3.00' in printed
    )


def test_report_of_lengths(accuracy, recorded, tmp_path, capsys):
    """One metric, a column for each length; differences 1 and 3, t(1)."""
    like = lines(recorded)[0]
    out = tmp_path / 'seg.jsonl'
    scores = {
        ('bilinear', 300): [80.0, 81.0],
        ('bilinear', 600): [90.0],
        ('carafe', 300): [81.0, 84.0],
        ('carafe', 600): [89.5],
        ('nearest', 300): [79.0],
        ('nearest', 600): [92.0],
        ('nearest', 900): [94.0],
        ('deconv', 600): [91.0],
        ('bilinear', 900): [95.0],
    }
    for (arm, iters), by_seed in scores.items():
        for seed, x in enumerate(by_seed):
            run = dict(arm=arm, iters=iters, seed=seed, metrics=dict(mIoU=x))
            accuracy.append({**like, **run}, out)
    report = ['report', str(out), '--lengths']
    accuracy.main([*report, 'mIoU'])
    assert capsys.readouterr().out.splitlines()[:5] == [
        '| Δ mIoU after | 300 it. | 600 it. | 900 it. |',
        '| --- | --: | --: | --: |',
        '| carafe | +2.00 ± 12.71 (2) | −0.50 (1) |  |',
        '| nearest | −1.00 (1) | +2.00 (1) | −1.00 (1) |',
        '',
    ]
    with pytest.raises(SystemExit, match='--lengths: .* of mIoU, got AP'):
        accuracy.main([*report, 'AP'])
    with pytest.raises(SystemExit, match='no arm has pairs with deconv at tw'):
        accuracy.main([*report, 'mIoU', '--baseline', 'deconv'])
    accuracy.append({**like, 'lr': 1.0, 'metrics': dict(mIoU=1.0)}, out)
    with pytest.raises(SystemExit, match='--lengths: lr: expected one for al'):
        accuracy.main([*report, 'mIoU'])


def test_a_plot_of_no_difference(accuracy, recorded, tmp_path):
    out, picture = tmp_path / 'seg.jsonl', tmp_path / 'x.png'
    record = lines(recorded)[0]
    for arm in 'bilinear', 'carafe':
        accuracy.append({**record, 'arm': arm}, out)
    accuracy.main(['report', str(out), '--plot', str(picture)])
    assert picture.is_file()


@pytest.mark.parametrize('key', ['start', 'batches'])
def test_no_pair(key, accuracy, recorded, tmp_path):
    """The report refuses what did not start alike or saw other images."""
    out = tmp_path / 'seg.jsonl'
    carafe, bilinear, *_ = lines(recorded)
    accuracy.append(bilinear, out)
    accuracy.append({**carafe, key: 'else'}, out)
    with pytest.raises(SystemExit, match=f'carafe with .*: {key} else, expe'):
        accuracy.main(['report', str(out)])


def test_other_images(accuracy, recorded, nuclei, tmp_path, capsys):
    """They are another table, and another run."""
    out = tmp_path / 'seg.jsonl'
    record = lines(recorded)[0]
    accuracy.append(record, out)
    accuracy.append({**record, 'images': 'else'}, out)
    accuracy.main(['report', str(out)])
    printed = capsys.readouterr().out
    assert printed.count('### nuclei, seg, 2 iterations') == 2
    assert f'; scored images {record["images"]}.' in printed
    assert '; scored images else.' in printed

    def scored(root):
        args = accuracy.parse(arguments(root, out, 'carafe'))
        accuracy.check(args)
        return args.images

    assert scored(nuclei) == record['images']
    other = tmp_path / 'other'
    shutil.copytree(nuclei, other)
    image = cv2.imread(str(other / 'semantic/val/1.png'), 0)
    image[0, 0] ^= 1
    cv2.imwrite(str(other / 'semantic/val/1.png'), image)
    assert scored(other) != record['images']


def test_recorded_twice(accuracy, recorded):
    with pytest.raises(SystemExit, match='seed 0, 2 iter.* recorded twice'):
        accuracy.main(['report', str(recorded), str(recorded)])


@pytest.mark.parametrize(
    'change, message',
    [
        (['--arms', 'cubic'], '--arms: cubic, expected nearest, bilinear, '),
        (['--arms', 'carafe', 'carafe'], '--arms: carafe is given twice'),
        (['--arms', 'carafe:'], '--arms: carafe:, expected nearest'),
        (['--arms', 'carafe:0'], '--arms: carafe:0, expected a factor of mo'),
        (['--arms', 'carafe@neck'], '--arms: carafe@neck, expected places ou'),
        (['--arms', 'carafe@fpn', '--task', 'det'], 'only --task seg has pla'),
        (['--seeds', '3', '3'], '--seeds: 3 is given twice'),
        (['--seeds', '-1'], '--seeds: -1, expected 0 or more'),
        (['--iters', '0'], '--iters: 0, expected at least 1'),
        (['--jobs', '-1'], '--jobs: -1, expected 0 or more'),
        (['--lr', '0'], '--lr: 0.0, expected more than 0'),
        (
            ['--data-root', '/nowhere'],
            'train_dataloader.dataset.data_root: th',
        ),
    ],
)
def test_mistakes(change, message, accuracy, nuclei, tmp_path):
    """One line each, before anything is written."""
    out = tmp_path / 'new' / 'seg.jsonl'
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        accuracy.main([*arguments(nuclei, out, 'carafe'), *change])
    assert not out.parent.exists()


def test_an_arm_that_cannot_be_built(accuracy, nuclei, tmp_path, monkeypatch):
    arm = dict(type='mmcarafe.CARAFE', up_kernel=4)
    monkeypatch.setitem(accuracy.UPSAMPLERS, 'even', arm)
    with pytest.raises(SystemExit, match='up_kernel is 4, expected'):
        accuracy.main(arguments(nuclei, tmp_path / 'x', 'carafe even'))
    assert not (tmp_path / 'x').exists()


def test_a_file_of_something_else(accuracy, nuclei, tmp_path):
    out = tmp_path / 'seg.jsonl'
    out.write_text('{"data": "nuclei"}\n')
    message = 'seg.jsonl, line 1: expected a record of this program, got'
    for command in (['report', str(out)], arguments(nuclei, out, 'carafe')):
        with pytest.raises(SystemExit, match=message):
            accuracy.main(command)
    assert out.read_text() == '{"data": "nuclei"}\n'


def test_hold_out(nuclei, tmp_path, capsys, monkeypatch):
    """Every fourth training image and its boxes; no validation image."""
    import accuracy_hold_out

    target = tmp_path / 'held'
    monkeypatch.setattr(sys, 'argv', ['', str(nuclei), str(target)])
    accuracy_hold_out.main()
    assert '6 training and 3 validation images' in capsys.readouterr().out

    coco = json.loads((nuclei / 'annotations/train.json').read_text())
    held = ['0.png', '4.png', '8.png']
    for split, kept in (('train', False), ('val', True)):
        images = [
            x for x in coco['images'] if (x['file_name'] in held) == kept
        ]
        names = {image['file_name'] for image in images}
        for folder in ('images', 'semantic'):
            files = list((target / folder / split).iterdir())
            assert {file.name for file in files} == names
            for file in files:
                original = nuclei / folder / 'train' / file.name
                assert file.read_bytes() == original.read_bytes()
        new = json.loads((target / f'annotations/{split}.json').read_text())
        assert new['images'] == images
        ids = [image['id'] for image in images]
        assert new['annotations'] == [
            box for box in coco['annotations'] if box['image_id'] in ids
        ]
        assert new['categories'] == coco['categories']
    with pytest.raises(SystemExit):
        accuracy_hold_out.main()
    assert 'exists, expected a new folder' in capsys.readouterr().err
