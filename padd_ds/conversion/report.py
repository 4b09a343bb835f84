"""The figures of a conversion as `padd_conversion.json`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from padd_ds.conversion.costs import ATTENTION_CONTEXT, Cost, model_costs
from padd_ds.conversion.exactness import Exactness
from padd_ds.conversion.plan import STUDENT, Plan, plain, tokens_used, versions

FILE_NAME, PAGE_NAME = "padd_conversion.json", "padd_conversion.html"


def write_report(
    folder: Path, plan: Plan, layers: list[dict[str, Any]], exactness: Exactness, perplexity: dict[str, float]
) -> dict[str, Any]:
    """Write the report to `folder` and return its contents."""
    options, slicing, teacher = plan.options, plan.slicing, plan.teacher
    teacher_cost, student_cost = model_costs(teacher.config, teacher.family, slicing, options.dense_layers)
    contents = {
        "teacher": {
            "source": options.teacher,
            "model_type": teacher.config.model_type,
            "sha256": teacher.weights.sha256,
        },
        "versions": versions(),
        "options": {**{name: plain(value) for name, value in asdict(options).items()}, "dtype": plan.dtype_name},
        "tokens_used": tokens_used(plan.windows),
        "slices": {
            "ffn_width": slicing.width,
            "slice_width": slicing.slice_width,
            "shared": slicing.shared,
            "routed": slicing.routed,
            "top_k": slicing.top_k,
            "dense_layers": options.dense_layers,
            "ffn_active_share": mean_active_share(plan),
        },
        "exactness": asdict(exactness),
        "perplexity": perplexity,
        "costs": {
            "attention_context_tokens": ATTENTION_CONTEXT,
            "teacher": _cost(teacher_cost),
            "student": _cost(student_cost),
        },
        "layers": [layer[STUDENT] for layer in layers],
        "controls": {name: [layer[name] for layer in layers] for name in plan.variants if name != STUDENT},
    }
    (folder / FILE_NAME).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return contents


def mean_active_share(plan: Plan) -> float:
    """Share of the FFN parameters that a token passes through, mean over layers."""
    dense = plan.options.dense_layers
    return (dense + (plan.depth - dense) * plan.slicing.active_share) / plan.depth


def _cost(cost: Cost) -> dict[str, int]:
    return {
        **asdict(cost),
        "flops_per_token": cost.decode_flops_per_token,
        "prefill_flops_per_token": cost.prefill_flops_per_token,
    }
