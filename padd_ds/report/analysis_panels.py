"""What is drawn of the analysis of a model's routing.

Legend: L layers, E experts, R checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from padd_ds.report.html import Panel
from padd_ds.report.numbers import MINUS, TIMES, readable
from padd_ds.report.plots import curves, distribution, expert_map, layers_over_steps, pair_map
from padd_ds.report.routing_panels import around_zero
from padd_ds.report.source import Series, distinct_names
from padd_ds.report.svg import SERIES

MAX_SUBJECTS, MAX_PAIR_MAPS = 12, 4
Values = Mapping[str, Any]


def routing_sections(routing: Values) -> dict[str, list[Panel]]:
    """What there is to draw, by section."""
    return {title: panels for title, drawn in _SECTIONS.items() if (panels := drawn(routing))}


def last_part(source: str) -> str:
    """Of a path or a hub id."""
    return source.rstrip("/").rpartition("/")[2] or source


def _subjects(routing: Values) -> list[Panel]:
    measured = routing["specialisation"]
    if measured is None:
        return []
    parts = [
        _curve(
            "NMI per layer",
            "0 to 1",
            routing,
            {"expert and subject": measured["nmi"]["by_layer"], "shuffled": measured["nmi"]["shuffled_mean_by_layer"]},
            "The higher above the shuffled control, the more a layer's experts belong to subjects.",
        )
    ]
    share_CLE = {name: np.array(share) for name, share in measured["share_by_subject"].items()}
    load_LE = np.array(routing["headline"]["load_share_by_layer"])
    shown = sorted(share_CLE, key=lambda name: -routing["subjects"][name])[:MAX_SUBJECTS]
    above_CLE = {name: (share_CLE[name] - load_LE) * routing["experts"] for name in shown}
    limit = max([1e-12, *(float(np.abs(above_LE).max()) for above_LE in above_CLE.values())])
    for name in shown:
        parts.append(
            Panel(
                title=name or "no subject",
                unit=f"share {MINUS} share of all, {TIMES} E",
                plot=expert_map(above_CLE[name], limit, routing["layers"][0]),
                caption=f"{routing['subjects'][name]} rows. Orange: chosen more for this subject than for all rows "
                "together.",
                limits=around_zero(limit),
            )
        )
    return parts


def _load_panels(routing: Values) -> list[Panel]:
    load_LE = np.array(routing["headline"]["load_share_by_layer"])
    parts = [_even_load_map("Load", load_LE, routing, "Faint: an even load. Full blue: no token at all.")]
    load = routing["load"]
    entropies = {"load": load["load_entropy_nats_by_layer"]}
    if load["router_entropy_nats_by_layer"] is not None:
        entropies["router, per token"] = load["router_entropy_nats_by_layer"]
    text = "Dashed: ln E, an even load, and a router that knows nothing. Near 0: a collapse."
    parts.append(_curve("Entropy per layer", "nats", routing, entropies, text, float(np.log(routing["experts"]))))
    return parts


def _expert_panels(routing: Values) -> list[Panel]:
    parts = []
    similarity_LEE, together_LEE = (np.array(routing[name]) for name in ("output_similarity", "coactivation"))
    for place in _spread_out(len(routing["layers"]), MAX_PAIR_MAPS):
        layer = routing["layers"][place]
        apart_EE = _without_diagonal(similarity_LEE[place])
        limit = max(float(np.abs(apart_EE).max()), 1e-12)
        title = f"Output similarity, layer {layer}"
        plot, caption = pair_map(apart_EE, limit), "Orange: alike. The diagonal is left out."
        parts.append(Panel(title=title, unit="cosine", plot=plot, caption=caption, limits=around_zero(limit)))
        if routing["experts_per_token"] > 1:
            parts.append(_together(layer, _without_diagonal(together_LEE[place])))
    return parts


def _together(layer: int, together_EE: np.ndarray) -> Panel:
    title, limit = f"Co-activation, layer {layer}", max(float(together_EE.max()), 1e-12)
    caption = "Share of an expert's tokens (row) that also go to the other one (column)."
    plot, limits = pair_map(together_EE, limit), ("0", "", readable(limit))
    return Panel(title=title, unit="share", plot=plot, caption=caption, limits=limits)


def _even_load_map(title: str, share_LE: np.ndarray, routing: Values, caption: str) -> Panel:
    plot = expert_map(share_LE * routing["experts"] - 1, 1.0, routing["layers"][0])
    return Panel(title=title, unit=f"share {TIMES} E", plot=plot, caption=caption, limits=("0", "1", "≥ 2"))


def _shift_panels(routing: Values) -> list[Panel]:
    shift, headline = routing["shift"], routing["headline"]
    if shift is None:
        return []
    parts = []
    if shift["shift_by_layer"] is not None:
        title, (edges, counts) = "Distribution of the router shift", (headline["shift_edges"], headline["shift_counts"])
        plot, text = (
            distribution(edges, {"all tokens": counts}, "Γ"),
            "Tokens whose shift, mean over layers, is below Γ.",
        )
        entries = [("all tokens", "")]
        parts.append(Panel(title=title, unit="share of tokens", plot=plot, caption=text, entries=entries))
        values = {f"‖g {MINUS} g before‖": shift["shift_by_layer"]}
        parts.append(_curve("Router shift per layer", "mean per token", routing, values, "0: as it was."))
    flips = {"choices": shift["flips_by_layer"]}
    parts.append(_curve("Flips per layer", "share of slots", routing, flips, "Experts that were not chosen before."))
    return parts


def _course_panels(routing: Values) -> list[Panel]:
    """From each of several earlier checkpoints."""
    course = routing["over_training"]
    if not course:
        return []
    names = distinct_names([one["checkpoint"] for one in course])
    consistency_RL = np.array([one["consistency_by_layer"] for one in course])
    parts = [
        Panel(
            title="Expert consistency per layer",
            unit="share of slots",
            plot=layers_over_steps(
                range(1, len(names) + 1), consistency_RL, 1.0, across="checkpoint", first_layer=routing["layers"][0]
            ),
            caption="Chosen experts that the earlier checkpoint chooses too. Good: rises early and stays. "
            + "; ".join(f"{place}: {name}" for place, name in enumerate(names, start=1)),
            limits=("0", "", "1"),
        )
    ]
    places = np.unique(np.linspace(0, len(course) - 1, min(len(course), len(SERIES))).round().astype(int))
    counts = {f"{place + 1}: {names[place]}": course[place]["shift_counts"] for place in places}
    if course[0]["shift_edges"]:
        parts.append(
            Panel(
                title="Distribution of the shift from each",
                unit="share of tokens",
                plot=distribution(course[0]["shift_edges"], counts, "Γ"),
                caption="Tokens whose shift, mean over layers, is below Γ. Good: later ones lie further to the left.",
                entries=[(name, "") for name in counts],
            )
        )
    return parts


def _cluster_panels(routing: Values) -> list[Panel]:
    clusters = routing["clusters"]
    if clusters is None:
        return []
    values = {"agreement": clusters["agreement_by_layer"], "independent": clusters["chance_by_layer"]}
    text = "Choices among the teacher's most active clusters. The further above the other line, the more it follows."
    parts = [_curve("Agreement per layer", "share of slots", routing, values, text)]
    share_LE = np.array(clusters["teacher_share_by_layer"])
    text = "If every token went to the clusters that fire most for it."
    return [*parts, _even_load_map("Load that the teacher suggests", share_LE, routing, text)]


_SECTIONS: dict[str, Callable[[Values], list[Panel]]] = {
    "Subjects": _subjects,
    "Load": _load_panels,
    "Change since the other checkpoint": _shift_panels,
    "Over training": _course_panels,
    "The teacher's clusters": _cluster_panels,
    "Experts": _expert_panels,
}


def _curve(
    title: str,
    unit: str,
    routing: Values,
    values: Mapping[str, Sequence[float]],
    caption: str,
    reference: float | None = None,
) -> Panel:
    layers = np.array(routing["layers"], dtype=float)
    series = {name: Series(steps=layers, values=np.array(one, dtype=float)) for name, one in values.items()}
    entries = [(name, f"mean {readable(float(np.mean(one)))}") for name, one in values.items()]
    plot = curves(series, from_zero=True, reference=reference, across="layer")
    return Panel(title=title, unit=unit, plot=plot, caption=caption, entries=entries)


def _without_diagonal(values_EE: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(values_EE), dtype=bool), 0.0, values_EE)


def _spread_out(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
