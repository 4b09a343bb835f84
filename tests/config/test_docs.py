"""docs/options.md explains every key of a run, with the default that it has."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import DataConfig, ModelConfig, OptimizerConfig

REQUIRED = "required"


def defaults(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to its default, or to REQUIRED."""
    found: dict[str, Any] = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            found |= defaults(value, f"{prefix}{field.name}.")
        elif field.default is MISSING and field.default_factory is MISSING:
            found[prefix + field.name] = REQUIRED
        else:
            found[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return found


def explained(repository: Path) -> dict[str, Any]:
    """Dotted key to the default that the page gives it."""
    page = (repository / "docs" / "options.md").read_text(encoding="utf-8")
    tables = page.split("## The keys of the YAML")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `?([^|]+?)`? \| [^|]+ \|$", tables, flags=re.MULTILINE)
    assert len({key for key, _ in rows}) == len(rows)
    return {key: yaml.safe_load(default) for key, default in rows}


def test_every_key_of_a_run_is_explained_with_its_default(repository: Path) -> None:
    config = RunConfig(
        stage="teacher_grpo",
        run_dir="",
        deepspeed="",
        steps=1,
        model=ModelConfig(student=""),
        data=DataConfig(source=""),
        optimizer=OptimizerConfig(learning_rate=1.0),
    )
    # The stage needs a source of data, which another may do without.
    assert explained(repository) == defaults(config) | defaults(DataConfig(), "data.")
