"""Run a command that compiles, and count the files that it has compiled.

pip is silent while it compiles a package, for half an hour where that is
mmcv. Usage::

    python tools/watch_build.py COMMAND [ARGUMENT ...]

The command gets a folder for temporary files of its own, in which torch's
extensions are compiled. In a terminal one line counts, otherwise a line is
printed every minute. Whether the command ends, fails or is interrupted, all
that it started ends, and the folder is removed. The exit status is the
command's.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY = 60  # seconds from line to line


def count(folder):
    """How many files of an extension are compiled, and of how many.

    Args:
        folder (Path): for temporary files; pip unpacks packages into it.

    Returns:
        tuple[str, int, int] | None: name of the package, files done, and all,
        0 if unknown. None if nothing is compiled.
    """
    try:
        for build in folder.glob('pip-*/*/build/temp*'):
            done = sum(1 for _ in build.rglob('*.o'))
            total = 0
            for plan in build.glob('build.ninja'):
                rules = re.findall(r'^build .*\.o: ', plan.read_text(), re.M)
                total += len(rules)
            if done or total:
                return build.parts[-3].split('_')[0], done, total
    except OSError:
        pass  # the command removes its files while they are counted
    return None


class Line:
    """Says how far it is: on one line of a terminal, or now and then."""

    def __init__(self, stream, every=EVERY):
        self.stream, self.every = stream, every
        self.start = self.last = time.monotonic()
        self.shown = None

    def update(self, found):
        now = time.monotonic()
        if found is None or found == self.shown:
            return
        live = self.stream.isatty()
        if not live and now - self.last < self.every:
            return
        name, done, total = found
        of_all = f' of {total}' if total else ''
        minutes = (now - self.start) / 60
        text = f'{name}: {done}{of_all} files compiled, {minutes:.0f} min'
        # The blank at the end is for pip, which turns a bar there.
        self.stream.write(f'\r\033[K{text} ' if live else f'{text}\n')
        self.stream.flush()
        self.shown, self.last = found, now


def stop(process):
    """End a command that was interrupted, and all that it started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass


def run(command, stream=None, every=EVERY, pause=1.0):
    """Run a command and report; return its exit status.

    Args:
        command (list[str]): program and arguments.
        stream (TextIO, optional): where to report, by default stdout.
        every (float): seconds from line to line, without a terminal.
        pause (float): seconds from count to count.
    """
    line = Line(stream or sys.stdout, every)
    folder = Path(tempfile.mkdtemp(prefix='build-'))
    try:
        # A group of its own, so that an interruption reaches compilers, too.
        process = subprocess.Popen(
            command,
            env={**os.environ, 'TMPDIR': str(folder)},
            start_new_session=True,
        )
        try:
            status = None
            while status is None:
                try:
                    status = process.wait(pause)
                except subprocess.TimeoutExpired:
                    pass
                line.update(count(folder))
            return status
        except BaseException:
            stop(process)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    command = sys.argv[1:]
    if not command:
        sys.exit(f'usage: {sys.argv[0]} COMMAND [ARGUMENT ...]')
    # as Ctrl-C, so that nothing is left of the command; but not under nohup
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        status = run(command)
    except OSError as error:
        sys.exit(f'error: {command[0]}: {error.strerror}')
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == '__main__':
    main()
