"""Time of a whole training step of Faster R-CNN, with CARAFE and without.

    python benchmarks/bench_train_step.py --out work_dirs/bench_train_step

One random image with ten boxes, forward, backward and SGD. The two models
take turns; medians are reported, and their ratio. Writes ``results.json``
(with machine, versions and commit) to the folder given.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import torch  # noqa: E402
from _measure import environment, fail, find_device  # noqa: E402
from mmdet.testing import demo_mm_inputs  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

CONFIG = ROOT / 'configs/faster_rcnn/faster-rcnn_r50_fpn-carafe_1x_coco.py'


def build(upsampler, device):
    """The model and one training step of it."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.init_cfg = None
    cfg.model.neck.upsample_cfg = dict(type=upsampler)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(device).train()
    model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step(batch):
        data = model.data_preprocessor(batch, True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out', type=Path, default='work_dirs/bench_train_step'
    )
    parser.add_argument('--device', type=find_device, default='cpu')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(800, 1333), metavar=('H', 'W')
    )
    args = parser.parse_args()
    if args.rounds < 1:
        fail(f'--rounds is {args.rounds}, expected an int >= 1')
    warnings.simplefilter('ignore')
    # init_weights would log a paragraph for each parameter
    MMLogger.get_instance('bench', log_level='WARNING')
    steps = {
        name: build(name, args.device)
        for name in ('nearest', 'mmcarafe.CARAFE')
    }
    batch = demo_mm_inputs(1, [(3, *args.shape)], num_items=[10])
    times = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):  # the first one warms up
        for name, step in steps.items():
            if args.device.type == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(batch)
            if args.device.type == 'cuda':
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    env = environment(args.device)
    print(
        f'{env["device"]}, {env["threads"]} threads, torch {env["torch"]}, '
        f'commit {env["commit"][:10]}, {args.shape[0]}x{args.shape[1]}'
    )
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, seconds in medians.items():
        spread = f'{min(times[name]):.3f} to {max(times[name]):.3f}'
        ratio = seconds / medians['nearest']
        print(f'{name:16} {seconds:.3f} s ({spread}), {ratio:.3f}×')
    report = {
        'environment': env,
        'image': args.shape,
        'results': [
            {
                'upsampler': name,
                'seconds': seconds,
                'all_seconds': times[name],
            }
            for name, seconds in medians.items()
        ],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / 'results.json'
    path.write_text(json.dumps(report, indent=1) + '\n')
    print(f'written: {path}')


if __name__ == '__main__':
    main()
