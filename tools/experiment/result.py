"""What is kept of a cell: its figures, every verdict, and the curves of its training."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from padd_ds.conversion.costs import dense_cost
from padd_ds.conversion.families import check_supported
from padd_ds.conversion.report import FILE_NAME
from tools.experiment.cell import Cell

Result = dict[str, Any]
CURVES = (
    "reward_correct",
    "reward",
    "loss_lm",
    "loss_kd",
    "response_tokens",
    "response_truncated",
    "groups_without_spread",
    "router_shift",
    "router_flips",
    "router_flips_rollout",
    "ratio_deviation",
    "ratio_penalised",
    "clip_fraction",
    "load_max_violation",
    "load_dead_experts",
    "load_reward_distance",
    "router_entropy_nats",
    "grad_norm",
    "grad_norm_lm",
    "grad_norm_kd",
    "grad_norm_init",
    "grad_norm_policy",
)
REPRODUCED = ("greedy", "sampled", "headline")
"""What a second run of a cell on the same machine gives again, to the last digit, beside the curves."""
COSTS = ("active_parameters", "total_parameters", "matmul_flops_per_token")
PHASES = ("seconds_rollout", "seconds_scoring", "seconds_update")


def cell_result(cell: Cell, here: Path, *, commit: str, seconds: float, read: dict[str, str]) -> Result:
    """The result of a cell whose commands have all run in `here`; `read`: `made_hash` of every cell that it needs."""
    about = {
        **{"cell": cell.name, **cell.facts, "commit": commit, "fingerprint": cell.fingerprint()},
        **{"commands": [list(command) for command in cell.commands], "seconds": round(seconds, 1)},
        **{"made": made_hash(here), "read": read},
    }
    if cell.facts["kind"] == "responses":
        return about | recorded(here / "cache")
    evaluation = json.loads((here / "eval.json").read_text(encoding="utf-8"))
    headline, steps = evaluation["headline"], read_metrics(here / "run" / "metrics.jsonl")
    summary = f"Pass@1 {100 * headline['problems']['pass_at_1']:.1f}"
    if headline["samples"]:
        summary += f", sampled {100 * headline['samples']['pass_at_1']:.1f}"
    return about | {
        "summary": summary,
        "seconds_by_phase": {name: round(sum(step.get(name, 0.0) for step in steps), 1) for name in PHASES},
        "cost": model_cost(here / "model"),
        "headline": rounded(headline),
        "greedy": "".join(str(int(response["correct"])) for response in evaluation["responses"]),
        "sampled": counts_by_problem(evaluation),
        "curves": curves_of(steps),
    }


def made_hash(folder: Path) -> str:
    """Of the weights or the responses that a cell has left: another processor makes others from the same seed."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("model/*.safetensors"), *folder.glob("cache/responses.jsonl")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def follows(result: Result, needs: dict[str, Result]) -> bool:
    """Whether a result comes from the very models that the results of what it needs tell of.

    Results of before models were told apart follow from one another.
    """
    read = result.get("read", {})
    return all(read.get(name) == need.get("made") for name, need in needs.items())


def current_results(folder: Path, cells: Iterable[Cell]) -> dict[str, Result]:
    """By name, the results of cells as they are defined now, whose needs have one too, and from which they follow.

    `cells`: each behind what it needs, or without its needs where these are not among them.
    """
    there: dict[str, Result] = {}
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        needs = {name: there[name] for name in cell.needs if name in there}
        if result["fingerprint"] == cell.fingerprint() and len(needs) == len(cell.needs) and follows(result, needs):
            there[cell.name] = result
    return there


def recorded(cache: Path) -> Result:
    """What is kept of a teacher's responses: how many there are, and their checksum."""
    facts = json.loads((cache / "cache.json").read_text(encoding="utf-8"))
    headline = {"targets": facts["targets"], "sha256": facts["responses"]["sha256"]}
    return {"summary": f"{facts['targets']} right", "headline": headline, "greedy": "", "sampled": "", "curves": {}}


def curves_of(steps: list[dict[str, float]]) -> dict[str, list[float]]:
    """The CURVES that the first step has, without the steps that lack them."""
    names = [name for name in CURVES if steps and name in steps[0]]
    return {name: [rounded(step[name]) for step in steps if name in step] for name in names}


def model_cost(folder: Path) -> dict[str, int]:
    """COSTS of a dense model, or of a student with the report of its conversion."""
    report = folder / FILE_NAME
    if report.exists():
        cost = json.loads(report.read_text(encoding="utf-8"))["costs"]["student"]
    else:
        config = AutoConfig.from_pretrained(folder)
        cost = asdict(dense_cost(config, check_supported(config, str(folder))))
    return {name: cost[name] for name in COSTS}


def counts_by_problem(evaluation: dict[str, Any]) -> str:
    """Right ones among the sampled responses to each problem, a digit each."""
    verdicts = [int(response["correct"]) for response in evaluation["sampled_responses"]]
    if not verdicts:
        return ""
    samples = len(verdicts) // len(evaluation["responses"])
    return "".join(str(sum(verdicts[start : start + samples])) for start in range(0, len(verdicts), samples))


def as_text(result: Result) -> str:
    """A result as JSON, a line per key."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics; none where nothing was trained."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, in lists and dictionaries too."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return value
