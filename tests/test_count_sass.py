"""What a program executes: on small listings, and on compiled kernels."""

import json
import os
from collections import Counter

import count_sass
import disassembly
import pytest

from mmcarafe.ops import triton as kernels

REASON = kernels._why_reference()
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
compiles = pytest.mark.skipif(
    os.environ.get('TRITON_INTERPRET') == '1',
    reason='nothing compiles in the interpreter',
)
HOISTED = 'hoisted', 16, 1, 32, 4


def listing(lines):
    """As cuobjdump prints it: 16 bytes apart, with the bits of each half."""
    bits = '/* 0x00000a00ff017b82 */\n'
    return '\tcode for sm_90a\n\t\tFunction : kernel\n' + ''.join(
        f'        /*{16 * i:04x}*/    {line} ;    {bits}            {bits}'
        for i, line in enumerate(lines)
    )


def often(lines, **options):
    """How often each line runs, with 3 blocks of channels and K=5."""
    code = disassembly.parse(listing(lines))
    loops, bodies = disassembly.find_weights(code, 3, 5, **options)
    return disassembly.executions(code, loops + bodies)


def test_instructions():
    code = disassembly.parse(
        listing(
            [
                '@!P1 LDG.E.64 R2, desc[UR4][R2.64+-0x4]',
                'HFMA2.MMA R29, -RZ, RZ, 0, 0',
                '@UP0 UIADD3 UR4, UR4, 0x1, URZ',
                'BRA P0, 0x0',
                'BRA.U !UP1, 0x10',
                '@P3 BRA 0x80',
                '@!P1 CALL.REL.NOINC 0x80',
                'EXIT',
                'BRA 0x80',
                'NOP',
            ]
        )
    )
    assert code == [
        (0x00, True, 'LDG.E.64', None),
        (0x10, False, 'HFMA2.MMA', None),
        (0x20, True, 'UIADD3', None),
        (0x30, True, 'BRA', 0x0),
        (0x40, True, 'BRA.U', 0x10),
        (0x50, True, 'BRA', 0x80),
        (0x60, True, 'CALL.REL.NOINC', 0x80),
        (0x70, False, 'EXIT', None),
    ]


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        (['RET.REL.NODEC R2 0x0', 'BRA 0x10'], 'RET.REL.NODEC at 0000'),
        (['BRX R2 -0x90', 'BRA 0x10'], 'BRX at 0000'),
        (['EXIT'], 'no end of a kernel'),
        ([], 'no end of a kernel'),
    ],
)
def test_what_cannot_be_followed(lines, message):
    with pytest.raises(ValueError, match=message):
        disassembly.parse(listing(lines))


@pytest.mark.parametrize(
    ('opcode', 'category'),
    [
        ('FFMA', 'FFMA'),
        ('FFMA.FTZ', 'FFMA'),
        ('FMUL', 'rest'),
        ('HMMA.16816.F32.BF16', 'MMA'),
        ('HGMMA.64x128x16.F32.BF16', 'MMA'),
        ('HFMA2.MMA', 'rest'),
        ('LDG.E', 'LDG.32'),
        ('LDG.E.U16', 'LDG.16'),
        ('LDG.E.64.CONSTANT', 'LDG.64'),
        ('LDG.E.LTC128B', 'LDG.32'),
        ('LDGSTS.E.BYPASS.128', 'LDGSTS.128'),
        ('LDGDEPBAR', 'rest'),
        ('STG.E.128', 'STG.128'),
        ('LDS.64', 'LDS.64'),
        ('LDS.U.128', 'LDS.128'),
        ('STS.U16', 'STS.16'),
        ('LDSM.16.M88.4', 'LDSM.128'),
        ('STSM.16.MT88.2', 'STSM.64'),
        ('LDSM.16.M88', 'LDSM.32'),
        ('LDL.LU', 'LDL.32'),
        ('STL.128', 'STL.128'),
        ('LDC.64', 'rest'),
        ('SHFL.BFLY', 'SHFL'),
        ('BAR.SYNC.DEFER_BLOCKING', 'BAR'),
        ('MUFU.EX2', 'MUFU'),
    ],
)
def test_categories(opcode, category):
    assert disassembly.category(opcode) == category


@pytest.mark.parametrize(
    ('opcode', 'number'),
    [
        ('FFMA', 32),
        ('FMUL', 0),
        ('HMMA.16816.F32.BF16', 16 * 8 * 16),
        ('HMMA.1688.F32.TF32', 16 * 8 * 8),
        ('HGMMA.64x16x16.F32.BF16', 16 * 16 * 16),
        ('HGMMA.64x128x16.F32', 16 * 128 * 16),
    ],
)
def test_multiply_adds(opcode, number):
    assert disassembly.multiply_adds(opcode) == number


def test_unknown_product():
    with pytest.raises(ValueError, match='IMMA.16832.S8: expected the shape'):
        disassembly.multiply_adds('IMMA.16832.S8')


def test_loops():
    """Two before the channels', one inside; the outer one ends in its
    middle; FFMAs outside belong to a division."""
    assert often(
        [
            'MUFU.EX2 R1, R1',  # 0x00
            '@P0 BRA 0x0',
            'FFMA R1, R1, R1, R1',
            'LDG.E R1, [R2]',  # 0x30
            '@P0 BRA 0x30',
            'MOV R3, RZ',  # 0x50
            'FFMA R2, R1, R1, R2',  # 0x60
            'LDS R3, [R4]',
            '@!P0 BRA 0x60',
            '@!P1 CALL.REL.NOINC 0xb0',
            'BRA 0x50',
            'EXIT',  # 0xb0
            'BRA 0xc0',
        ]
    ) == [5, 5, 1, 5, 5, 3, 15, 15, 15, 3, 3, 1]


@pytest.mark.parametrize('whole_first', [False, True])
def test_bodies_in_one_loop(whole_first):
    bodies = [['@P6 LDG.E R1, [R2]'], ['LDG.E R1, [R2]']]
    whole, border = 3 / 4, 9 / 4
    first, second = (whole, border) if whole_first else (border, whole)
    bodies = bodies[::-1] if whole_first else bodies
    assert often(
        [
            'ISETP P5, R1, R2',  # 0x00
            '@!P5 BRA 0x50',
            *bodies[0],
            'FFMA R2, R1, R1, R2',
            'BRA 0x70',
            *bodies[1],  # 0x50
            'FFMA R2, R1, R1, R2',
            'FFMA R2, R1, R1, R2',  # 0x70
            '@P4 EXIT',
            'BRA 0x0',
            'BRA 0xa0',
        ],
        whole=0.25,
    ) == [3, 3, *[first] * 3, *[second] * 2, 3, 3, 3]


def test_bodies_with_loops_of_their_own():
    assert often(
        [
            '@!P1 BRA P0, 0x50',
            '@P6 LDG.E.64 R1, [R2]',  # 0x10
            'FFMA R2, R1, R1, R2',
            '@!P5 BRA 0x10',
            'EXIT',
            'LDG.E.64 R1, [R2]',  # 0x50
            'FFMA R2, R1, R1, R2',
            '@!P5 BRA 0x50',
            'EXIT',
            'BRA 0x90',
        ],
        whole=0.25,
    ) == [1, *[9 / 4] * 3, 3 / 4, *[3 / 4] * 3, 1 / 4]


def test_programs_without_channels_are_left_out():
    """And divisions are no products where there are tensor cores."""
    assert often(
        [
            '@P0 BRA 0x30',
            'CS2R R2, SRZ',
            'BRA 0x50',
            'HMMA.16816.F32.BF16 R4, R8, R10, R4',  # 0x30
            '@P0 BRA 0x30',
            'FFMA R1, R1, R1, R1',  # 0x50
            '@P1 BRA 0x80',
            'STG.E [R2], R4',
            'EXIT',  # 0x80
            'BRA 0x90',
        ]
    ) == [1, 0, 0, 3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(
    'lines',
    [
        ['BRA 0x20', 'EXIT', 'EXIT', 'BRA 0x30'],
        ['@P0 BRA 0x20', '@P1 EXIT', 'EXIT', 'BRA 0x30'],
        ['@P0 BRA 0x20', 'MOV R1, R2', 'EXIT', 'BRA 0x30'],
        ['@P0 BRA 0x20', 'BRA 0x0', 'EXIT', 'BRA 0x30'],
    ],
)
def test_branches_without_a_choice(lines):
    code = disassembly.parse(listing(lines))
    assert not list(disassembly.find_alternatives(code))


def test_bodies_without_products_count_both():
    assert often(['@P0 BRA 0x20', 'EXIT', 'EXIT', 'BRA 0x30']) == [1, 1, 1]


def test_products_are_in_loops():
    code = disassembly.parse(
        listing(['FFMA R1', 'FFMA R2', '@P0 BRA 0x10', 'FFMA R3', 'BRA 0x40'])
    )
    assert disassembly.find_products(code) == [code[1]]


@pytest.mark.parametrize(
    ('h', 'w', 'block', 'k'), [(25, 42, 32, 5), (7, 9, 4, 3), (3, 5, 4, 1)]
)
def test_share_of_whole_tiles(h, w, block, k):
    r = k // 2
    tiles = [
        all(
            p < h * w and r <= p // w < h - r and r <= p % w < w - r
            for p in range(start, start + block)
        )
        for start in range(0, h * w, block)
    ]
    share = count_sass.share_of_whole_tiles(h, w, block, k)
    assert share == sum(tiles) / len(tiles)
    assert 0 < share < 1


@pytest.fixture
def count(monkeypatch, tmp_path):
    """Run the script at P5 on chosen tiles; return its json by operator."""

    def count(kind, **configs):
        import triton

        for key in kernels._CANDIDATES:
            if key[0] in configs:
                config = kernels.Config(*configs[key[0]])
                monkeypatch.setitem(kernels._CANDIDATES, key, [config])
        path = tmp_path / 'counts.json'
        arguments = ['', '--levels', 'P5', '--kinds', kind, '--operators']
        arguments += [*configs, '--json', str(path)]
        monkeypatch.setattr(triton.runtime.driver, '_active', None)
        monkeypatch.setattr('sys.argv', arguments)
        count_sass.main()
        results = json.loads(path.read_text())['kernels']
        return {result['operator']: result for result in results}

    return count


@needs_triton
@compiles
def test_fmas(count, capsys):
    """Blocks of 32 pixels and 16 channels; on 132 multiprocessors, twice as
    many programs as blocks of pixels."""
    [result] = count('fp32 NCHW', reassemble=HOISTED).values()
    pixels = 8 * 33 * 32  # of 25 x 42 in each image, which are 32.8 blocks
    assert result['programs'] == 2 * 8 * 33
    assert [trips for _, trips in result['loops']] == [8]
    assert result['multiply_adds'] == pixels * 256 * 25 * 4
    assert result['executed']['FFMA'] * 32 == result['multiply_adds']
    assert result['executed']['STG.64'] * 32 * 2 == pixels * 256 * 4
    outputs = 8 * 256 * 50 * 84
    assert result['outputs'] == outputs
    assert result['bytes'] == 4 * (outputs + 8 * (256 + 100) * 25 * 42)
    assert result['stack'] == 0
    issue = result['bounds_us']['issue']
    instructions = sum(result['executed'].values())
    assert issue == pytest.approx(instructions / 4 / 132 / 1980)
    printed = capsys.readouterr().out
    assert 'not measurements' in printed
    assert f'| {issue:.1f} |' in printed
    row = f'| P5 | reassemble | fp32 NCHW | {result["candidate"]} | '
    assert printed.count(row) == 2


@needs_triton
@compiles
def test_tensor_cores(count):
    """Channels x tiles x patch x pixels written; by weights in two numbers."""
    results = count(
        '16 bit NCHW',
        reassemble=('banded', 64, 8, 8, 4),
        reassemble_grad_features=('banded', 64, 4, 4, 4, 2),
        reassemble_grad_weights=('banded', 64, 4, 16, 4),
    )
    assert {
        name: result['multiply_adds'] for name, result in results.items()
    } == {
        'reassemble': 8 * 256 * (7 * 11) * 64 * 64 * 2,
        'reassemble_grad_features': 8 * 256 * (7 * 11) * 256 * 16 * 2,
        'reassemble_grad_weights': 8 * 256 * (13 * 6) * 128 * 64,
    }


@needs_triton
@compiles
def test_tiles_inside_the_map_need_fewer_instructions(count, monkeypatch):
    def instructions(share):
        monkeypatch.setattr(
            count_sass, 'share_of_whole_tiles', lambda *_: share
        )
        [result] = count('fp32 NCHW', reassemble=HOISTED).values()
        return sum(result['executed'].values())

    assert instructions(1) < instructions(0.5) < instructions(0)


def test_bounds():
    executed = {
        'FFMA': 400,
        'MMA': 10,
        'MUFU': 50,
        'SHFL': 1,
        'LDG.16': 2,
        'LDS.128': 3,
        'STL.64': 4,
        'rest': 30,
    }
    result = {
        'executed': Counter(executed),
        'multiply_adds': 5e6,
        'bytes': 9e6,
    }
    gpu = count_sass.GPU(2, 1e9, 2, 1e12, {'a': 3e12, 'b': 1e12})
    assert count_sass.bounds(result, gpu) == pytest.approx(
        {
            'issue': 500 / 4 / 2000,
            'FFMA': 400 / 2 / 2000,
            'tensor': 10,
            'load/store': (1 + 2 + 3 * 4 + 4 * 2) / 2000,
            'MUFU': 50 * 2 / 2000,
            'DRAM a': 3,
            'DRAM b': 9,
        }
    )


@needs_triton
@compiles
def test_wrong_counts_fail(count, monkeypatch):
    monkeypatch.setattr(count_sass, 'dense_multiply_adds', lambda *_: 42)
    with pytest.raises(SystemExit, match='216268800 .*, expected 42$'):
        count('fp32 NCHW', reassemble=HOISTED)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['--levels', 'P9'], "argument --levels: invalid choice: 'P9'"),
        (['--kinds', 'fp32'], "argument --kinds: invalid choice: 'fp32'"),
        (['--capability', '75'], 'argument --capability: invalid choice: 75'),
    ],
)
def test_unknown_arguments(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['', *arguments])
    with pytest.raises(SystemExit):
        count_sass.main()
    assert expected in capsys.readouterr().err


def test_no_folder_for_the_counts(monkeypatch, tmp_path):
    path = tmp_path / 'none' / 'counts.json'
    monkeypatch.setattr('sys.argv', ['', '--json', str(path)])
    with pytest.raises(SystemExit, match=f'--json is {path}, expected a file'):
        count_sass.main()


def test_no_triton(monkeypatch):
    monkeypatch.setattr(kernels, '_why_reference', lambda: 'no triton')
    monkeypatch.setattr('sys.argv', [''])
    with pytest.raises(SystemExit, match='^error: no triton$'):
        count_sass.main()
