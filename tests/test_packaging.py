"""What leaves the checkout: the wheel, the sdist, and what they install."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import OFFLINE, PIP, ROOT, run

# Simulates an environment of torch and mmengine only.
WITHOUT_HOSTS = """
from importlib.machinery import PathFinder

def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    if name.split('.')[0] not in ('mmcv', 'mmdet', 'mmseg', 'triton'):
        return find(name, path, target)

PathFinder.find_spec = find_spec
import torch
import mmcarafe
assert mmcarafe.CARAFE(8)(torch.rand(1, 8, 3, 5)).shape == (1, 8, 6, 10)
print(mmcarafe.__file__, mmcarafe.__version__)
"""


def mim_files(folder):
    """The files that `mim` looks for, relative to ``folder``."""
    files = {'model-index.yml'}
    for name in ('configs', 'tools'):
        files |= {
            path.relative_to(folder).as_posix()
            for path in (folder / name).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts
        }
    return files


@pytest.mark.parametrize('name', ['configs', 'tools', 'model-index.yml'])
def test_mim_finds_the_checkouts_own_files(name):
    link = ROOT / 'mmcarafe' / '.mim' / name
    assert link.is_symlink()  # a copy would go stale
    assert link.resolve(strict=True) == ROOT / name


def test_make_alone_lists_the_targets():
    (phony,) = re.findall('PHONY: (help .*)', (ROOT / 'Makefile').read_text())
    # As typed in a shell, also where the tests themselves run under make.
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE')}
    for words in ('make',), ('make', 'help'):
        lines = run(*words, cwd=ROOT, env=env).splitlines()
        assert [line.split('\t')[0] for line in lines] == phony.split()
        assert all(line.endswith('.') for line in lines)


def test_module_has_a_help():
    output = run(sys.executable, '-m', 'mmcarafe', '--help')
    assert output.startswith('usage: python -m mmcarafe')
    assert 'what serves each device' in ' '.join(output.split())


def test_all_say_the_same_about_python():
    setup, project, readme, makefile = (
        (ROOT / name).read_text(encoding='utf-8')
        for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'Makefile')
    )
    (oldest,) = re.findall(r'python_requires = >=3\.(\d+)\n', setup)
    versions = re.findall(r'Python :: 3\.(\d+)\n', setup)
    first, last = int(oldest), int(versions[-1])
    assert versions == [str(minor) for minor in range(first, last + 1)]
    assert f"target-version = 'py3{first}'" in project
    assert f'Python 3.{first} or later' in ' '.join(readme.split())
    # what `make setup` accepts, because of the versions that it installs
    (checked,) = re.findall(
        r'\(3, (\d+)\) <= sys\.version_info < \(3, (\d+)\)', makefile
    )
    low, high = int(checked[0]), int(checked[1]) - 1
    assert first <= low and high <= last
    assert f'with Python 3.{low} to 3.{high} ' in ' '.join(readme.split())
    minors = [f'3.{minor}' for minor in range(low, high + 1)]
    assert f'Python {", ".join(minors[:-1])} or {minors[-1]} (' in makefile


@pytest.fixture(scope='module')
def sdist(dist):
    (sdist,) = dist.glob('*.tar.gz')
    return sdist


@pytest.fixture(scope='module')
def pure_wheel(dist):
    (wheel,) = dist.glob('*-any.whl')
    return wheel


# Both were built from the sdist.
@pytest.fixture(scope='module', params=['wheel', 'pure_wheel'])
def installed(request, tmp_path_factory):
    archive = request.getfixturevalue(request.param)
    target = tmp_path_factory.mktemp(f'from_{request.param}')
    run(*PIP, 'install', *OFFLINE, '--target', target, archive)
    return target


def test_archive_holds_no_links_and_no_leftovers(sdist, wheel, pure_wheel):
    with tarfile.open(sdist) as archive:
        assert not [m.name for m in archive if m.issym() or m.islnk()]
        names = archive.getnames()
    assert [name for name in names if name.endswith('/mmcarafe/ops/cpu.cpp')]
    for path in (wheel, pure_wheel):
        with zipfile.ZipFile(path) as archive:
            names += archive.namelist()
    assert not [name for name in names if '__pycache__' in name]
    assert any(name.endswith('LICENSE') for name in names)


def libraries(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.endswith('.so')}


def library_names():
    x86 = platform.machine() == 'x86_64'
    widths = ('default', 'avx2', 'avx512') if x86 else ('default',)
    return {f'mmcarafe/ops/_cpu_{width}.so' for width in widths}


def test_there_is_one_wheel_for_every_python(dist, wheel, pure_wheel):
    machine = platform.machine()
    assert libraries(wheel) == library_names()
    assert not libraries(pure_wheel)
    tags = set()
    for path in (wheel, pure_wheel):
        with zipfile.ZipFile(path) as archive:
            (info,) = [n for n in archive.namelist() if n.endswith('/WHEEL')]
            text = archive.read(info).decode()
        (tag,) = re.findall('^Tag: (.*)$', text, re.MULTILINE)
        assert path.stem.endswith(f'-{tag}')
        tags.add(tag)
    assert tags == {f'py3-none-manylinux_2_28_{machine}', 'py3-none-any'}
    assert len(list(dist.iterdir())) == 3


@pytest.mark.parametrize('python', ['3.8', '3.13'])
@pytest.mark.parametrize(
    'system, chosen',
    [
        ('manylinux_2_28', 'wheel'),
        ('manylinux_2_17', 'pure_wheel'),  # an older system
        ('win', 'pure_wheel'),
    ],
)
def test_pip_takes_the_wheel_that_fits(
    request, dist, tmp_path, python, system, chosen
):
    run(
        *(*PIP, 'download', '--no-deps', '--no-index', '--find-links', dist),
        *('--only-binary', ':all:', '--python-version', python),
        *('--platform', f'{system}_{platform.machine()}', '-d', tmp_path),
        'mmcarafe',
    )
    (found,) = tmp_path.iterdir()
    assert found.name == request.getfixturevalue(chosen).name


def build_ext(folder, **environ):
    return subprocess.run(
        [sys.executable, 'setup.py', 'build_ext', '-b', folder, '-t', folder],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


def test_each_library_has_an_object_of_its_own(tmp_path):
    """They are compiled at the same time; mixed up, the library for every
    processor would hold instructions that most do not have."""
    log = tmp_path / 'log'
    compiler = tmp_path / 'compiler'
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    compiler.chmod(0o755)
    done = build_ext(tmp_path, CC=str(compiler), CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    objects = re.findall(r' -c \S+ -o (\S+)', log.read_text())
    linked = re.findall(r'(\S+\.o) .*-o \S+\.so', log.read_text())
    assert len(set(objects)) == len(objects) == len(library_names())
    assert sorted(linked) == sorted(objects)


@pytest.mark.parametrize('demanded', [True, False])
def test_the_library_can_be_demanded(tmp_path, demanded):
    done = build_ext(
        tmp_path,
        CC='/no/such/compiler',
        CXX='/no/such/compiler',
        MMCARAFE_WITH_OPS='1' if demanded else '',
    )
    assert '/no/such/compiler' in done.stderr
    assert bool(done.returncode) == demanded


def test_with_ops_is_0_or_1(tmp_path):
    done = build_ext(tmp_path, MMCARAFE_WITH_OPS='yes')
    assert done.returncode != 0
    message = "MMCARAFE_WITH_OPS is 'yes', expected 0 or 1"
    assert message in done.stderr.splitlines()


def test_nox_runs_every_python_and_torch_that_we_name():
    setup, makefile = (
        (ROOT / name).read_text(encoding='utf-8')
        for name in ('setup.cfg', 'Makefile')
    )
    listed = run(sys.executable, '-m', 'nox', '--list', '--json', cwd=ROOT)
    sessions = json.loads(listed)
    versions = re.findall(r'Python :: (3\.\d+)\n', setup)
    assert {session['python'] for session in sessions} == set(versions)
    torches = [session['call_spec']['torch'] for session in sessions]
    (oldest,) = re.findall(r'torch>=(.*)', setup)
    (newest,) = re.findall(r'torch==([\d.]+)\)', makefile)
    assert torches[0].startswith(f'{oldest}.') and torches[-1] == newest


def test_configs_tools_and_data_are_inside(installed):
    assert mim_files(ROOT) > {'model-index.yml'}
    assert mim_files(installed / 'mmcarafe' / '.mim') == mim_files(ROOT)
    assert (installed / 'mmcarafe/visualization/page.html').is_file()
    for name in mim_files(ROOT):
        inside = installed / 'mmcarafe' / '.mim' / name
        assert inside.read_bytes() == (ROOT / name).read_bytes()


def test_import_needs_torch_and_mmengine_only(installed, tmp_path):
    environ = {**os.environ, 'PYTHONPATH': str(installed)}
    file, version = run(
        sys.executable, '-c', WITHOUT_HOSTS, cwd=tmp_path, env=environ
    ).split()
    assert installed in Path(file).parents
    assert f'mmcarafe-{version}' in str(list(installed.iterdir()))


@pytest.mark.parametrize(
    'variable, package',
    [('CXX', 'g++'), ('PYTHON', 'python3 python3-venv python3-dev')],
)
def test_setup_names_what_is_missing(tmp_path, variable, package):
    # what the set-up depends on
    (tmp_path / 'mmcarafe/ops').mkdir(parents=True)
    for name in ('Makefile', 'setup.cfg', 'setup.py', 'mmcarafe/ops/cpu.cpp'):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        ['make', 'setup', f'{variable}=/no/such/program'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    advice = f'Please install what is missing: sudo apt install {package}'
    assert advice in done.stdout.splitlines()
    assert not (tmp_path / '.venv').exists()
