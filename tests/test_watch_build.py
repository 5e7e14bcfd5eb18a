"""The counter of compiled files, on a command that only pretends."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

watch_build = import_module('watch_build')
TOOL = Path(watch_build.__file__)

# Does what pip, torch and ninja do, in the folder that pip would take.
BUILD = """
import os, subprocess, sys, tempfile, time
from pathlib import Path

build = Path(tempfile.gettempdir(), 'pip-install-x', 'mmcv_1a2b', 'build')
build = build / 'temp.linux' / 'csrc'
build.mkdir(parents=True)
print(tempfile.gettempdir(), flush=True)
rules = [f'build {build}/{i}.o: compile {i}.cpp' for i in range(3)]
(build.parent / 'build.ninja').write_text(
    'rule compile\\n' + '\\n'.join(rules) + '\\nbuild all.so: link\\n')
for i in range(int(sys.argv[1])):
    (build / f'{i}.o').touch()
    time.sleep(0.3)
if sys.argv[2] == 'hang':
    child = subprocess.Popen(['sleep', '100'])
    print(child.pid, flush=True)
    time.sleep(100)
sys.exit(int(sys.argv[2]))
"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(tmp_path, stream, files=3, status=0, every=0.0):
    (tmp_path / 'build.py').write_text(BUILD)
    command = [sys.executable, tmp_path / 'build.py', str(files), str(status)]
    return watch_build.run(command, stream, every, pause=0.05)


def test_a_line_in_a_terminal_moves(tmp_path):
    stream = Terminal()
    assert run(tmp_path, stream) == 0
    lines = stream.getvalue().split('\r\x1b[K')
    moved = [line for line in lines if ' of 3 files compiled, 0 min ' in line]
    assert len(moved) > 1
    assert lines[-1] == 'mmcv: 3 of 3 files compiled, 0 min '
    assert '\n' not in stream.getvalue()


def test_files_that_are_removed_meanwhile(tmp_path, monkeypatch):
    folder = tmp_path / 'pip-install-x/mmcv_1/build/temp.linux'
    folder.mkdir(parents=True)
    (folder / 'build.ninja').symlink_to('gone')
    assert watch_build.count(tmp_path) is None


def test_lines_in_a_log(tmp_path):
    stream = io.StringIO()
    assert run(tmp_path, stream, status=7) == 7
    lines = stream.getvalue().splitlines()
    assert lines[-1] == 'mmcv: 3 of 3 files compiled, 0 min'
    assert '\r' not in stream.getvalue() and '\x1b' not in stream.getvalue()
    # not more often than wanted
    stream = io.StringIO()
    (tmp_path / 'again').mkdir()
    run(tmp_path / 'again', stream, every=60)
    assert stream.getvalue() == ''


@pytest.mark.parametrize('how', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_an_interruption_leaves_nothing(tmp_path, how):
    (tmp_path / 'build.py').write_text(BUILD)
    process = subprocess.Popen(
        [sys.executable, TOOL, sys.executable, tmp_path / 'build.py']
        + ['1', 'hang'],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'TMPDIR': str(tmp_path)},
        # A shell's background jobs ignore them, and so would the command.
        preexec_fn=lambda: [
            signal.signal(getattr(signal, name), signal.SIG_DFL)
            for name in ('SIGINT', how)
        ],
    )
    with process:
        folder = Path(process.stdout.readline().strip())
        child = int(process.stdout.readline())
        assert folder.parent == tmp_path and folder.is_dir()
        process.send_signal(getattr(signal, how))
        assert process.wait(30) == 130
    assert not folder.exists()
    end = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    try:
        status = Path(f'/proc/{pid}/status').read_text()
    except FileNotFoundError:
        return False
    return not re.search(r'^State:\s+Z', status, re.M)


def test_a_command_that_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, 'no-such-command'],
        env={**os.environ, 'TMPDIR': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == 'error: no-such-command: No such file or directory\n'
    assert not list(tmp_path.iterdir())
