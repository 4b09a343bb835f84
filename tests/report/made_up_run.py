"""A run folder with made-up numbers, for tests of the report."""

import json
from pathlib import Path
from typing import Any

LAYERS, EXPERTS = 3, 4


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def metrics(step: int) -> dict[str, float]:
    """All that a warm-up and a joint step log together."""
    names = ("loss_lm", "loss_kd", "loss_init", "loss_policy", "reward", "reward_correct", "response_tokens")
    names += ("response_truncated", "answer_missing", "router_shift", "kl_old_nats", "load_max_violation")
    names += ("router_flips", "router_flips_rollout", "load_reward_distance", "grad_norm_policy", "grad_norm_kd")
    names += ("router_entropy_nats", "seconds_rollout", "seconds_scoring", "seconds_update")
    names += ("loss_aux", "groups_without_spread", "answer_check_failed", "gold_unparsable", "clip_fraction")
    names += ("kl_reference_nats", "ratio_penalised", "grad_norm", "grad_norm_reference", "grad_norm_aux")
    names += ("tokens_per_second_rollout", "tokens_per_second_scoring", "tokens_per_second_update")
    return {"step": step, **dict.fromkeys(names, 0.5 + 0.01 * step), "shift_penalty": 0.002, "ratio_deviation": 0.1}


def routing(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "load_share": [[0.0, 0.5, 0.25, 0.25]] * LAYERS,
        "max_violation": [1.0] * LAYERS,
        "score_spread": [0.05] * LAYERS,
        "selection_bias": [[0.1, -0.05, 0.0, 0.02]] * LAYERS,
        "logit_bias": [[0.0] * EXPERTS] * LAYERS,
        "advantage_ema": [[0.2, -0.4, 0.0, 0.1]] * LAYERS,
        "load_share_rewarded": [[0.0, 0.6, 0.2, 0.2]] * LAYERS,
        "load_share_unrewarded": [[0.0, 0.4, 0.3, 0.3]] * LAYERS,
        "router_shift": [0.01, 0.02, 0.04],
        "router_flips": [0.1] * LAYERS,
        "router_flips_rollout": [0.05] * LAYERS,
        "router_shift_edges": [1e-4, 1e-3, 1e-2],
        "router_shift_counts": [[10, 30, 50, 10]] * LAYERS,
    }


def make_run(folder: Path, steps: int = 3, response: str = "7 + 5 = 12") -> Path:
    """A complete run of `steps` steps whose every sample answers `response`."""
    write_lines(folder / "metrics.jsonl", [metrics(step) for step in range(steps)])
    write_lines(folder / "routing" / "routing.jsonl", [routing(step) for step in range(steps)])
    sample = {"question": "7 plus 5?", "gold": "12", "response": response, "reward": 1.1, "status": "ok"}
    write_lines(folder / "samples.jsonl", [{"step": step, **sample, "advantage": 0.4} for step in range(steps)])
    (folder / "config.yaml").write_text("stage: joint\nsteps: 3\n", encoding="utf-8")
    (folder / "environment.json").write_text('{"ranks": 2}\n', encoding="utf-8")
    return folder
