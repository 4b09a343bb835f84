"""A conversion as one HTML page: what it costs, what it keeps, layer by layer.

Legend: L layers, E routed experts.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from padd_ds.report.html import Panel, document, panel_grid, table
from padd_ds.report.numbers import MINUS, TIMES, UNKNOWN, readable, scaled
from padd_ds.report.plots import curves, expert_map
from padd_ds.report.routing_panels import around_zero
from padd_ds.report.source import Series

CURVES = (
    (
        "reconstruction_error",
        "Reconstruction error",
        "of the FFN output, squared, relative",
        "Good: small everywhere; a layer that stands out loses most.",
    ),
    (
        "load_variation",
        "Load variation",
        "standard deviation over mean",
        "Good: small; 0 where all experts get the same number of tokens.",
    ),
    (
        "shared_contribution",
        "Contribution of the shared slices",
        "share of the layer's",
        "The larger, the less hangs on the router.",
    ),
    ("silhouette", "Silhouette", "-1 to 1", "Above 0 where neurons lie nearer to their own group than to the next."),
    (
        "between_cluster_share",
        "Between-cluster variance",
        "share of the features'",
        "The larger, the more alike are the neurons of a group.",
    ),
)


def conversion_page(contents: Mapping[str, Any]) -> str:
    """The page of a conversion with the figures `contents`, as they stand in `padd_conversion.json`."""
    title = f"Conversion of {_name(contents['teacher'])}"
    body = [
        f'<h1>{escape(title)}</h1>\n<p class="subtitle">{escape(_subtitle(contents))}</p>',
        f"<section><h2>Result</h2>\n{_models(contents)}\n{_proof(contents)}</section>",
        f"<section><h2>Layers</h2>\n{panel_grid(_panels(contents), 'layers')}</section>",
        f"<section><h2>Settings</h2>\n{_settings(contents)}</section>",
    ]
    return document(title, "\n".join(body))


def _name(source: Mapping[str, Any]) -> str:
    return str(source["source"]).rstrip("/").rpartition("/")[2]


def _subtitle(contents: Mapping[str, Any]) -> str:
    if "student" in contents:
        return f"New routers for {_name(contents['student'])}, whose experts stay as they are"
    slices = contents["slices"]
    return (
        f"{slices['shared']} shared and {slices['routed']} routed slices of {slices['slice_width']} neurons, "
        f"{slices['top_k']} routed ones per token: {slices['ffn_active_share']:.0%} of the FFN active"
    )


def _models(contents: Mapping[str, Any]) -> str:
    models = dict.fromkeys(["teacher", "student", *contents["controls"], *contents["perplexity"]])
    heads = ["model", "perplexity", f"{TIMES} teacher", "active", "total", "FLOPs/token, decode", "prefill"]
    return table(heads, [_model_row(contents, who) for who in models])


def _model_row(contents: Mapping[str, Any], who: str) -> list[str]:
    cost = contents.get("costs", {}).get("teacher" if who == "teacher" else "student", {})
    value, teacher = contents["perplexity"].get(who), contents["perplexity"].get("teacher")
    perplexity = [UNKNOWN, UNKNOWN] if value is None else [readable(value, 4), readable(value / teacher, 4)]
    counts = ("active_parameters", "total_parameters", "flops_per_token", "prefill_flops_per_token")
    label = f"control: {who} groups" if who in contents["controls"] else who
    return [label, *perplexity, *(scaled(cost[name]) if name in cost else UNKNOWN for name in counts)]


def _proof(contents: Mapping[str, Any]) -> str:
    if "exactness" not in contents:
        return ""
    exactness = contents["exactness"]
    text = f"With all experts active every layer equals the teacher's to {readable(exactness['largest_error'], 2)}"
    if contents["options"]["refit"]:
        text += " before the refit"
    if exactness["student_rounding_error"] is not None:
        text += (
            f"; in {contents['options']['dtype']} its logits are off the teacher's by "
            f"{readable(exactness['student_rounding_error'], 2)}, those off the teacher's in fp32 by "
            f"{readable(exactness['teacher_rounding_error'], 2)}"
        )
    return f'<p class="hint">{text}. Attention context of the FLOPs: {_context(contents)} tokens.</p>'


def _context(contents: Mapping[str, Any]) -> int:
    return contents["costs"]["attention_context_tokens"]


def _panels(contents: Mapping[str, Any]) -> list[Panel]:
    of_variant = {"student": contents["layers"], **contents["controls"]}
    first = contents.get("slices", {}).get("dense_layers", 0)
    parts = [_curve(of_variant, first, *description) for description in CURVES]
    loads = [layer["expected_load"] for layer in contents["layers"]]
    if all(load is not None for load in loads):
        parts.append(_load_map(np.array(loads)))
    return [part for part in parts if part is not None]


def _curve(
    of_variant: Mapping[str, Sequence[Mapping[str, Any]]], first: int, metric: str, title: str, unit: str, caption: str
) -> Panel | None:
    series = {}
    for name, layers in of_variant.items():
        known = [(index, layer[metric]) for index, layer in enumerate(layers, first) if layer[metric] is not None]
        if known:
            steps, values = np.array(known, dtype=float).T
            series[name] = Series(steps=steps, values=values)
    if not series:
        return None
    plot = curves(series, across="layer", from_zero=metric != "silhouette")
    entries = [(name, f"mean {readable(one.values.mean())}") for name, one in series.items()]
    return Panel(title=title, unit=unit, plot=plot, caption=caption, entries=entries)


def _load_map(load_LE: np.ndarray) -> Panel:
    excess_LE = load_LE * load_LE.shape[1] - 1
    limit = max(float(np.abs(excess_LE).max()), 1e-12)
    return Panel(
        title="Expected load",
        unit=f"share {TIMES} E {MINUS} 1",
        plot=expert_map(excess_LE, limit),
        caption="On the calibration tokens. Orange: more than an even share.",
        limits=around_zero(limit),
    )


def _settings(contents: Mapping[str, Any]) -> str:
    rows = [[name, UNKNOWN if value is None else str(value)] for name, value in contents["options"].items()]
    rows += [[f"{name} tokens", str(count)] for name, count in contents["tokens_used"].items()]
    rows += [[f"{name} version", version] for name, version in contents["versions"].items()]
    return table(["option", "value"], rows)
