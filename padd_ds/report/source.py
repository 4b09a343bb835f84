"""What a report needs of a run folder."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from padd_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Series:
    """The finite values of one metric, in the order of steps."""

    steps: np.ndarray
    values: np.ndarray
    not_finite: int = 0
    """How many values were left out because they are NaN or infinite."""

    @property
    def tenth(self) -> int:
        """How many values are a tenth of them, at least one."""
        return max(len(self.values) // 10, 1)

    @property
    def last(self) -> float:
        """The mean of the last tenth of the values; there must be one."""
        return float(self.values[-self.tenth :].mean())


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run as it was logged; lists are empty and texts None where the run left none."""

    name: str
    folder: Path
    metrics: list[dict[str, Any]]
    routing: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str | None
    environment: str | None

    @property
    def stage(self) -> str:
        """The stage that the configuration names, else just "Run"."""
        return str(self.settings.get("stage", "Run"))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration; UserError where it is not YAML."""
        tree = _parsed_yaml(self.folder / "config.yaml", self.config or "")
        return tree if isinstance(tree, dict) else {}

    @property
    def surroundings(self) -> Mapping[str, Any]:
        """Versions, commit, machine and ranks; UserError where they are not JSON."""
        try:
            tree = json.loads(self.environment or "{}")
        except json.JSONDecodeError as error:
            raise UserError(f"{self.folder / 'environment.json'}: not JSON ({error}); repair or remove it") from error
        return tree if isinstance(tree, dict) else {}

    def series(self, metric: str) -> Series | None:
        """The metric over the steps that have it; None if no step has."""
        logged = [(line["step"], line[metric]) for line in self.metrics if line.get(metric) is not None]
        finite = [(step, value) for step, value in logged if math.isfinite(value)]
        if not logged:
            return None
        steps, values = np.array(finite, dtype=float).reshape(-1, 2).T
        return Series(steps=steps, values=values, not_finite=len(logged) - len(finite))


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Run folders by their distinct names. UserError for one that is named twice."""
    whole = [str(folder.resolve()) for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError(f"a run is named twice among {', '.join(map(str, folders))}; name each once")
    return [_read_run(folder, name) for folder, name in zip(folders, distinct_names(whole), strict=True)]


def distinct_names(sources: Sequence[str]) -> list[str]:
    """As many of the last parts of paths, or hub ids, as tell them apart; the same one twice has one name."""
    parts = [[part for part in source.split("/") if part] for source in sources]
    different = len({tuple(one) for one in parts})
    length = 1
    while len({tuple(one[-length:]) for one in parts}) < different:
        length += 1
    return ["/".join(one[-length:]) for one in parts]


def _read_run(folder: Path, name: str) -> RunData:
    """UserError if it has no metrics.jsonl or a line of it cannot be read."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file; give the folder that a training run left")
    return RunData(
        name=name,
        folder=folder,
        metrics=list(_json_lines(metrics)),
        routing=_routing(folder / "routing" / "routing.jsonl"),
        samples=list(_json_lines(folder / "samples.jsonl")),
        config=_text(folder / "config.yaml"),
        environment=_text(folder / "environment.json"),
    )


def _routing(path: Path) -> list[dict[str, Any]]:
    """Its records; what they tell by layer and expert only of the first and the last, as it grows with the run."""
    records: list[dict[str, Any]] = []
    for record in _json_lines(path):
        if len(records) > 1:
            records[-1] = {key: value for key, value in records[-1].items() if not _is_nested(value)}
        records.append(record)
    return records


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); repair or remove it") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: is not UTF-8 ({error}); repair or remove it") from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error}); remove the line or resume the run"
                ) from error
            if not isinstance(record, dict) or "step" not in record:
                raise UserError(f'{path}, line {number}: not an object with a "step"; remove the line')
            yield record


def _parsed_yaml(path: Path, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}); repair or remove it") from error
