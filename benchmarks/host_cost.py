"""What a call costs the CPU until its kernel is launched on a GPU.

    python benchmarks/host_cost.py

Small maps are launched more slowly than a GPU computes them. Everything that
Python does in a call is timed, without the work of the CUDA driver: the GPU is
the one of fake_gpu.py, so none is needed. Beside it stand what autograd costs
for any function of two tensors, and torch's own interpolation, on the CPU, of
a map that is small enough to take no time.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(ROOT / 'benchmarks')]

import fake_gpu  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _measure import PASSES  # noqa: E402

from mmcarafe.ops import carafe_from_logits  # noqa: E402


class Nothing(torch.autograd.Function):
    """The least that a function with two inputs costs."""

    @staticmethod
    def forward(ctx, features, logits):
        ctx.save_for_backward(features, logits)
        n, c, h, w = features.shape
        return features.new_empty(n, c, 2 * h, 2 * w)

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def microseconds(run, rounds=30, repeats=200, settle=lambda: None):
    """Median over the rounds of the mean of a round; ``settle`` goes before.

    A round is short enough for the queue of a GPU, so that none waits for it.
    """
    for _ in range(repeats):
        run()
    times = []
    for _ in range(rounds):
        settle()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append((time.perf_counter() - start) / repeats * 1e6)
    return statistics.median(times)


def measure(device='cpu', **options):
    """Yield method, pass and :func:`microseconds`."""
    features, logits = (
        torch.randn(1, channels, 25, 42, device=device)
        for channels in (4, 100)
    )
    methods = {
        'CARAFE': (lambda x, y: carafe_from_logits(x, y, 5), features, logits),
        'an autograd.Function that does nothing': (
            Nothing.apply,
            features,
            logits,
        ),
        'F.interpolate, nearest': (
            lambda x: F.interpolate(x, scale_factor=2),
            features[..., :2, :2],
        ),
    }
    for name, (function, *tensors) in methods.items():
        tensors = [x.detach().clone().requires_grad_() for x in tensors]
        for pass_name, make in PASSES.items():
            run = make(function, tensors)
            yield name, pass_name, microseconds(run, **options)


def main():
    torch.set_num_threads(1)
    fake_gpu.install()
    for name, pass_name, cost in measure():
        print(f'{cost:6.1f} us  {pass_name:16}  {name}')


if __name__ == '__main__':
    main()
