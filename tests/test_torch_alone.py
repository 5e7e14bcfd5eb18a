"""The operators and upsamplers need torch alone, and imports point downwards.

The wheel is installed into an environment that has nothing but torch and what
torch requires.
"""

import ast
import os
import sys
import venv
from importlib.metadata import distribution
from importlib.util import find_spec

import pytest
import torch
from conftest import OFFLINE, PIP, ROOT, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmcarafe.upsamplers import COMPARED

HOSTS = {'mmengine', 'mmcv', 'mmdet', 'mmseg'}

# An environment of torch alone


def torch_and_what_it_requires():
    # torch 2.1 imports packaging and does not require it
    todo, found = [Requirement('torch'), Requirement('packaging')], {}
    while todo:
        requirement = todo.pop()
        if str(requirement) in found:
            continue
        dist = found[str(requirement)] = distribution(requirement.name)
        for needed in map(Requirement, dist.requires or ()):
            if needed.marker is None or any(
                needed.marker.evaluate({'extra': extra})
                for extra in ('', *requirement.extras)
            ):
                todo.append(needed)
    return found.values()


@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    """Run a Python of that environment with the arguments given."""
    folder = tmp_path_factory.mktemp('torch_alone')
    venv.create(folder / 'venv', with_pip=False, symlinks=True)
    (site,) = folder.glob('venv/lib/python*/site-packages')
    for dist in torch_and_what_it_requires():
        for name in {file.parts[0] for file in dist.files}:
            link = site / name
            # '..' leads to scripts, and several packages share one nvidia/
            if name not in ('..', '__pycache__') and not link.exists():
                link.symlink_to(dist.locate_file(name))
    run(*PIP, 'install', *OFFLINE, '--target', site, wheel)

    def run_there(*arguments):
        # -I: no PYTHONPATH and no folder of this test
        return run(folder / 'venv/bin/python', '-I', *arguments, cwd=folder)

    return run_there


def test_nothing_else_is_there(python):
    brought = {
        canonicalize_name(dist.metadata['Name'])
        for dist in torch_and_what_it_requires()
    }
    output = python(
        '-c',
        """
import sys
from importlib.util import find_spec
print(*filter(find_spec, sys.argv[1:]))
""",
        'torch',
        *HOSTS,
        *({'numpy'} - brought),
    )
    assert output.split() == ['torch']


def test_it_trains(python):
    python(
        '-c',
        """
import torch
import mmcarafe.ops
import mmcarafe.upsamplers
from mmcarafe import CARAFE

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), CARAFE(8))
before = [p.detach().clone() for p in model.parameters()]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, target = torch.rand(2, 3, 6, 7), torch.rand(2, 8, 8, 10)
losses = []
for _ in range(2):
    losses.append(torch.nn.functional.mse_loss(model(x), target))
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
assert losses[1] < losses[0], losses
assert len(before) == 6
for p, was in zip(model.parameters(), before):
    assert p.isfinite().all() and not torch.equal(p, was)
""",
    )


def test_it_builds_all_that_is_compared(python):
    output = python(
        '-c',
        """
from mmcarafe.upsamplers import COMPARED, build_upsampler
for cfg in COMPARED.values():
    build_upsampler(cfg, 4, guide_channels=4)
    print(cfg['type'])
""",
    )
    assert output.split() == [cfg['type'] for cfg in COMPARED.values()]


def test_it_records_kernels(python):
    python(
        '-c',
        """
import torch
from mmcarafe import CARAFE
from mmcarafe.visualization import KernelRecorder, entropy

with KernelRecorder(CARAFE(8)) as recorder:
    recorder.model(torch.rand(1, 8, 3, 5))
(record,) = recorder.records
assert entropy(record.weights).shape == (1, 1, 6, 10)
""",
    )


def test_it_swaps(python):
    output = python(
        '-c',
        """
import torch
from torch import nn
from torch.nn import functional as F
from mmcarafe import CARAFE, swap_upsample

class Block(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2))

model = nn.Sequential(
    nn.Conv2d(3, 8, 1), nn.Upsample(None, 2), Block(8, 4, 1),
    nn.Conv2d(4, 2, 1), nn.UpsamplingBilinear2d(None, 2),
)
x = torch.zeros(1, 3, 5, 6)
swap_upsample(model, 'CARAFE', x)
assert isinstance(model[1], CARAFE)
assert isinstance(model[2].upsample_modules['0'], CARAFE)
assert model(x).shape == (1, 2, 40, 48)
assert not hasattr(model[2], 'init_weights')  # for mmengine alone
swap_upsample(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Upsample(None, 2)))
""",
    )
    assert output.splitlines() == [
        'mmcarafe: the upsampling in 1 is replaced',
        'mmcarafe: the upsampling in 2 is replaced',
        'mmcarafe: the interpolation in 4 is left alone: it resizes the '
        'output: no layer with parameters follows it',
        'mmcarafe: the upsampling in Sequential is replaced',
    ]


CARAFE_PACK = {  # of 8 channels
    'channel_compressor.weight': (64, 8, 1, 1),
    'channel_compressor.bias': (64,),
    'content_encoder.weight': (100, 64, 3, 3),
    'content_encoder.bias': (100,),
}


@pytest.mark.parametrize('source', ['written-by-hand', 'mmcv'])
def test_it_loads_the_state_dict_of_mmcvs_carafe_pack(
    python, tmp_path, source
):
    if source == 'mmcv':
        pytest.importorskip('mmcv._ext', reason='CARAFEPack needs it')
        from mmcv.ops.carafe import CARAFEPack

        state = CARAFEPack(8, scale_factor=2).state_dict()
        assert {n: tuple(x.shape) for n, x in state.items()} == CARAFE_PACK
    else:
        state = {n: torch.randn(shape) for n, shape in CARAFE_PACK.items()}
    torch.save(state, tmp_path / 'state.pth')
    python(
        '-c',
        """
import sys
import torch
from mmcarafe import CARAFE

state = torch.load(sys.argv[1], weights_only=True)
module = CARAFE(8)
module.load_state_dict(state, strict=True)
for name, loaded in module.state_dict().items():
    assert torch.equal(loaded, state[name])
assert module(torch.rand(1, 8, 3, 5)).shape == (1, 8, 6, 10)
""",
        tmp_path / 'state.pth',
    )


def test_what_needs_more_says_so(python):
    output = python(
        '-c',
        """
import sys
import mmcarafe
for name in sys.argv[1:]:
    try:
        getattr(mmcarafe, name)
    except ImportError as error:
        print(error)
""",
        'CARAFEFPN',
        'CARAFEPAFPN',
        'CARAFEUPerHead',
        'CARAFESegformerHead',
        'KernelVisualizationHook',
    )
    assert output.splitlines() == [
        'mmcarafe.CARAFEFPN needs mmengine, mmdet: not installed',
        'mmcarafe.CARAFEPAFPN needs mmengine, mmdet: not installed',
        'mmcarafe.CARAFEUPerHead needs mmengine, mmseg, ftfy, regex: '
        'not installed',
        'mmcarafe.CARAFESegformerHead needs mmengine, mmseg, ftfy, regex: '
        'not installed',
        'mmcarafe.KernelVisualizationHook needs mmengine: not installed',
    ]


def test_python_m_mmcarafe(python):
    lines = python('-m', 'mmcarafe').splitlines()
    assert f'torch {torch.__version__}' in lines
    assert 'mmengine not installed' in lines
    assert [line for line in lines if line.startswith('CPU: compiled library')]


IMPORT_TORCH_ALONE = """
import sys
import torch
before = set(sys.modules)
import mmcarafe
from mmcarafe import ops, upsamplers, visualization
from mmcarafe import CARAFE, FreqFusion
for name in sorted(set(sys.modules) - before):
    print(name, getattr(sys.modules[name], '__file__', None))
"""


@pytest.mark.skipif(
    not all(map(find_spec, ('mmengine', 'mmcv', 'triton'))),
    reason='nothing to import by mistake: mmengine, mmcv or triton is missing',
)
def test_what_is_installed_beside_torch_is_not_imported():
    """It would take most of the time that the import takes."""
    output = run(
        *(sys.executable, '-c', IMPORT_TORCH_ALONE),
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    files = dict(line.split(' ', 1) for line in output.splitlines())
    assert 'mmcarafe.upsamplers.carafe' in files
    installed = {
        name.split('.')[0]
        for name, file in files.items()
        if 'site-packages' in file
    }
    assert installed <= {'mmcarafe', 'torch'}


# The package's own imports

MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
    for path in (ROOT / 'mmcarafe').rglob('*.py')
    if '.mim' not in path.parts
}
# What a module may import of this package, itself apart. The longest name that
# a module's begins with decides; one without a line may import everything.
MAY_IMPORT = {
    'mmcarafe.ops': {'mmcarafe.ops'},
    'mmcarafe.ops.reference': set(),
    'mmcarafe.ops.triton_kernels': set(),
    'mmcarafe.ops.cpu': {'mmcarafe.ops.reference'},
    'mmcarafe.ops.export': {'mmcarafe.ops.reference'},
    'mmcarafe.ops.triton': {
        'mmcarafe.ops.reference',
        'mmcarafe.ops.triton_kernels',
    },
    'mmcarafe.ops.operators': {
        'mmcarafe.ops.reference',
        'mmcarafe.ops.cpu',
        'mmcarafe.ops.triton',
    },
    'mmcarafe.upsamplers': {'mmcarafe.ops', 'mmcarafe.upsamplers'},
    'mmcarafe.registry': set(),
    'mmcarafe.checkpoint': set(),
    'mmcarafe.flops': {'mmcarafe.ops'},
    'mmcarafe.models': {
        'mmcarafe.ops',
        'mmcarafe.upsamplers',
        'mmcarafe.registry',
        'mmcarafe.checkpoint',
        'mmcarafe.flops',
        'mmcarafe.models',
    },
    'mmcarafe.visualization': {
        'mmcarafe.ops',
        'mmcarafe.upsamplers',
        'mmcarafe.visualization',
    },
    'mmcarafe.visualization.hook': {
        'mmcarafe.registry',
        'mmcarafe.visualization',
    },
}
# Only inside of a function, so only when it is called.
MAY_IMPORT_LAZILY = {'mmcarafe.upsamplers.build': {'mmcarafe.registry'}}


def within(name, names):
    """Those of the names that are a module or a package that it lies in."""
    return {n for n in names if f'{name}.'.startswith(f'{n}.')}


class Imports(ast.NodeVisitor):
    """What the source of one module takes from others of this package."""

    def __init__(self, source):
        self.at_once, self.lazily, self.private = set(), set(), set()
        self._names, self._functions = set(), 0
        tree = ast.parse(source)
        self.visit(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                root = node.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(root, ast.Name) and root.id in self._names:
                    self.private.add(node.attr)

    def visit_FunctionDef(self, node):
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_Import(self, node):
        for alias in node.names:
            self._add(alias.name, alias.asname or alias.name.split('.')[0])

    def visit_ImportFrom(self, node):
        assert not node.level, 'a relative import: write the full name'
        for alias in node.names:
            name = f'{node.module}.{alias.name}'
            if not {name, f'{name}.__init__'} & set(MODULES):
                name = node.module
            self._add(name, alias.asname or alias.name, alias.name)

    def _add(self, module, bound, taken=''):
        if module.split('.')[0] == 'mmcarafe':
            (self.lazily if self._functions else self.at_once).add(module)
            self._names.add(bound)
            names = {*module.split('.'), taken}
            self.private |= set(filter(is_private, names))


def is_private(name):
    return name.startswith('_') and not name.endswith('__')


@pytest.mark.parametrize('name', MODULES)
def test_imports_point_downwards(name):
    path = MODULES[name]
    name = name.replace('.__init__', '')
    imports = Imports(path.read_text(encoding='utf-8'))
    assert not imports.private
    rules = within(name, MAY_IMPORT)
    if rules:
        may = MAY_IMPORT[max(rules, key=len)]
        lazily = may | MAY_IMPORT_LAZILY.get(name, set())
        assert not {m for m in imports.at_once if not within(m, may)}
        assert not {m for m in imports.lazily if not within(m, lazily)}


@pytest.mark.parametrize(
    'source',
    [
        'from mmcarafe.ops.reference import _taps',
        'from mmcarafe.ops import reference as r\nr._taps(1)',
        'import mmcarafe.ops.reference\nmmcarafe.ops.reference._taps(1)',
        'def f():\n from mmcarafe.ops import cpu\n return cpu.LIBRARY._taps',
    ],
)
def test_a_private_name_is_noticed(source):
    assert Imports(source).private == {'_taps'}
    assert not Imports(source.replace('_taps', 'taps')).private


def test_an_import_is_noticed_where_it_stands():
    imports = Imports(
        'import torch._C\n'
        'from mmcarafe import models, swap_upsample\n'
        'def f():\n'
        '    import mmcarafe.registry\n'
    )
    assert imports.at_once == {'mmcarafe', 'mmcarafe.models'}
    assert imports.lazily == {'mmcarafe.registry'}
    assert not imports.private
