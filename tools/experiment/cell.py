"""One cell of the experiment: the commands that make a model and measure it."""

import hashlib
import json
from dataclasses import dataclass, field


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

    def fingerprint(self) -> str:
        """Changes when any command does."""
        return hashlib.sha256(json.dumps([self.commands, self.needs]).encode()).hexdigest()[:16]


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
