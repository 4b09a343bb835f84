"""Scored responses kept as they come, so that an interrupted evaluation goes on and ranks share the work."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from padd_ds.errors import UserError
from padd_ds.files import disk_full_is_user_error, write_text_whole
from padd_ds.launcher import launched_world
from padd_ds.run.lock import LOCK

PLAN_NAME = "plan.json"
"""In a work folder: what makes the work the same."""
Key = tuple[int, int]
"""Number of the problem from 0; number of the response to it: 0 is the greedy one, those from 1 on are drawn."""


@dataclass(frozen=True, kw_only=True)
class ScoredResponse:
    """One problem, what the model answered, and the verdict."""

    problem: int
    """Its number in the data, from 0."""
    sample: int
    """0: the greedy response. From 1 on: drawn ones."""
    question: str
    gold: str
    subject: str | None
    level: str | None
    response: str
    extracted: str
    correct: bool
    status: str
    tokens: int
    ended: bool

    @property
    def key(self) -> Key:
        return self.problem, self.sample


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which rank of how many this process is, and how they keep together; alone by default."""

    rank: int = 0
    world: int = 1
    device: str | None = None
    """Where this rank computes, unless the user says so; None: wherever a process that is alone would."""
    wait: Callable[[], None] = lambda: None
    """Returns when every rank has called it."""
    together: Callable[[Callable[[], Any]], Any] = lambda action: action()
    """Runs it on every rank; fails on all if it fails on one."""


@contextmanager
def share_of_ranks() -> Iterator[Share]:
    """This process's share of the work among the ranks that a launcher started, or all of it."""
    if launched_world() == 1:
        yield Share()
        return
    from padd_ds.engine.ranks import patient_barrier, start_ranks, stop_ranks, together

    ranks = start_ranks()
    try:
        yield Share(
            rank=ranks.rank,
            world=ranks.world,
            device=str(ranks.device),
            wait=patient_barrier(),
            together=lambda action: together(action, ranks),
        )
    finally:
        stop_ranks()


class KeptResponses:
    """The responses of one evaluation, in the folder `.NAME.partial` beside its output until they are all there.

    Each rank appends to a file of its own; all ranks see the folder. Without an output they are held in memory alone.
    """

    def __init__(self, output: Path | None = None, share: Share | None = None) -> None:
        self.share = share or Share()
        self._output = output
        self._found: dict[Key, ScoredResponse] = {}
        if output is not None:
            _cut_unfinished_line(self._own_file)
            self._read()

    @property
    def _own_file(self) -> Path:
        return work_folder(self._output) / f"rank_{self.share.rank}.jsonl" if self._output else Path()

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that have no response yet, in their order."""
        return [key for key in keys if key not in self._found]

    def add(self, responses: Iterable[ScoredResponse]) -> None:
        """Keep a batch: it is on the disk when this returns."""
        batch = {response.key: response for response in responses}
        self._found |= batch
        if self._output is None:
            return
        lines = [json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in batch.values()]
        with _on_full_disk(self._output), self._own_file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def all_of(self, keys: Iterable[Key]) -> list[ScoredResponse]:
        """The responses of all ranks, when every rank has called this. UserError if one does not appear here."""
        self.share.wait()
        keys = list(keys)
        # Together: no rank may go on, and delete the files in the end, before all have read them.
        self.share.together(lambda: self._read_all(keys))
        return [self._found[key] for key in keys]

    def _read_all(self, keys: list[Key]) -> None:
        if self.share.world > 1:
            self._read()
        if self.missing(keys):
            raise UserError(
                f"{self._output}: the responses of other ranks do not appear beside it; name an output in a folder "
                "that all ranks share"
            )

    def _read(self) -> None:
        assert self._output is not None
        for path in sorted(work_folder(self._output).glob("rank_*.jsonl")):
            for response in _responses(path):
                self._found[response.key] = response


def work_folder(output: Path) -> Path:
    """Where an evaluation that is not done keeps its responses."""
    return output.absolute().with_name(f".{output.name}.partial")


def responses_file(output: Path) -> Path:
    """Where the responses of a finished evaluation stand: `NAME.responses.jsonl` beside `NAME.json`."""
    return output.with_name(output.name.removesuffix(".json") + ".responses.jsonl")


def open_work(output: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Make the work folder of an evaluation with these settings, or take up the one that an interruption left.

    UserError: one with other settings is there. With `overwrite` it is emptied, but for its lock. `plan` holds plain
    JSON values.
    """
    folder = work_folder(output)
    there = kept_plan(folder, "rank_*.jsonl")
    if there != plan:
        if there is not None and not overwrite:
            raise UserError(
                f"{folder}: an interrupted evaluation with another {changed_keys(there, plan)} is kept there; repeat "
                "its command to finish it, pass --overwrite to delete it, or choose another output"
            )
        for path in folder.glob("*"):
            if path.name != LOCK:
                path.unlink()
    with _on_full_disk(output):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(folder / PLAN_NAME, json.dumps(plan))


def kept_plan(folder: Path, pieces: str) -> dict[str, Any] | None:
    """The plan of a work folder; None without one, or before the first of its files that match `pieces`."""
    try:
        plan: dict[str, Any] = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return plan if any(folder.glob(pieces)) else None


def changed_keys(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Those of two plans whose values differ."""
    return ", ".join(sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)))


def finish_work(output: Path, responses: Iterable[ScoredResponse], result: str) -> None:
    """Write the responses beside `output`, in the given order, then `result` to it; the work folder goes last.

    Until then the evaluation can be repeated from it.
    """
    lines = [json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in responses]
    write_text_whole(responses_file(output), "".join(lines))
    write_text_whole(output, result)
    shutil.rmtree(work_folder(output))


@contextmanager
def _on_full_disk(output: Path) -> Iterator[None]:
    hint = f"finished responses stay in {work_folder(output)}; free some space and repeat the command"
    with disk_full_is_user_error(output, hint=hint):
        yield


def _responses(path: Path) -> Iterator[ScoredResponse]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield ScoredResponse(**json.loads(line))


def _cut_unfinished_line(path: Path) -> None:
    """Take off what a kill left of a line."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
