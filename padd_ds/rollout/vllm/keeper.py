"""Runs a command for as long as the process that started it is there; run by path, with Python's own library alone.

    keeper.py FOLDER COMMAND...

The command gets a process group of its own. A byte on standard input, or its end, which also comes when the starter
dies of whatever, and the whole group is asked to end, and killed if it does not. After the end FOLDER is deleted too.
Ends with the command's exit code where that ends by itself.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys

PATIENCE_S = 10.0
"""Between asking a group to end and killing it."""


def main() -> int:
    folder, command = sys.argv[1], sys.argv[2:]
    # A terminal's Ctrl-C and a launcher's SIGTERM are for the trainer, which then closes our standard input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_usual_signals,
    )
    ended = os.pidfd_open(child.pid)
    select.select([sys.stdin, ended], [], [])
    starter_is_gone = False
    if child.poll() is None:
        starter_is_gone = not os.read(sys.stdin.fileno(), 1)
        _signal_group(child.pid, signal.SIGTERM)
        select.select([ended], [], [], PATIENCE_S)
    # Also where the command has ended by itself, for the processes that it may have left.
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    if starter_is_gone:
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _usual_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
