"""Long runs, very large maps, and many threads at once, on a CPU.

`make test` takes the map that is large by its channels. For the one that is
large by its pixels, which takes half a minute of a core::

    MMCARAFE_LARGE_MAPS=1 python -m pytest tests/test_limits.py
"""

import ctypes
import gc
import itertools
import mmap
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from cases import (
    Case,
    assert_as_exact_as,
    forward_and_gradients,
    part,
    randn,
)

from mmcarafe.ops import carafe_from_logits, cpu, reference
from mmcarafe.upsamplers import CARAFE, COMPARED, build_upsampler

pytestmark = pytest.mark.usefixtures('one_thread')

# Memory of long runs

# Of a process that has warmed up. In ten runs of each test it grew by 120 to
# 296 KiB, and by not more than 16 KiB when as much followed.
MOST_GROWTH = 512  # KiB


def resident():
    """KiB of memory that this process holds and cannot give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc's, of what lies free
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGESIZE') // 1024


class Calls:
    """The operator and its gradients, on maps of many sizes."""

    def __call__(self, i):
        x = torch.randn(1, 8, 3 + i % 29, 4 + i % 31, requires_grad=True)
        logits = torch.randn(1, 100, *x.shape[2:], requires_grad=True)
        out = carafe_from_logits(x, logits, 5)
        out.sum().backward()
        return out.detach()


class Training:
    """A step of every upsampler."""

    def __init__(self):
        self.modules = torch.nn.ModuleList(
            build_upsampler(cfg, 8, guide_channels=8)
            for cfg in COMPARED.values()
        )
        self.optimizer = torch.optim.SGD(
            self.modules.parameters(), lr=0.01, momentum=0.9
        )

    def __call__(self, i):
        height = 4 + i % 5
        low, guide = torch.randn(1, 8, height, 6), torch.randn(1, 8, 16, 12)
        guide = guide[..., : 2 * height, :]
        outs = []
        for module in self.modules:
            guided = getattr(module, 'guided', False)
            out = module(low, guide) if guided else module(low)
            outs.append(out[1] if isinstance(out, tuple) else out)
        self.optimizer.zero_grad()
        sum(out.square().mean() for out in outs).backward()
        self.optimizer.step()
        return outs


def growth(kind, times):
    """KiB by which repetition grows, and by which it would if it leaked."""
    torch.set_num_threads(1)
    repeated = kind()

    def repeat(times):
        for i in range(times):
            repeated(i)
        return resident()

    start = repeat(times // 4)
    end = repeat(times)
    kept = [repeated(i) for i in range(times // 4)]
    leaking = resident() - end
    assert len(kept) == times // 4
    return end - start, leaking


@pytest.mark.parametrize(
    'kind, times', [(Calls, 2000), (Training, 200)], ids=['calls', 'training']
)
def test_memory_stays_flat(kind, times):
    # In a process of its own: in this one, a leak might fill what earlier
    # tests have freed.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        flat, leaking = pool.submit(growth, kind, times).result()
    assert flat < MOST_GROWTH < leaking


# More than 2**31 elements

GIB = 2**30


def available():
    """Bytes of memory that a new process can have."""
    with open('/proc/meminfo') as file:
        lines = dict(line.split(':') for line in file)
    return int(lines['MemAvailable'].split()[0]) * 1024


def sparse(*shape):
    """Zeros of bf16 that take memory only where something is written."""
    size = 2 * torch.Size(shape).numel()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size, flags=private)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)


REFERENCE = {
    'reassemble': reference.reassemble,
    'reassemble_grad_features': reference.reassemble_grad_features,
    'reassemble_grad_weights': reference.reassemble_grad_weights,
}


@pytest.mark.skipif(
    cpu.LIBRARY is None, reason='the CPU library was not compiled'
)
@pytest.mark.parametrize(
    'case',
    [
        Case(1, 2**15, 130, 127, k=3),
        # its scores too are more than 2**31
        pytest.param(
            Case(1, 1, 2**15 - 1, 2**14 + 3, k=1),
            marks=pytest.mark.skipif(
                not os.environ.get('MMCARAFE_LARGE_MAPS'),
                reason='takes half a minute; set MMCARAFE_LARGE_MAPS=1',
            ),
        ),
    ],
    ids=['channels', 'pixels'],
)
@pytest.mark.parametrize('name', REFERENCE)
def test_more_than_2_31_elements(name, case):
    """Pixels all over the map, at its edges too, against the reference."""
    free, needed = available() / GIB, 6  # of which the result takes 4
    if free < needed:
        pytest.skip(f'{free:.1f} GiB of memory free, {needed} needed')
    features = sparse(*case.features_shape)
    scores = reference.scores_from_logits(
        sparse(*case.logits_shape), *case.arguments
    )
    high = sparse(case.n, case.c, case.s * case.h, case.s * case.w)
    assert high.numel() > 2**31
    tensors = {
        'reassemble': (features, scores),
        'reassemble_grad_features': (high, scores),
        'reassemble_grad_weights': (high, features, scores),
    }[name]
    places = list(
        itertools.product((1, case.h // 2, case.h - 4), (2, case.w - 4))
    )
    some = sorted({0, 1, case.c // 2, case.c - 1} & {*range(case.c)})

    def near(tensor, y, x, around):
        scale = tensor.shape[-2] // case.h
        tensor = part(tensor, y, x, around, scale)
        return tensor[:, some] if tensor.dim() == 4 else tensor

    for y, x in places:
        for tensor in tensors:
            values = randn(*near(tensor, y, x, 4).shape, dtype=tensor.dtype)
            scale = tensor.shape[-2] // case.h
            view = part(tensor, y, x, 4, scale)
            if tensor.dim() == 4:
                view[:, some] = values
            else:
                view.copy_(values)
    got = getattr(torch.ops.mmcarafe, name)(*tensors, None)
    for y, x in places:
        inputs = [near(tensor, y, x, 4) for tensor in tensors]
        same_dtype = REFERENCE[name](*inputs, None)
        exact = REFERENCE[name](*(each.double() for each in inputs), None)
        scale = got.shape[-2] // case.h
        inside = min(y, 4), min(x, 4), 0, scale
        assert_as_exact_as(
            near(got, y, x, 0), part(same_dtype, *inside), part(exact, *inside)
        )


# Many threads


def test_64_threads_at_once():
    """Each with tensors of its own, half of them in one shared module."""
    torch.set_num_threads(2)  # of OpenMP, for each
    shared = CARAFE(16).requires_grad_(False)
    cases = [Case(1, 16, 20 + i % 5, 30 + i % 7) for i in range(64)]
    inputs = [
        [
            randn(*shape, dtype=torch.float32)
            for shape in (
                case.features_shape,
                case.logits_shape,
                (case.n, case.c, case.s * case.h, case.s * case.w),
            )
        ]
        for case in cases
    ]

    def run(i):
        features, logits, grad = inputs[i]
        if i % 2:
            return [shared(features)]
        return forward_and_gradients(
            carafe_from_logits, features, logits, grad, 5
        )

    alone = [run(i) for i in range(64)]
    start = threading.Barrier(64)

    def together(i):
        start.wait()
        return [run(i) for _ in range(2)]

    with ThreadPoolExecutor(64) as pool:
        for expected, repeated in zip(alone, pool.map(together, range(64))):
            for actual in repeated:
                assert all(map(torch.equal, actual, expected))
