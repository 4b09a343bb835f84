"""One cell of the experiment: the commands that make a model and measure it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = "ds_configs/runs/"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model, made from those of other cells.

    `commands` are run one after the other, from the repository's root; `{work}` stands for the folder of all cells,
    `{here}` for this cell's own. They leave `{here}/model` and the result of padd-eval in `{here}/eval.json`.
    """

    name: str
    """Path-like, such as `seed0/half/joint/padd`."""
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    """Cells whose models the commands read."""
    facts: dict[str, str | int] = field(default_factory=dict)
    """What the tables group by: kind, seed, shape, method."""
    inputs: str = ""
    """Checksum of what the commands read: the run files, and the fingerprints of `needs`."""

    def fingerprint(self) -> str:
        """Changes when any command does, or what it reads; not with the code, whose commit a result names."""
        return checksum([self.commands, self.needs, self.inputs])


def checksum(document: object) -> str:
    """Of something that JSON can hold."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]


def with_inputs(cells: Iterable[Cell], root: Path) -> list[Cell]:
    """`cells`, each behind what it needs, with the checksums of their inputs; run files are read under `root`."""
    done: dict[str, Cell] = {}
    read = cache(partial(run_file, root))
    for cell in cells:
        words = sorted({word for command in cell.commands for word in command if word.startswith(RUN_FILES)})
        files = [read(word) for word in words]
        done[cell.name] = replace(cell, inputs=checksum([files, [done[name].fingerprint() for name in cell.needs]]))
    return list(done.values())


def run_file(root: Path, name: str) -> list[object]:
    """What a run file says, comments apart, and the DeepSpeed JSON that it names."""
    run = yaml.safe_load((root / name).read_text(encoding="utf-8"))
    return [run, json.loads((root / run["deepspeed"]).read_text(encoding="utf-8"))]


def with_needs(wanted: list[Cell], cells: dict[str, Cell]) -> list[Cell]:
    """The wanted cells and all that they need, each once, in an order that can be run."""
    ordered: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        for name in cell.needs:
            add(cells[name])
        ordered.setdefault(cell.name, cell)

    for cell in wanted:
        add(cell)
    return list(ordered.values())
