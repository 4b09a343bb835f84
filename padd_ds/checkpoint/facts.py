"""What a run's folder tells of one of its checkpoints."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from padd_ds.checkpoint.layout import STUDENT, Checkpoint
from padd_ds.errors import UserError

Facts = dict[str, Any]

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
CONVERSION, EXPORT = "padd_conversion.json", "padd_export.json"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run's folder says of one of its checkpoints; empty where a file is not there."""

    run: Path
    checkpoint: Checkpoint
    config: Facts = field(default_factory=dict)
    environment: Facts = field(default_factory=dict)
    metrics: Facts = field(default_factory=dict)
    """Of the last step that was logged before the checkpoint."""
    conversion: Facts = field(default_factory=dict)
    earlier: list[Facts] = field(default_factory=list)
    """Run, step and stage of every export that the student came through, oldest first."""

    def option(self, key: str) -> Any:
        """The value of a dotted key of the run's configuration; None where it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_facts(run: Path, checkpoint: Checkpoint) -> RunFacts:
    """The facts of a checkpoint; UserError for a file of the run that cannot be read."""
    before = _tree(run / STUDENT / EXPORT)
    earlier = [*before.pop("earlier", []), before] if before else []
    return RunFacts(
        run=run,
        checkpoint=checkpoint,
        config=_tree(run / CONFIG),
        environment=_tree(run / ENVIRONMENT),
        metrics=_last_metrics(run / METRICS, checkpoint.step),
        conversion=_tree(run / STUDENT / CONVERSION),
        earlier=[{key: one[key] for key in ("run", "step", "stage") if key in one} for one in earlier],
    )


def _tree(path: Path) -> Facts:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); repair or remove it") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no keys with values; repair or remove it")
    return tree


def _last_metrics(path: Path, steps: int) -> Facts:
    last: Facts = {}
    # What follows the last newline is a line that was not finished.
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    for number, line in enumerate(lines, start=1):
        try:
            logged = json.loads(line)
            if logged["step"] < steps:
                last = logged
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number}: not an object with a "step"; remove the line') from error
    return last
