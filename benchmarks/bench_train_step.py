"""Time of a whole training step of Faster R-CNN, with CARAFE and without.

    python benchmarks/bench_train_step.py

One random image with ten boxes, forward, backward and SGD. The two models
take turns; medians are reported, and their ratio.
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
from bench_op import environment
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parents[1]
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
    parser.add_argument('--device', type=torch.device, default='cpu')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(800, 1333), metavar=('H', 'W')
    )
    args = parser.parse_args()
    warnings.simplefilter('ignore')
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


if __name__ == '__main__':
    main()
