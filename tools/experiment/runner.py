"""Runs cells side by side, each command a process tree of its own; what is done is not done again."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from padd_ds.errors import UserError
from padd_ds.files import staged_directory, write_text_whole
from tools.experiment.cell import ROOT, Cell
from tools.experiment.result import REPRODUCED, Result, as_text, cell_result, current_results

MADE = "made"
"""In the folder of a cell: its fingerprint and the hash of its model."""
BIN = Path(sys.executable).parent


@dataclass(kw_only=True)
class Runner:
    """Makes cells under `work` and writes their results under `results`."""

    work: Path
    results: Path
    jobs: int
    commit: str
    device: str = "cpu"
    _running: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, cells: list[Cell]) -> None:
        """Run `cells`, given in an order in which each follows what it needs; UserError for the first that fails."""
        todo = self.todo(cells)
        say(f"{len(cells)} cells, {len(cells) - len(todo)} of them done")
        while todo:
            self._run_all(cells, todo)
            todo = self.todo(cells)
            if todo:
                say(f"{len(todo)} cells had been made from other models than those that are there now")

    def _run_all(self, cells: list[Cell], todo: list[Cell]) -> None:
        done = {cell.name for cell in cells} - {cell.name for cell in todo}
        started_s, finished, running = time.monotonic(), 0, dict[Future, Cell]()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while todo or running:
                    for cell in [c for c in todo if set(c.needs) <= done][: self.jobs - len(running)]:
                        todo.remove(cell)
                        running[pool.submit(self._run_cell, cell)] = cell
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        cell = running.pop(future)
                        summary = future.result()
                        done.add(cell.name)
                        finished += 1
                        left_s = (time.monotonic() - started_s) / finished * (len(todo) + len(running))
                        say(f"{cell.name}: {summary} | {len(todo) + len(running)} left, about {left_s / 60:.0f} min")
            except BaseException:
                self._stop()
                raise

    def todo(self, cells: list[Cell]) -> list[Cell]:
        """Cells without a result, and those whose model another one still needs and that is not there any more."""
        there = current_results(self.results, cells)
        todo: dict[str, Cell] = {}
        for cell in reversed(cells):
            needed = any(cell.name in other.needs for other in todo.values())
            if cell.name not in there or (needed and self._made(cell) != there[cell.name].get("made")):
                todo[cell.name] = cell
        return list(reversed(todo.values()))

    def _made(self, cell: Cell) -> str:
        """What `made_hash` said of the cell's model; empty where it is not there or of another definition."""
        mark = self.work / cell.name / MADE
        fingerprint, made = mark.read_text(encoding="utf-8").split() if mark.exists() else ("", "")
        return made if fingerprint == cell.fingerprint() else ""

    def _run_cell(self, cell: Cell) -> str:
        result = self._keep(cell)
        path = self.results / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(path, as_text(result))
        return f"{result['summary']}, {result['seconds']:.0f} s"

    def _keep(self, cell: Cell) -> Result:
        """Make the cell in its own folder."""
        folder = self.work / cell.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staged_directory(folder, overwrite=True) as here:
            result = self._make(cell, here)
            (here / MADE).write_text(f"{cell.fingerprint()} {result['made']}", encoding="utf-8")
        return result

    def _make(self, cell: Cell, here: Path) -> Result:
        """Run the commands of the cell in `here`."""
        started_s = time.monotonic()
        with (here / "log.txt").open("w", encoding="utf-8") as log:
            for command in cell.commands:
                self._run_command(fill(command, self.work, here), log, self.work / cell.name)
        # All that resuming a run would need, and nothing that a result is read from.
        shutil.rmtree(here / "run" / "checkpoints", ignore_errors=True)
        seconds = time.monotonic() - started_s
        read = {name: (self.work / name / MADE).read_text(encoding="utf-8").split()[1] for name in cell.needs}
        return cell_result(cell, here, commit=self.commit, seconds=seconds, read=read)

    def verify(self, cells: list[Cell], needed: list[Cell]) -> None:
        """Make cells that have a result again, aside, and compare; UserError for the first that comes out otherwise.

        Models that they need and that are not there are made before, without a result. `needed`: in an order that can
        be run.
        """
        there = current_results(self.results, needed)
        for cell in cells:
            if cell.name not in there:
                raise UserError(f"{cell.name}: has no result to compare with; run it first, without --verify")
        self.work.mkdir(parents=True, exist_ok=True)
        read = {name for cell in needed for name in cell.needs}
        for cell in needed:
            if cell.name in read and not self._made(cell):
                say(f"{cell.name}: its model is not there and is made")
                self._keep(cell)
        for cell in cells:
            kept = there[cell.name]
            with TemporaryDirectory(dir=self.work, prefix=".verify-") as here:
                result = json.loads(as_text(self._make(cell, Path(here))))
            different = differences(result, kept)
            if different:
                raise UserError(f"{cell.name}: {', '.join(different)} came out otherwise than in {self.results}")
            say(f"{cell.name}: the same {', '.join(REPRODUCED)} and curves")

    def _run_command(self, command: list[str], log: Any, folder: Path) -> None:
        log.write(f"== {shlex.join(command)}\n")
        log.flush()
        with self._lock:
            if self._stopped:
                raise UserError("stopped")
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(self.device),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
            stopped = self._stopped
        if code != 0 and not stopped:
            kept = folder.with_name(f"{folder.name}.failed.txt")
            shutil.copyfile(log.name, kept)
            raise UserError(f"{shlex.join(command)} ended with exit code {code}; its output is in {kept}")

    def _stop(self) -> None:
        """End the process trees that still run."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                os.killpg(process.pid, signal.SIGTERM)


def differences(result: Result, kept: Result) -> list[str]:
    """What two results of a cell do not share; a curve that only `result` has is no difference."""
    names = [name for name in REPRODUCED if result[name] != kept[name]]
    return names + [
        f"the curve {name}" for name in kept["curves"] if result["curves"].get(name) != kept["curves"][name]
    ]


def end_on_sigterm() -> None:
    """Make SIGTERM end this process as an exception does, so that what it runs ends with it."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def fill(command: tuple[str, ...], work: Path, here: Path) -> list[str]:
    """The command with its folders, and `python` and the padd- commands as this environment's."""
    words = [word.replace("{work}", str(work)).replace("{here}", str(here)) for word in command]
    return [str(BIN / words[0]), *words[1:]]


def environment(device: str) -> dict[str, str]:
    """One thread per process: two of them side by side are faster than one of two threads."""
    return os.environ | {
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
