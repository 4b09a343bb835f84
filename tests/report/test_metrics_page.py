"""docs/metrics.md explains all that a training logs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from padd_ds.config.sections import LogConfig
from padd_ds.engine.ranks import Ranks
from padd_ds.rollout.guidance import Guidance
from padd_ds.stages.stage import StepReport
from tests.ranks import run_ranks
from tests.stages.test_warmup import make_warmup, warmup_config
from tests.world import FixedChecker, joint_config, make_joint_stage

LOG = LogConfig(gradients_every_steps=1)


def explained(repository: Path, heading: str) -> set[str]:
    """The names in the first column of the tables below a heading of the page."""
    page = (repository / "docs" / "metrics.md").read_text(encoding="utf-8")
    body = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    firsts = re.findall(r"^\|([^|]*)\|", body, flags=re.MULTILINE)
    return {name for first in firsts for name in re.findall(r"`(\w+)`", first)}


def names(report: StepReport) -> dict[str, list[str]]:
    samples = [name for sample in report.samples for name in sample]
    return {"metrics.jsonl": [*report.metrics], "routing/routing.jsonl": [*report.routing], "samples.jsonl": samples}


def all_names(ranks: Ranks) -> list[dict[str, list[str]]]:
    """Of three steps that between them have every part that a step can have."""
    policy = {"updates_per_rollout": 2, "kl_weight": 0.1, "importance_cap": 2.0}
    runs: list[dict[str, Any]] = [{"policy": policy}, {"balance": {"kind": "aux_loss"}}]
    checker = FixedChecker(lambda text, gold: len(text) % 2 == 0)
    joint = [
        make_joint_stage(ranks, joint_config(log=LOG, **overrides), 1, checker, guidance)
        for overrides, guidance in zip(runs, (None, Guidance(texts={})), strict=True)
    ]
    warmup = make_warmup(ranks, replace(warmup_config(), log=LOG))
    return [names(stage.step(0)) for stage in (*joint, warmup)]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_page_names_what_is_logged_and_nothing_else(repository: Path) -> None:
    found = run_ranks(all_names, 1)[0]
    for file in ("metrics.jsonl", "routing/routing.jsonl", "samples.jsonl"):
        logged = {"step"}.union(*(one[file] for one in found))
        assert explained(repository, file) == logged, file
