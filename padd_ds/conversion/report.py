"""The figures of a conversion as `padd_conversion.json`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import padd_ds
from padd_ds.conversion.costs import ATTENTION_CONTEXT, Cost, model_costs
from padd_ds.conversion.exactness import Exactness
from padd_ds.conversion.families import Family
from padd_ds.conversion.options import ConversionOptions, Slicing
from padd_ds.conversion.teacher import TeacherWeights, sha256_of

FILE_NAME = "padd_conversion.json"


def write_report(
    folder: Path,
    *,
    options: ConversionOptions,
    dtype_name: str,
    config: Any,
    family: Family,
    slicing: Slicing,
    weights: TeacherWeights,
    layers: list[dict[str, float | None]],
    exactness: Exactness,
    calibration_tokens: int,
    seconds: float,
) -> dict[str, Any]:
    """Write the report to `folder` and return its contents."""
    teacher_cost, student_cost = model_costs(config, family, slicing)
    contents = {
        "teacher": {
            "source": options.teacher,
            "model_type": config.model_type,
            "sha256": {path.name: sha256_of(path) for path in [weights.folder / "config.json", *weights.files()]},
        },
        "versions": {
            "padd_ds": padd_ds.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "options": {**{name: _plain(value) for name, value in asdict(options).items()}, "dtype": dtype_name},
        "calibration_tokens_used": calibration_tokens,
        "slices": {
            "ffn_width": slicing.width,
            "slice_width": slicing.slice_width,
            "shared": slicing.shared,
            "routed": slicing.routed,
            "top_k": slicing.top_k,
            "ffn_active_share": slicing.active_share,
        },
        "exactness": asdict(exactness),
        "costs": {
            "attention_context_tokens": ATTENTION_CONTEXT,
            "teacher": _cost(teacher_cost),
            "student": _cost(student_cost),
        },
        "layers": layers,
        "seconds": round(seconds, 1),
    }
    (folder / FILE_NAME).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return contents


def _cost(cost: Cost) -> dict[str, int]:
    return {
        **asdict(cost),
        "flops_per_token": cost.matmul_flops_per_token + cost.attention_flops_per_token,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
