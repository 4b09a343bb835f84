"""Command lines in processes of their own: forks of the server of tests/ranks.py, which has torch imported already."""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy

from tests.ranks import CONTEXT

REPOSITORY = Path(__file__).resolve().parents[1]


class Command:
    """`python WORDS` at the repository's root, WORDS being `FILE ...` or `-m MODULE ...`; used as a Popen with pipes.

    `log`: a file that standard output and standard error are appended to, in place of pipes.
    """

    def __init__(self, *words: object, environment: Mapping[str, str] | None = None, log: Path | None = None) -> None:
        self._words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory(prefix="padd-test-output-")
        self._outputs = [log or Path(self._folder.name, name) for name in ("stdout", "stderr")]
        arguments = (self._words, list(map(str, self._outputs)), dict(environment or os.environ))
        self._process = CONTEXT.Process(target=_be_python, args=arguments, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 200) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._words, timeout)
        return self.returncode

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        self.wait(timeout)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in self._outputs)
        return stdout, stderr


def run_command(*words: object, timeout: float = 200) -> "subprocess.CompletedProcess[str]":
    """`python WORDS`, as `subprocess.run` with captured output."""
    command = Command(*words)
    stdout, stderr = command.communicate(timeout)
    return subprocess.CompletedProcess(list(map(str, words)), command.wait(), stdout, stderr)


def _be_python(words: list[str], outputs: list[str], environment: dict[str, str]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    numpy.random.seed()  # drawn anew, as by an interpreter of its own; Python's own generator sees to that itself
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
