"""Which upsampler trains to the better model, and by how much.

    python benchmarks/accuracy.py --data nuclei --task seg \\
        --arms bilinear carafe --seeds 0 1 2 3 4 --iters 600 \\
        --out work_dirs/accuracy/nuclei.jsonl
    python benchmarks/accuracy.py report work_dirs/accuracy/nuclei.jsonl \\
        --plot work_dirs/accuracy/nuclei.png

Every arm, named after its upsampler in ``UPSAMPLERS``, trains a small model of
configs/nuclei or configs/shapes from scratch. All arms of a seed

- start from the same weights: the layers that UPerHead or FPN also has are
  copied from one reference model, and the upsamplers' own layers come from
  random numbers that the seed alone decides;
- see the same batches, crops and flips: before each iteration, all random
  numbers are seeded from the seed and the number of the iteration;
- are evaluated once, with the weights of the last iteration.

So the two runs of a seed differ by the upsampler alone, and the report rests
on these paired differences. What a change of a few weights leads to in the end
remains luck, as the spread of the differences shows. The report stops if the
two runs of a pair were recorded with different starting weights or batches.

The learning rate is the config's unless ``--lr`` is given; it rises over the
first tenth of the iterations and falls as a cosine to zero. An upsampler's own
layers learn as fast as the layers around them, or FACTOR times as fast in an
arm ``NAME:FACTOR``. Such settings should be chosen, equally for all arms, on
the images that accuracy_hold_out.py sets aside and on a seed that is not
reported, such as 999. Boundary IoU uses bands of 2 pixels. COCO's scores are
rounded to 0.1.

Each run uses one CPU thread, so that two runs of one arm and seed are equal to
the bit; ``--jobs`` run at a time. Each finished run appends a line to
``--out``; the next call with the same arguments skips what is there. An
interrupted call loses only the runs under way.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(ROOT / 'benchmarks')]

import _cli  # noqa: E402
import _data  # noqa: E402
import accuracy_report  # noqa: E402
import torch  # noqa: E402
from _measure import environment  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.registry import METRICS, MODELS  # noqa: E402
from mmengine.runner import Runner, set_random_seed  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402

CARAFE = dict(type='mmcarafe.CARAFE')
BOTH = dict(CARAFE, border='renormalize', init='bilinear')
UPSAMPLERS = {
    'nearest': dict(type='nearest'),
    'bilinear': dict(type='bilinear'),
    'deconv': dict(type='deconv'),
    'carafe': CARAFE,
    'carafe-border': dict(CARAFE, border='renormalize'),
    'carafe-start': dict(CARAFE, init='bilinear'),
    'carafe-both': BOTH,
    # the content encoder's kernel size by the paper's rule, K - 2
    'carafe-both-k7': dict(BOTH, up_kernel=7, encoder_kernel=5),
    'dysample': dict(type='mmcarafe.DySample'),
    'sapa': dict(type='mmcarafe.SAPA'),
    'freqfusion': dict(type='mmcarafe.FreqFusion'),
}
# The baseline is the host's own class, UPerHead or FPN. The starting weights
# come from it too.
TASKS = {
    'seg': dict(
        config='upernet-carafe_r18',
        baseline='bilinear',
        metrics={
            'mIoU': 'mIoU',
            'boundary/mIoU': 'boundary IoU',
            'aAcc': 'pixel accuracy',
        },
    ),
    'det': dict(
        config='faster-rcnn_r18_fpn-carafe',
        baseline='nearest',
        metrics={
            'coco/bbox_mAP': 'box AP',
            'coco/bbox_mAP_50': 'AP50',
            'coco/bbox_mAP_s': 'AP small',
        },
    ),
}
PLACES = ('ppm', 'fpn', 'fuse')  # of CARAFEUPerHead
ARM = re.compile(
    r'(?P<upsampler>[a-z0-9-]+)(@(?P<places>[a-z+]+))?(:(?P<factor>\d+(\.\d+)?))?'
)
SAME_RUN = ('data', 'images', 'task', 'arm', 'seed', 'iters', 'lr')
WARMUP = 0.1  # share of the iterations
BAND = 2  # pixels, of boundary IoU


@METRICS.register_module()
class UnroundedIoU(IoUMetric):
    """mmseg's mIoU and pixel accuracy, which it rounds to 0.01."""

    default_prefix = ''

    def compute_metrics(self, results):
        areas = [sum(x.double() for x in each) for each in zip(*results)]
        scores = self.total_area_to_metrics(*areas)
        return {
            'mIoU': 100 * float(np.nanmean(scores['IoU'])),
            'aAcc': 100 * float(scores['aAcc']),
        }


class Pairing(Hook):
    """Make a run differ from the others of its seed by the upsampler alone.

    Args:
        reference (dict): config of the model that has only shared layers.
        seed (int): of the run.

    ``start`` and ``batches`` are hashes of the shared layers' first weights
    and of all batches so far.
    """

    def __init__(self, reference, seed):
        self.reference = reference
        self.seed = seed
        self.start = None
        self.batches = None

    def before_train(self, runner):
        set_random_seed(self.seed)
        reference = MODELS.build(self.reference)
        reference.init_weights()
        self.start = copy_weights(reference, runner.model)
        self._hash = hashlib.sha256()
        self._seed_iteration(0)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for x in data_batch['inputs']:
            self._hash.update(x.numpy().tobytes())
        for sample in data_batch['data_samples']:
            if 'gt_sem_seg' in sample:
                truth = [sample.gt_sem_seg.data]
            else:
                boxes = sample.gt_instances.bboxes
                truth = [
                    getattr(boxes, 'tensor', boxes),
                    sample.gt_instances.labels,
                ]
            for x in truth:
                self._hash.update(x.numpy().tobytes())
        self.batches = self._hash.hexdigest()

    def after_train_iter(self, runner, *args, **kwargs):
        # Detectors draw as many random numbers as their predictions require;
        # the next batch is loaded after this.
        self._seed_iteration(runner.iter + 1)

    def _seed_iteration(self, number):
        sequence = np.random.SeedSequence([self.seed, number])
        set_random_seed(int(sequence.generate_state(1)[0]))


def copy_weights(reference, model):
    """Copy each weight and statistic of the reference into the model.

    Returns:
        str: hash of what was copied, read back from the model.

    Raises:
        RuntimeError: the model lacks one, or has it in another shape.
    """
    shared = reference.state_dict()
    own = model.state_dict()
    for name, value in shared.items():
        if name not in own:
            raise RuntimeError(f'the model has no {name}, the reference has')
        if own[name].shape != value.shape:
            raise RuntimeError(
                f'{name} is {tuple(own[name].shape)} in the model, expected '
                f"the reference's {tuple(value.shape)}"
            )
    model.load_state_dict(shared, strict=False)
    own = model.state_dict()
    return digest({name: own[name] for name in shared})


def digest(state):
    """Hash of names and values of a state dict."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].cpu().numpy().tobytes())
    return sha.hexdigest()


def scored_images(cfg):
    """Hash of the images to test on, and of what is true of them."""
    dataset = cfg.test_dataloader.dataset
    root = Path(dataset.data_root)
    paths = [dataset.get('ann_file', ''), *dataset.data_prefix.values()]
    sha = hashlib.sha256()
    for path in [root / each for each in paths if each]:
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            sha.update(file.relative_to(root).as_posix().encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()[:10]


def configure(args, arm, seed=0, work_dir='work_dirs'):
    """The project's config with an arm's upsampler, and this schedule."""
    task = TASKS[args.task]
    name = f'{task["config"]}_{args.data}.py'
    cfg = Config.fromfile(ROOT / 'configs' / args.data / name)
    upsampler, places, factor = parse_arm(arm)
    if args.task == 'seg':
        head = cfg.model.decode_head
        for place in PLACES:
            head[f'{place}_upsample_cfg'] = (
                UPSAMPLERS[upsampler] if place in places else None
            )
        if arm == task['baseline']:
            head.type = 'UPerHead'
            for place in PLACES:
                del head[f'{place}_upsample_cfg']
    else:
        neck = cfg.model.neck
        neck.upsample_cfg = UPSAMPLERS[upsampler]
        if arm == task['baseline']:
            neck.type = 'FPN'
            del neck.upsample_cfg
    # The longest key that a parameter's name contains decides; the names of
    # upsamplers' parameters, and no others, contain this one.
    keys = cfg.optim_wrapper.get('paramwise_cfg', {}).get('custom_keys', {})
    around = keys.get('head' if args.task == 'seg' else 'neck', {})
    own = dict(lr_mult=factor * around.get('lr_mult', 1))
    cfg.merge_from_dict(
        {'optim_wrapper.paramwise_cfg.custom_keys.upsample': own}
    )

    cfg.work_dir = str(work_dir)
    # mmengine reuses what has the same name in one process
    cfg.experiment_name = f'{arm}_{seed}_{time.time_ns()}'
    cfg.visualizer.name = cfg.experiment_name
    cfg.launcher = 'none'
    cfg.log_level = 'WARNING'
    cfg.log_processor.by_epoch = False
    cfg.randomness = dict(seed=seed)
    cfg.default_hooks.checkpoint = None
    del cfg.default_hooks.visualization

    root = str(args.data_root)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = root + '/'
        loader.num_workers = 0
        loader.persistent_workers = False
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.test_dataloader = cfg.val_dataloader
    if args.task == 'seg':
        cfg.test_evaluator = [
            dict(type='UnroundedIoU'),
            dict(type='mmcarafe.BoundaryIoUMetric', width=BAND),
        ]
    else:
        ann_file = cfg.val_dataloader.dataset.ann_file
        cfg.test_evaluator.ann_file = f'{root}/{ann_file}'
    cfg.test_cfg = dict(type='TestLoop')
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None

    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=args.iters)
    if args.lr is not None:
        cfg.optim_wrapper.optimizer.lr = args.lr
    cfg.param_scheduler = [
        dict(
            type='LinearLR',
            start_factor=0.01,
            by_epoch=False,
            end=max(2, round(WARMUP * args.iters)),
        ),
        dict(
            type='CosineAnnealingLR',
            eta_min=0,
            by_epoch=False,
            end=args.iters,
        ),
    ]
    return cfg


def train(args, arm, seed):
    """Train and test one arm with one seed; return the line to record."""
    torch.set_num_threads(1)
    began = time.monotonic()
    machine = environment(torch.device('cpu'))
    baseline = configure(args, TASKS[args.task]['baseline'])
    with tempfile.TemporaryDirectory() as work_dir:
        cfg = configure(args, arm, seed, work_dir)
        runner = Runner.from_cfg(cfg)
        pairing = Pairing(baseline.model, seed)
        runner.register_hook(pairing)
        runner.train()
        training = time.monotonic() - began
        weights = digest(runner.model.state_dict())
        scores = runner.test()
    unit = 100 if args.task == 'det' else 1
    metrics = {}
    for key, name in TASKS[args.task]['metrics'].items():
        # COCO's score is -1 where there is nothing to find
        known = math.isfinite(scores[key]) and scores[key] >= 0
        metrics[name] = round(unit * scores[key], 4) if known else None
    return {
        **run_key(args, arm, seed),
        'metrics': metrics,
        'seconds': round(time.monotonic() - began, 1),
        'seconds_training': round(training, 1),
        'weights': weights,
        'start': pairing.start,
        'batches': pairing.batches,
        'batch_size': cfg.train_dataloader.batch_size,
        'upsampler': UPSAMPLERS[parse_arm(arm)[0]],
        'optim_wrapper': cfg.optim_wrapper.to_dict(),
        'param_scheduler': [dict(each) for each in cfg.param_scheduler],
        'environment': {**machine, 'numpy': np.__version__},
    }


def parse_arm(arm):
    """The upsampler's name, its places and the factor of its learning rate.

    Raises:
        ValueError: the name does not say all this.
    """
    match = ARM.fullmatch(arm)
    if not match or match['upsampler'] not in UPSAMPLERS:
        raise ValueError(f'{arm}, expected {", ".join(UPSAMPLERS)}')
    places = match['places'].split('+') if match['places'] else PLACES
    if not set(places) <= set(PLACES):
        raise ValueError(
            f'{arm}, expected places out of {", ".join(PLACES)}, joined by +'
        )
    factor = float(match['factor'] or 1)
    if not 0 < factor < math.inf:
        raise ValueError(f'{arm}, expected a factor of more than 0')
    return match['upsampler'], places, factor


def run_key(args, arm, seed):
    values = {**vars(args), 'arm': arm, 'seed': seed}
    return {name: values[name] for name in SAME_RUN}


def key_of(record, names=SAME_RUN):
    return tuple(record[name] for name in names)


def parse_lines(content, path):
    """The records, and the number of bytes of a torn last line."""
    *lines, torn = content.split(b'\n')
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key_of(record)
        except (ValueError, KeyError, TypeError) as error:
            _cli.fail(
                f'{path}, line {number}: expected a record of this program, '
                f'got {line[:40]!r} ({type(error).__name__}: {error})'
            )
        records.append(record)
    if torn:
        print(f'{path}: the torn last line is left out', flush=True)
    return records, len(torn)


def read_records(path):
    if not path.exists():
        return []
    return parse_lines(path.read_bytes(), path)[0]


def append(record, path):
    """Write a whole line, once, after those of other processes."""
    line = json.dumps(record, allow_nan=False).encode() + b'\n'
    with open(path, 'a+b', buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        records, torn = parse_lines(content, path)
        if torn:
            file.truncate(len(content) - torn)
        if key_of(record) in map(key_of, records):
            return  # another process was faster
        if file.write(line) != len(line):
            raise OSError(f'{path}: a line could not be written whole')
        os.fsync(file)


def command(args, arm, seed):
    """The command that trains one arm with one seed in its own process."""
    return [
        *(sys.executable, __file__, '--data', args.data, '--task', args.task),
        *('--data-root', str(args.data_root), '--out', str(args.out)),
        *('--arms', arm, '--seeds', str(seed), '--iters', str(args.iters)),
        *('--lr', repr(args.lr), '--jobs', '0'),
    ]


def run_here(args, todo):
    for arm, seed in todo:
        append(train(args, arm, seed), args.out)


def run_processes(args, todo):
    """Run all, ``args.jobs`` at a time; return the names of failed runs."""
    # Not an exception: inside Popen it would leave a process behind.
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    waiting, running, failed = list(todo), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                arm, seed = waiting.pop(0)
                log = tempfile.TemporaryFile('w+')
                process = subprocess.Popen(
                    command(args, arm, seed),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                )
                running[process] = arm, seed, log
            time.sleep(0.2)
            if terminated.is_set():
                sys.exit(143)
            for process in [p for p in running if p.poll() is not None]:
                arm, seed, log = running.pop(process)
                name = f'{arm} with seed {seed}'
                left = len(waiting) + len(running)
                if process.returncode:
                    failed.append(name)
                    log.seek(0)
                    tail = ''.join(log.readlines()[-20:])
                    print(
                        f'{name} failed with exit code {process.returncode}; '
                        f'the end of its output:\n{tail}',
                        file=sys.stderr,
                        flush=True,
                    )
                show_progress(args, name, arm, seed, len(todo), left)
                log.close()
    finally:
        for process in running:
            process.terminate()
        for process, (*_, log) in running.items():
            process.wait()
            log.close()
    return failed


def show_progress(args, name, arm, seed, total, left):
    """One line: what was done, its scores, and the time left."""
    records = {key_of(r): r for r in read_records(args.out)}
    done = records.get(tuple(run_key(args, arm, seed).values()))
    text = 'failed'
    if done:
        scores = ', '.join(
            f'{key} {format_score(value)}'
            for key, value in done['metrics'].items()
        )
        text = f'{scores}, {done["seconds"]:.0f} s'
    like = (args.data, args.task, args.iters)
    seconds = [
        r['seconds']
        for r in records.values()
        if key_of(r, ('data', 'task', 'iters')) == like
    ]
    rest = 'unknown'
    if seconds:
        rounds = math.ceil(left / args.jobs)
        rest = f'{statistics.mean(seconds) * rounds / 60:.0f} min'
    print(
        f'[{total - left}/{total}] {name}: {text}; time left: {rest}',
        flush=True,
    )


def format_score(value):
    return '–' if value is None else f'{value:.2f}'


def check(args):
    """Find the user's mistakes before anything is written."""
    for name, values in (('arms', args.arms), ('seeds', args.seeds)):
        twice = {x for x in values if values.count(x) > 1}
        if twice:
            _cli.fail(f'--{name}: {min(twice)} is given twice')
    if min(args.seeds) < 0:
        _cli.fail(f'--seeds: {min(args.seeds)}, expected 0 or more')
    if args.iters < 1:
        _cli.fail(f'--iters: {args.iters}, expected at least 1')
    if args.jobs < 0:
        _cli.fail(f'--jobs: {args.jobs}, expected 0 or more')
    if args.lr is not None and not 0 < args.lr < math.inf:
        _cli.fail(f'--lr: {args.lr}, expected more than 0')
    for arm in args.arms:
        try:
            parse_arm(arm)
        except ValueError as error:
            _cli.fail(f'--arms: {error}')
        if '@' in arm and args.task != 'seg':
            _cli.fail(f'--arms: {arm}, but only --task seg has places')
    args.out = args.out.resolve()
    args.data_root = (args.data_root or ROOT / 'data' / args.data).resolve()
    cfg = configure(args, args.arms[0])
    args.lr = float(cfg.optim_wrapper.optimizer.lr)
    for split in ('train', 'test'):
        _data.check_data(cfg, split)
    args.images = scored_images(cfg)
    for arm in args.arms:
        _cli.build_model(configure(args, arm))


def parse(argv):
    parser = argparse.ArgumentParser(
        description='Train arms with paired seeds.',
        epilog='accuracy.py report FILE compares what was recorded.',
    )
    parser.add_argument('--data', choices=('nuclei', 'shapes'), required=True)
    parser.add_argument('--task', choices=tuple(TASKS), required=True)
    parser.add_argument(
        '--data-root', type=Path, help='default: data/ and the name of --data'
    )
    parser.add_argument(
        '--arms',
        nargs='+',
        required=True,
        metavar='ARM',
        help=f'{", ".join(UPSAMPLERS)}; for --task seg also with places, as '
        'carafe@ppm+fuse: the others stay bilinear; and with a factor of the '
        "upsamplers' learning rate, as carafe:0.1",
    )
    parser.add_argument('--seeds', type=int, nargs='+', required=True)
    parser.add_argument('--iters', type=int, required=True)
    parser.add_argument(
        '--out', type=Path, required=True, help='json lines, appended to'
    )
    parser.add_argument('--lr', type=float, help="default: the config's")
    parser.add_argument(
        '--jobs',
        type=int,
        default=2,
        help='processes at a time, one core each; 0: in this process, one '
        'after the other (default: 2)',
    )
    return parser.parse_args(argv)


def run(args):
    warnings.simplefilter('ignore')  # the host projects' deprecations
    check(args)
    done = set(map(key_of, read_records(args.out)))
    # A seed's arms follow each other, so that its pairs are soon complete.
    todo = [
        (arm, seed)
        for seed in args.seeds
        for arm in args.arms
        if tuple(run_key(args, arm, seed).values()) not in done
    ]
    total = len(args.arms) * len(args.seeds)
    print(f'{total - len(todo)} of {total} runs are there', flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.jobs:
        run_here(args, todo)
        return
    failed = run_processes(args, todo)
    if failed:
        _cli.fail(f'{len(failed)} of {len(todo)} runs failed: {failed}')


def report(argv):
    parser = argparse.ArgumentParser(
        prog='accuracy.py report',
        description='Compare the arms with the baseline, seed by seed.',
    )
    parser.add_argument('files', type=Path, nargs='+', metavar='FILE')
    parser.add_argument(
        '--baseline',
        metavar='ARM',
        help='default: bilinear for --task seg, nearest for det',
    )
    parser.add_argument(
        '--lengths',
        metavar='METRIC',
        help="print only this metric's differences, a column for each number "
        'of iterations; arms of one length are left out',
    )
    parser.add_argument('--json', type=Path, help='write the figures here')
    parser.add_argument('--plot', type=Path, help='draw the differences here')
    args = parser.parse_args(argv)
    records = []
    for path in args.files:
        if not path.is_file():
            _cli.fail(f'there is no file {path}')
        records += read_records(path)
    if not records:
        _cli.fail(f'{args.files[0]} holds no finished run')
    arms = sorted({record['arm'] for record in records})
    if args.baseline and args.baseline not in arms:
        _cli.fail(f'--baseline: {args.baseline}, expected {", ".join(arms)}')
    baselines = {
        name: args.baseline or task['baseline'] for name, task in TASKS.items()
    }
    try:
        groups = accuracy_report.summarize(records, baselines)
        if args.lengths:
            text = accuracy_report.lengths_table(groups, args.lengths)
        else:
            text = accuracy_report.table(groups)
        if args.plot:
            accuracy_report.plot(groups, args.plot)
    except ValueError as error:
        _cli.fail(error)
    if args.json:
        figures = json.dumps(groups, indent=1, allow_nan=False)
        args.json.write_text(figures + '\n')
    print(text)


def main(argv):
    if argv[:1] == ['report']:
        report(argv[1:])
    else:
        run(parse(argv))


if __name__ == '__main__':
    main(sys.argv[1:])
