"""What a GPU program executes, from the disassembly (SASS) of its kernel.

Instructions are classed, and each is given how often a program runs it:

- A backward branch closes a loop. An outermost loop with multiply-adds takes
  one trip for each block of channels, any other loop one for each of the K
  rows of a window.
- A forward branch may choose between two bodies. If both multiply, or both
  load as much, they are those of a hoisted kernel: the one for tiles of which
  all windows lie inside the map, whose loads need no predicate, and the one
  for the others. If one multiplies, the other is for programs without
  channels, and never runs.
- A function that returns is left out: it is called for tiles with values that
  are not finite.
- Any other forward branch counts as not taken, a second body as executed too,
  and so is an instruction that its predicate switches off.

So it is for these kernels, not for any: what it comes to has to be compared
with the multiply-adds that are expected. That says nothing of the trips of a
loop without multiply-adds.
"""

import math
import re
import subprocess
import tempfile
from typing import NamedTuple, Optional


class Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    target: Optional[int]  # of a branch


def disassemble(cubin):
    """The SASS, registers of a thread, and bytes of its stack."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        cuobjdump = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [cuobjdump, '-sass', '-res-usage', file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    used = re.search(r'REG:(\d+) STACK:(\d+)', text)
    return text, int(used[1]), int(used[2])


_LINE = re.compile(r'\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([\w.]+)(.*?);')


def parse(sass):
    """The instructions of one kernel, without the functions behind it."""
    code, end = [], math.inf
    for line in filter(None, map(_LINE.match, sass.splitlines())):
        address, predicate, opcode, operands = line.groups()
        at = int(address, 16)
        called = [
            x.target
            for x in code
            if x.opcode.startswith('CALL') and x.target <= at
        ]
        if opcode.startswith('RET') and called:
            end = min(end, max(called))
        elif opcode.startswith(('RET', 'BRX', 'JMP')):
            raise ValueError(f'{opcode} at {address} cannot be followed')
        address, target = at, None
        # For sm_80, some calls that never return leave loops.
        if opcode.startswith(('BRA', 'CALL')):
            target = int(re.search(r'0x([0-9a-f]+)', operands)[1], 16)
            # BRA P0, 0x...: another predicate, or the only one
            predicate = predicate or re.match(r'\s*!?U?P\d', operands)
        if target == address:  # a trap is behind everything
            return [x for x in code if x.address < end]
        code.append(Instruction(address, bool(predicate), opcode, target))
    raise ValueError('no end of a kernel found')


def category(opcode):
    """What an instruction counts as; memory accesses have a width in bits."""
    base = opcode.split('.')[0]
    if base in ('FFMA', 'SHFL', 'BAR', 'MUFU'):
        return base
    if base.endswith('MMA'):  # HMMA, HGMMA; HFMA2.MMA is not a matrix product
        return 'MMA'
    if not re.fullmatch('(LD|ST)[GSL]|LDGSTS|LDSM|STSM', base):
        return 'rest'
    matrices = re.search(r'\.MT?88(?:\.(\d))?', opcode)
    if matrices:  # 8x8 of 16 bits: 32 bits of each lane
        return f'{base}.{32 * int(matrices[1] or 1)}'
    width = re.search(r'\.[US]?(8|16|64|128)(?!\w)', opcode)
    return f'{base}.{width[1] if width else 32}'


def multiply_adds(opcode):
    """Of one warp; four warps share an HGMMA."""
    if category(opcode) != 'MMA':
        return 32 * (category(opcode) == 'FFMA')
    shape = re.match(r'HMMA\.(16)(8)(8|16)|HGMMA\.(64)x(\d+)x(\d+)', opcode)
    if not shape:
        raise ValueError(f'{opcode}: expected the shape of an HMMA or HGMMA')
    m, n, k = (int(x) for x in shape.groups() if x)
    return m * n * k // (m // 16)


def find_loops(code):
    """Addresses of each loop: from a branch's target back to the branch."""
    ends = {}
    for x in code:
        if x.target is not None and x.target < x.address:
            ends[x.target] = x.address
    return [range(start, end + 1) for start, end in ends.items()]


def find_alternatives(code):
    """Pairs of ranges of addresses, of which a branch chooses one."""
    before = {b.address: a for a, b in zip(code, code[1:])}
    for branch in code:
        last = before.get(branch.target)  # instruction of the first body
        if not branch.predicated or last is None or last.predicated:
            continue
        end = last.target or 0
        if last.opcode == 'EXIT':
            end = code[-1].address + 1
        if branch.address < branch.target < end:
            first = range(branch.address + 1, branch.target)
            yield first, range(branch.target, end)


def find_products(code):
    """The multiply-adds: in loops, because divisions take FFMAs too."""
    loops = find_loops(code)
    kind = 'FFMA'
    if any(category(x.opcode) == 'MMA' for x in code):
        kind = 'MMA'
    return [
        x
        for x in code
        if category(x.opcode) == kind and any(x.address in y for y in loops)
    ]


def find_weights(code, blocks, k, whole=0.0):
    """Factors of how often a program runs a range of addresses.

    Args:
        code (list[Instruction]): from :func:`parse`.
        blocks (float): of channels, for each program.
        k (int): rows of a window.
        whole (float): share of the tiles whose windows all lie inside.

    Returns:
        tuple[list, list]: pairs of range and factor, of the loops (the factor
        is the trips) and of the bodies that branches choose.
    """
    products = find_products(code)
    loads = [x for x in code if category(x.opcode).startswith('LDG.')]
    masked = [x for x in loads if x.predicated]

    def holds(span, some):
        return sum(x.address in span for x in some)

    loops, bodies = [], []
    spans = find_loops(code)
    for span in spans:
        nested = any(x.start < span.start < x.stop for x in spans)
        of_channels = holds(span, products) and not nested
        loops.append((span, blocks if of_channels else k))
    for pair in find_alternatives(code):
        fewer, more = sorted(pair, key=lambda span: holds(span, products))
        if holds(fewer, products) or 1 < holds(fewer, loads) == holds(
            more, loads
        ):
            inside, border = sorted(pair, key=lambda span: holds(span, masked))
            bodies += [(inside, whole), (border, 1 - whole)]
        elif holds(more, products):
            bodies.append((fewer, 0))
    return loops, bodies


def executions(code, weights):
    """How often a program runs each instruction."""
    return [
        math.prod(factor for span, factor in weights if x.address in span)
        for x in code
    ]
