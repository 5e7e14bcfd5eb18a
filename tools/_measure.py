"""What the benchmarks share: time, memory, and on which machine.

torch alone is needed.
"""

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call

import mmcarafe
from mmcarafe.__main__ import PACKAGES, version

# torch's profiler, which counts the memory, otherwise logs each start and stop
os.environ.setdefault('KINETO_LOG_LEVEL', '6')

ROOT = Path(__file__).resolve().parents[1]


def fail(message):
    raise SystemExit(f'error: {message}')


def read_report(path):
    """What a run recorded in its results.json."""
    try:
        report = json.loads(path.read_text())
        report['results']
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f'--report: cannot read {path}: {type(error).__name__}: {error}')
    return report


def find_device(text):
    """The CPU or GPU that ``--device`` names; a GPU becomes the default."""
    try:
        device = torch.device(text)
    except RuntimeError:  # torch knows no such name
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        fail(f'--device is {text}, expected cpu or cuda')
    if device.type == 'cuda':
        gpus = torch.cuda.device_count()
        if not gpus:
            fail(f'--device is {text}, but torch finds no GPU')
        if (device.index or 0) >= gpus:
            fail(f'--device is {text}, but torch finds only {gpus} of them')
        torch.cuda.set_device(device.index or 0)
    return device


def find_inputs(module, features, scale_factor=2):
    """What an upsampler takes: features, and a guide if it wants one."""
    if not getattr(module, 'guided', False):
        return [features]
    n, c, h, w = features.shape
    guide = torch.randn(
        (n, c, h * scale_factor, w * scale_factor),
        dtype=features.dtype,
        device=features.device,
    )
    if not features.is_contiguous():
        guide = guide.contiguous(memory_format=torch.channels_last)
    return [features, guide]


def as_function(module, inputs):
    """A function of inputs and parameters, so that all have gradients.

    Returns:
        tuple[Callable, list[Tensor]]: the function and what it takes.
    """
    names = [name for name, _ in module.named_parameters()]

    def function(*values):
        parameters = dict(zip(names, values[len(inputs) :]))
        return functional_call(module, parameters, values[: len(inputs)])

    return function, [*inputs, *module.parameters()]


def forward(function, tensors):
    def run():
        with torch.no_grad():
            return function(*tensors)

    return run


def forward_backward(function, tensors):
    out = function(*tensors)
    if isinstance(out, tuple):  # of an upsampler that changes its guide
        grad = tuple(torch.randn_like(each) for each in out)
    else:
        grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(function(*tensors), tensors, grad)


# Name -> what makes a run of a function and its inputs.
PASSES = {'forward': forward, 'forward+backward': forward_backward}


class Graphs:
    """Captures runs as CUDA graphs, one after another.

    They share their memory, which is safe because no two of them are replayed
    at once, and nobody reads what they leave there.
    """

    # torch's allocator goes on to ask those whose capture failed; before torch
    # 2.8, no other capture can follow one that failed.
    _failed = []

    def __init__(self):
        self._captured = []
        self._stream = self._pool = None

    def _begin(self):
        # torch wants one stream for all graphs that share their memory.
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run, calls=1, warm_ups=3):
        """A function that replays so many calls of ``run``.

        What ``run`` reads has to stay where it is.
        """
        if self._stream is None:
            self._begin()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(warm_ups):
                run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            self._record(graph, run, calls)
        except Exception:
            # Stream and memory of what failed are not used again; and random
            # numbers are refused until another capture ends well.
            self._failed.append(graph)
            self._begin()
            torch.cuda.synchronize()
            self._record(torch.cuda.CUDAGraph(), lambda: torch.cuda._sleep(1))
            raise
        return graph.replay

    def _record(self, graph, run, calls=1):
        broke = None
        try:
            # torch.cuda.graph alone stays in its stream if the capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()):
                with torch.cuda.graph(graph, self._pool, self._stream):
                    try:
                        for _ in range(calls):
                            run()
                    except Exception as error:
                        broke = error
                        raise
        except Exception as error:
            # And not only that the capture broke.
            raise (broke or error) from None
        finally:
            broke = None  # which holds the tensors of this frame's callees
        self._captured.append(graph)

    def free(self):
        """Give the memory back; nothing can be replayed any more."""
        torch.cuda.synchronize()
        for graph in self._captured:
            graph.reset()
        self._captured.clear()
        torch.cuda.empty_cache()


def measure_pass(
    methods, pass_name, device, budget, more=None, with_graphs=False
):
    """Median seconds, peak and kept bytes of methods that take turns.

    In another order each round, so that a disturbance of the machine hits all
    of them, and none always follows one that empties the caches.

    Args:
        methods (dict[str, tuple[Callable, list[Tensor]]]): name -> function
            and inputs. With gradients for all inputs.
        pass_name (str): one of :data:`PASSES`.
        device (torch.device): of the inputs.
        budget (float): seconds for all rounds, once 5 of them are done.
        more (dict[str, Callable], optional): what to measure as it is.
        with_graphs (bool): on a GPU, time each also as a CUDA graph, whose
            launches cost the CPU nothing. Results then have a ``mode``,
            ``'eager'`` or ``'graph'``; memory is that of the former.

    Yields:
        dict: the result of one method. One that fails has an error instead,
        and costs the others nothing.
    """
    eager = 'eager' if with_graphs else None
    runs, kept = {}, {}  # name -> ...
    timers, errors = {}, {}  # name, mode -> ...

    @contextmanager
    def reported(name, mode):
        try:
            yield
        except Exception as error:
            errors[name, mode] = failure(name, pass_name, error, mode)

    def add(name, run):
        # Many calls on a GPU, so that its work, not the launch, is timed.
        calls = 1
        if device.type == 'cuda':
            calls = min(20, 1 + int(0.01 / seconds(run, device)))
        runs[name] = run, calls
        timers[name, eager] = lambda: seconds(run, device, calls)

    def add_graph(name, run, calls):
        replay = graphs.capture(run, calls)
        replay()  # warm up
        timers[name, 'graph'] = lambda: replay_seconds(replay, device, calls)

    for name, (function, tensors) in methods.items():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        with reported(name, eager):
            run = PASSES[pass_name](function, tensors)
            run()  # warm up
            if pass_name != 'forward':
                kept[name] = kept_memory(function, tensors)
            add(name, run)
    for name, run in (more or {}).items():
        with reported(name, eager):
            run()
            add(name, run)
    graphs = Graphs()
    if with_graphs:
        for name, (run, calls) in runs.items():
            with reported(name, 'graph'):
                add_graph(name, run, calls)
    times = {key: [] for key in timers}
    order = random.Random(0)
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or (rounds < 50 and time.perf_counter() - start < budget):
        for key in order.sample(list(timers), len(timers)):
            if key not in errors:
                with reported(*key):
                    times[key].append(timers[key]())
        rounds += 1
    yield from errors.values()
    for name, mode in timers:
        if (name, mode) in errors:
            continue
        peak = None
        if mode != 'graph':
            with reported(name, mode):
                peak = peak_memory(runs[name][0], device)
        yield errors.get((name, mode)) or {
            'method': name,
            'pass': pass_name,
            **({'mode': mode} if mode else {}),
            'seconds': statistics.median(times[name, mode]),
            'rounds': rounds,
            'peak_bytes': peak,
            'kept_bytes': kept.get(name) if mode != 'graph' else None,
        }
    if with_graphs:
        graphs.free()


def failure(name, pass_name, error, mode=None):
    """Say which method failed, and return its result."""
    error = f'{type(error).__name__}: {error}'
    where = ', '.join(filter(None, (name, pass_name, mode)))
    print(f'{where}: {error}', flush=True)
    return {
        'method': name,
        'pass': pass_name,
        **({'mode': mode} if mode else {}),
        'error': error,
    }


def seconds(run, device, repeats=1):
    if device.type != 'cuda':
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def replay_seconds(replay, device, calls=1):
    """Of each of the calls that a CUDA graph holds."""
    # The GPU waits until all is queued: the launch of the graph is not timed.
    torch.cuda._sleep(200_000)
    return seconds(replay, device) / calls


def peak_memory(run, device):
    """Most bytes that torch holds at once, on top of the inputs."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        result = run()
    del result
    in_use = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == '[memory]':
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak


def kept_memory(function, tensors):
    """Bytes kept in memory for the backward pass, inputs included."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*tensors)  # keeps them, so pointers stay distinct
    del out
    return sum(kept.values())


def fma_rate():
    """Multiply-adds a second of this CPU, in a convolution in fp32.

    Processors of one name differ in the width of their arithmetic.
    """
    channels, size = 256, 64
    x = torch.randn(1, channels, size, size)
    weight = torch.randn(channels, channels, 3, 3)

    def run():
        with torch.no_grad():
            F.conv2d(x, weight, padding=1)

    for _ in range(3):
        run()
    time = statistics.median(seconds(run, x.device) for _ in range(15))
    return weight.numel() * size**2 / time


def environment(device):
    """What was measured, where, and with which versions."""
    cpu = {}
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        lines = cpuinfo.read_text().split('\n\n')[0].splitlines()
        cpu = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(':') for line in lines)
        }
    processor = platform.processor() or platform.machine()
    processor = cpu.get('model name', processor)
    return {
        'date': datetime.date.today().isoformat(),
        'commit': _git('rev-parse', 'HEAD'),
        'uncommitted_changes': bool(_git('status', '--porcelain')),
        'device': torch.cuda.get_device_name(device)
        if device.type == 'cuda'
        else processor,
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'cpu_family_and_model': [cpu.get('cpu family'), cpu.get('model')],
        'cpu_features': [
            flag
            for flag in cpu.get('flags', '').split()
            if flag.startswith(('avx', 'fma', 'amx'))
        ],
        'driver': _driver() if device.type == 'cuda' else None,
        'cuda': torch.version.cuda,
        'cudnn': torch.backends.cudnn.version(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'mmcarafe': mmcarafe.__version__,
        'packages': [version(packages) for packages in PACKAGES],
    }


def _git(*arguments):
    if not (ROOT / '.git').exists():  # else git might find another project
        return 'unknown'
    try:
        done = subprocess.run(
            ['git', *arguments], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:  # there is no git
        return 'unknown'
    return done.stdout.strip() if done.returncode == 0 else 'unknown'


def _driver():
    """Version of the GPU's driver."""
    query = [
        'nvidia-smi',
        '--query-gpu=driver_version',
        '--format=csv,noheader',
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True)
    except OSError:  # there is no nvidia-smi
        return 'unknown'
    return done.stdout.strip()


def conditions(report, *more):
    """One line: the machine, the versions, and what was measured."""
    env = report['environment']
    rate = ''
    if env.get('fma_per_second'):
        rate = (
            f' ({env["cpu_capability"]}, '
            f'{env["fma_per_second"] / 1e9:.0f} G multiply-adds/s)'
        )
    memory_format = report['memory_format'].replace('contiguous', 'NCHW')
    return ', '.join(
        [
            f'{env["device"]}{rate}',
            f'{env["threads"]} threads',
            f'torch {env["torch"]}',
            report['dtype'],
            memory_format,
            *more,
            f'commit {env["commit"][:10]}',
        ]
    )
