"""Runs a command for as long as the process that started it is there; run by path, with Python's own library alone.

    keeper.py FOLDER COMMAND...

The command gets a process group of its own. A byte on standard input, or its end, which also comes when the starter
dies of whatever, and the whole group is asked to end, and killed if it does not. Where the starter died, FOLDER is
deleted too, unless it is empty text. Ends with the command's exit code where that ends by itself.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time

PATIENCE_S = 10.0
"""For a command that was asked to end, and again for what it leaves, before both are killed."""


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
    # The processes that it may have left need time too, to give back what they hold.
    deadline = time.monotonic() + PATIENCE_S
    while _signal_group(child.pid, 0) and time.monotonic() < deadline:
        child.poll()
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    if starter_is_gone and folder:
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _usual_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _signal_group(group: int, number: int) -> bool:
    """Whether the group has processes; signal 0 only asks."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
