"""The compiled instructions of every GPU kernel, and a roofline from them.

    python benchmarks/count_sass.py --levels P3 --candidates all

No GPU is needed: the kernels are compiled ahead of time for the fake one of
fake_gpu.py. disassembly.py finds how often a program runs each instruction;
that times the programs and warps of a launch on a real GPU is counted. The
multiply-adds that this comes to are compared with those of all tiles, from the
shapes alone, and the script fails where they differ. Up to 0.5 % may be more:
an fp32 gradient finds values that are not finite by multiply-adds too.

**Every time is a bound from arithmetic, not a measurement, and must not be
quoted as a time.** Latency, occupancy, bank conflicts, uncoalesced accesses
and the last wave of programs, which are not looked at, come on top. In detail:

- The load/store unit moves 128 bytes a clock: of 32 lanes, the width of the
  access, 32 bits at least. Copies from global to shared memory (LDGSTS) count
  once, shuffles as 32 bits, and what tensor cores read from shared memory by
  themselves (HGMMA) not at all. This bound may be too high where lanes read
  the same address, as in products of fp32, or where none of a warp's lanes has
  its predicate.
- DRAM moves each tensor once.
"""

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(ROOT / 'benchmarks')]

import disassembly  # noqa: E402
import fake_gpu  # noqa: E402
import torch  # noqa: E402
from _measure import fail  # noqa: E402

from mmcarafe.ops import reference  # noqa: E402
from mmcarafe.ops import triton as kernels  # noqa: E402
from mmcarafe.ops.operators import OPERATORS  # noqa: E402


class GPU(NamedTuple):
    sms: int
    clock: float  # Hz
    ffma: int  # warps, for each multiprocessor and clock
    tensor: float  # dense bf16 FLOP/s
    dram: Dict[str, float]  # name -> bytes/s


# By compute capability. From NVIDIA's data sheets of the A100 (80 GB), H100
# and H200, all SXM. The clock is the boost clock that their fp32 FLOP/s
# (19.5e12 and 67e12) come to. FFMA: arithmetic throughput in NVIDIA's CUDA C++
# programming guide.
GPUS = {
    80: GPU(108, 1.41e9, 2, 312e12, {'A100': 2.039e12}),
    90: GPU(132, 1.98e9, 4, 989e12, {'H100': 3.35e12, 'H200': 4.8e12}),
}
# For each multiprocessor and clock, from the same guide: warps issued, warps
# of special functions, bytes of shared memory.
ISSUE, MUFU, LOAD_STORE = 4, 0.5, 128

N, C, K, S = 8, 256, 5, 2
LEVELS = {'P3': (100, 168), 'P4': (50, 84), 'P5': (25, 42)}
FP32 = torch.float32
DTYPES = {'fp32': FP32, '16 bit': torch.bfloat16}
LAYOUTS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}
CHOICES = {
    'operators': list(OPERATORS),
    'kinds': [f'{dtype} {layout}' for dtype in DTYPES for layout in LAYOUTS],
    'levels': list(LEVELS),
}
LABEL = 'level', 'operator', 'kind', 'candidate'
USED = 'registers', 'stack', 'shared'


def make_tensors(name, kind, level):
    """What an operator takes, without storage."""
    dtype, _, layout = kind.rpartition(' ')
    h, w = LEVELS[level]
    like = {'dtype': DTYPES[dtype], 'memory_format': LAYOUTS[layout]}

    def empty(channels, scale=1):
        shape = N, channels, scale * h, scale * w
        return torch.empty(shape, device='meta', **like)

    logits = empty(K * K * S * S)
    scores = reference.scores_from_logits(logits, K, 1, S)
    return {
        'reassemble': (empty(C), scores),
        'reassemble_grad_features': (empty(C, S), scores),
        'reassemble_grad_weights': (empty(C, S), empty(C), scores),
    }[name]


def compile_kernel(name, tensors, border, config=None):
    """The launch of a candidate, or else of the default."""
    pinned = {} if config is None else {name: config}
    with mock.patch.dict(kernels.pinned, pinned):
        with mock.patch.dict(kernels._launches, clear=True):
            getattr(kernels, name)(*tensors, 'softmax', border)
            [launch] = kernels._launches.values()
    return launch


def share_of_whole_tiles(h, w, block, k):
    """Tiles of ``block`` pixels, row after row, with all windows inside."""
    r = k // 2
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[r : h - r, r : w - r] = True
    padded = torch.nn.functional.pad(inside.flatten(), (0, -h * w % block))
    return padded.view(-1, block).all(1).double().mean().item()


def dense_multiply_adds(problem, config, tile):
    """Those of all tiles, from the shapes; padding and zeros included."""
    n, _, _, s, _, h, w = problem.scores.shape
    channels = -(-C // tile['BLOCK_C']) * tile['BLOCK_C']
    if config.way != 'banded':
        pixels = -(-h * w // config.block_w) * config.block_w
        return n * channels * pixels * (K * s) ** 2
    dense = tile['PATCH'] * config.block_h * config.block_w
    if problem.name == 'reassemble_grad_features':
        dense *= tile['PARTS']
    else:
        h, w = s * h, s * w
    if problem.name != 'reassemble_grad_weights' and problem.dtype != FP32:
        dense *= 2  # weights in two numbers, rounded and the rest
    tiles = -(-h // config.block_h) * -(-w // config.block_w)
    return n * channels * tiles * dense


def count(launch, gpu):
    """All that is known about a launch; ``executed`` counts warps."""
    problem, config, compiled = launch[1:]
    device = SimpleNamespace(multi_processor_count=gpu.sms)
    with mock.patch('torch.cuda.get_device_properties', lambda _: device):
        _, (programs, *_), arguments, tile = kernels._plan(
            problem._replace(device=torch.device('cuda')), config
        )
    h, w = problem.scores.shape[-2:]
    blocks = -(-C // tile['BLOCK_C'])
    if problem.name != 'reassemble_grad_weights':
        blocks /= -(-blocks // arguments[-1])  # the programs that share them
    whole = 0.0
    if config.way == 'hoisted' and C % tile['BLOCK_C'] == 0:
        whole = share_of_whole_tiles(h, w, config.block_w, K)

    text, registers, stack = disassembly.disassemble(compiled.asm['cubin'])
    code = disassembly.parse(text)
    loops, bodies = disassembly.find_weights(code, blocks, K, whole)
    products = set(disassembly.find_products(code))
    executed, opcodes, done = Counter(), Counter(), 0
    for x, times in zip(code, disassembly.executions(code, loops + bodies)):
        times *= programs * config.num_warps
        executed[disassembly.category(x.opcode)] += times
        opcodes[x.opcode.split('.')[0]] += times
        if x in products:
            done += times * disassembly.multiply_adds(x.opcode)
    numbers = [math.prod(view.shape) for view in problem.tensors]
    result = {
        'registers': registers,
        'stack': stack,
        'shared': compiled.metadata.shared,
        'programs': programs,
        'warps': config.num_warps,
        'whole_tiles': whole,
        'loops': [
            (sum(x.address in span for x in code), trips)
            for span, trips in loops
        ],
        'static': Counter(disassembly.category(x.opcode) for x in code),
        'executed': executed,
        'executed_opcodes': opcodes,
        'outputs': numbers[-1],
        'bytes': sum(numbers) * problem.dtype.itemsize,
        'multiply_adds': done,
        'expected_multiply_adds': dense_multiply_adds(problem, config, tile),
        'least_multiply_adds': N * C * h * w * (K * S) ** 2,
    }
    return {**result, 'bounds_us': bounds(result, gpu)}


def bounds(result, gpu):
    """Microseconds that each resource needs at least."""
    executed = result['executed']
    clocks = gpu.sms * gpu.clock / 1e6  # in a microsecond
    bits = 32 * executed['SHFL']
    for category, times in executed.items():
        width = category.partition('.')[2]
        bits += max(32, int(width)) * times if width else 0
    flops = 2 * result['multiply_adds'] if executed['MMA'] else 0
    return {
        'issue': sum(executed.values()) / ISSUE / clocks,
        'FFMA': executed['FFMA'] / gpu.ffma / clocks,
        'tensor': flops / gpu.tensor * 1e6,
        'load/store': 32 * bits / 8 / LOAD_STORE / clocks,
        'MUFU': executed['MUFU'] / MUFU / clocks,
        **{
            f'DRAM {name}': result['bytes'] / rate * 1e6
            for name, rate in gpu.dram.items()
        },
    }


def count_candidates(level, name, kind, args):
    """Yield the counts of the default, or of every candidate that fits."""
    from triton.runtime.errors import OutOfResources

    tensors = make_tensors(name, kind, level)
    first = compile_kernel(name, tensors, args.border)
    configs = [first.config]
    if args.candidates == 'all':
        configs, _ = kernels._configs(first.problem)
    for config in configs:
        way, block_c, height, width, warps, stages = config
        tile = f'{way} {block_c} x {height}x{width}'
        candidate = f'{tile}, {warps} warps, {stages} stages'
        label = level, name, kind, candidate
        print('compiling', ', '.join(label), file=sys.stderr)
        try:
            launch = compile_kernel(name, tensors, args.border, config)
            result = count(launch, GPUS[args.capability])
        except OutOfResources as error:
            print('left out:', error, file=sys.stderr)
        except ValueError as error:  # of disassembly
            fail(f'{", ".join(label)}: {error}')
        else:
            yield {**dict(zip(LABEL, label)), **result}


def table(rows):
    rows = [rows[0], ['---'] * len(rows[0]), *rows[1:]]
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in rows)


def report(results, gpu):
    """Both tables, in Markdown."""
    counts = [[*LABEL, *USED, 'loops', 'all', 'by class', 'multiply-adds']]
    largest = [f'largest, {name}' for name in gpu.dram]
    times = [[*LABEL, *results[0]['bounds_us'], *largest]]
    for result in results:
        label = [result[name] for name in LABEL]
        per_output = {
            category: times * 32 / result['outputs']
            for category, times in result['executed'].most_common()
        }
        ratio = result['multiply_adds'] / result['least_multiply_adds']
        counts.append(
            [
                *label,
                *(result[name] for name in USED),
                ', '.join(f'{n} x {trips:g}' for n, trips in result['loops']),
                f'{sum(per_output.values()):.1f}',
                ', '.join(f'{x} {n:.2f}' for x, n in per_output.items()),
                f'{ratio:.2f}',
            ]
        )
        bound = result['bounds_us']
        on_chip = [name for name in bound if not name.startswith('DRAM')]
        largest = [
            max(*on_chip, f'DRAM {name}', key=bound.get) for name in gpu.dram
        ]
        times.append([*label, *(f'{x:.1f}' for x in bound.values()), *largest])
    return f"""\
Registers of a thread, bytes of its stack (where registers are spilled to) and
of shared memory; loops, as instructions x trips; instructions of a thread for
each output value; multiply-adds, as a multiple of the least.

{table(counts)}

**Bounds from arithmetic, not measurements: not to be quoted as times.** In µs,
by resource, at {gpu.clock / 1e9} GHz and the data sheets' rates.

{table(times)}
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, all_ in CHOICES.items():
        parser.add_argument(
            f'--{name}', nargs='+', choices=all_, default=all_, help='which'
        )
    parser.add_argument('--border', choices=reference.BORDERS, default='zeros')
    parser.add_argument('--capability', type=int, choices=GPUS, default=90)
    parser.add_argument(
        '--candidates', choices=['default', 'all'], default='default'
    )
    parser.add_argument('--json', type=Path, help='file for all of the counts')
    args = parser.parse_args()
    check(args)
    import triton

    triton.runtime.driver.set_active(fake_gpu.Driver(args.capability))
    gpu = GPUS[args.capability]
    chosen = itertools.product(args.levels, args.operators, args.kinds)
    results = [
        result for each in chosen for result in count_candidates(*each, args)
    ]
    print(f'triton {triton.__version__}, sm_{args.capability}\n')
    print(report(results, gpu))
    if args.json:
        content = {
            'note': 'bounds are from arithmetic, not measured',
            'triton': triton.__version__,
            'capability': args.capability,
            'gpu': gpu._asdict(),
            'kernels': results,
        }
        args.json.write_text(json.dumps(content, indent=1))
    wrong = [
        f'{", ".join(x[name] for name in LABEL)}: '
        f'{x["multiply_adds"]:.0f} multiply-adds counted, expected '
        f'{x["expected_multiply_adds"]:.0f}'
        for x in results
        if not 1 <= x['multiply_adds'] / x['expected_multiply_adds'] <= 1.005
    ]
    if wrong:
        fail('counts above are wrong:\n' + '\n'.join(wrong))


def check(args):
    folder = args.json.parent if args.json else Path()
    if not folder.is_dir():
        fail(f'--json is {args.json}, expected a file in a folder that exists')
    reason = kernels._why_reference()
    if reason is not None:
        fail(reason)
    import triton

    if not hasattr(triton, 'knobs'):
        fail(f'triton is {triton.__version__}, expected 3.4 or later')
    if triton.knobs.runtime.interpret:
        fail('TRITON_INTERPRET is set, expected not: it compiles nothing')


if __name__ == '__main__':
    main()
