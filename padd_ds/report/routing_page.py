"""The analysis of a model's routing as one HTML page.

Legend: L layers, E experts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from padd_ds.report.html import Panel, document, folded, panel_grid, table
from padd_ds.report.numbers import MINUS, TIMES, readable
from padd_ds.report.panels import EXCESS
from padd_ds.report.plots import curves, distribution, expert_map, layers_over_steps, pair_map
from padd_ds.report.routing_panels import around_zero
from padd_ds.report.source import Series
from padd_ds.report.svg import SERIES

MAX_SUBJECTS, MAX_PAIR_MAPS = 12, 4
Values = Mapping[str, Any]
Row = list[str]


def routing_page(document_: Values) -> str:
    """The page of what `padd-eval --routing-analysis` writes as JSON."""
    routing, settings = document_["routing"], document_["settings"]
    title = f"Routing of {_name(settings['model'])}"
    body = [
        f'<h1>{escape(title)}</h1>\n<p class="subtitle">{escape(_subtitle(routing, settings))}</p>',
        f"<section><h2>Result</h2>\n{_headline(routing)}\n{_notes(routing)}</section>",
    ]
    body += [
        f"<section><h2>{title}</h2>\n{panel_grid(panels, title)}</section>"
        for title, panels in routing_sections(routing).items()
    ]
    body += [f"<section><h2>Layers</h2>\n{_layer_table(routing)}</section>", _facts(document_)]
    return document(title, "\n".join(body))


def routing_sections(routing: Values) -> dict[str, list[Panel]]:
    """What there is to draw, by section."""
    return {title: panels for title, drawn in _SECTIONS.items() if (panels := drawn(routing))}


def routing_summary(routing: Values) -> str:
    """The headline as a few lines of text."""
    rows = [*_associations(routing), *_loads(routing), *_changes(routing)]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}  {', '.join(_told(row))}" for row in rows)


def _told(row: Row) -> list[str]:
    _, value, interval, control, p_value = row
    named = (("", value), ("95 % ", interval), ("no association ", control), ("p ", p_value))
    return [name + text for name, text in named if text]


def _name(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2] or source


def _subtitle(routing: Values, settings: Values) -> str:
    data = settings.get("benchmark") or _name(str(settings.get("data")))
    return (
        f"{len(routing['layers'])} layers of {routing['experts']} experts, {routing['experts_per_token']} per token; "
        f"{routing['tokens']} tokens of {routing['rows']} rows of {data}"
    )


def _headline(routing: Values) -> str:
    rows = [*_associations(routing), *_loads(routing), *_changes(routing)]
    return table(["mean over layers", "value", "95 % interval", "no association", "p"], rows)


def _associations(routing: Values) -> list[Row]:
    measured = routing["specialisation"]
    if measured is None:
        return []
    rows = []
    for key, name in (("nmi", "NMI of expert and subject"), ("esi_nats", "ESI, nats")):
        one = measured[key]
        low, high = one["interval_95"]
        control = f"{readable(one['shuffled_mean'])} (95 of 100 below {readable(one['shuffled_95'])})"
        rows.append([name, readable(one["value"]), f"{readable(low)} to {readable(high)}", control, _p(one["p_value"])])
    return rows


def _p(value: float) -> str:
    return readable(value, 2)


def _loads(routing: Values) -> list[Row]:
    headline, cells = routing["headline"], len(routing["layers"]) * routing["experts"]
    rows = [
        [f"Load violation, {EXCESS}", readable(headline["max_violation"])],
        ["Dead experts, of all", f"{headline['dead_experts']} of {cells}"],
        ["Output similarity of two experts, cosine", readable(_off_diagonal(routing["output_similarity"]).mean())],
    ]
    if headline["entropy_nats"] is not None:
        rows.append(["Router entropy, nats", readable(headline["entropy_nats"])])
    return [_filled(row) for row in rows]


def _changes(routing: Values) -> list[Row]:
    headline, rows = routing["headline"], []
    if headline["shift"] is not None:
        rows.append(["Router shift since the other checkpoint", readable(headline["shift"])])
    if headline["flips"] is not None:
        rows.append(["Choices that it does not make", f"{100 * headline['flips']:.1f} %"])
    for one in routing["over_training"]:
        rows.append([f"Choices that {_name(one['checkpoint'])} makes too", f"{100 * one['consistency']:.1f} %"])
    if (clusters := routing["clusters"]) is not None:
        agreement, chance = f"{100 * clusters['agreement']:.1f} %", f"{100 * clusters['chance']:.1f} %"
        rows.append(["Choices among the teacher's most active clusters", agreement, "", chance])
    return [_filled(row) for row in rows]


def _filled(row: Row) -> Row:
    return row + [""] * (5 - len(row))


def _notes(routing: Values) -> str:
    notes = []
    if (measured := routing["specialisation"]) is not None:
        notes.append(
            f"Intervals: {measured['resamples']} bootstrap samples of rows (pivotal). No association: the subjects "
            f"dealt out to the rows at random, {measured['shuffles']} times; p: the permutation test over them."
        )
    notes.append(
        f"Output similarity: cosine of what two experts of a layer give for the same input, mean over "
        f"{routing['sampled_tokens']} tokens and all pairs."
    )
    if routing["clusters"] is not None:
        notes.append(
            "The teacher's most active clusters: as many as experts are chosen, by the mean absolute activation of "
            "their neurons in the teacher. No association: choice and activity independent of each other."
        )
    if routing["score_function"] is None:
        notes.append("This router's weights follow neither from a softmax nor from a sigmoid: no entropy, no shift.")
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


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
    names = [_name(one["checkpoint"]) for one in course]
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


def layer_rows(routing: Values) -> list[dict[str, float]]:
    """A row of numbers per layer."""
    columns: dict[str, Sequence[float] | None] = {}
    if (measured := routing["specialisation"]) is not None:
        columns |= {"NMI": measured["nmi"]["by_layer"], "shuffled": measured["nmi"]["shuffled_mean_by_layer"]}
        columns |= {"ESI, nats": measured["esi_nats"]["by_layer"]}
    load, shift, clusters = routing["load"], routing["shift"] or {}, routing["clusters"] or {}
    columns |= {
        "load violation": routing["headline"]["max_violation_by_layer"],
        "dead": load["dead_experts_by_layer"],
        "load entropy": load["load_entropy_nats_by_layer"],
        "router entropy": load["router_entropy_nats_by_layer"],
        "similarity": [_off_diagonal([one]).mean() for one in routing["output_similarity"]],
        "shift": shift.get("shift_by_layer"),
        "flips": shift.get("flips_by_layer"),
        "agreement": clusters.get("agreement_by_layer"),
    }
    for place, one in enumerate(routing["over_training"], start=1):
        columns[f"consistency, {place}"] = one["consistency_by_layer"]
    there = {name: values for name, values in columns.items() if values is not None}
    return [
        {"layer": layer, **{name: values[place] for name, values in there.items()}}
        for place, layer in enumerate(routing["layers"])
    ]


def _layer_table(routing: Values) -> str:
    rows = layer_rows(routing)
    return table(list(rows[0]), [[readable(value) for value in row.values()] for row in rows])


def _facts(document_: Values) -> str:
    """Settings and versions, folded."""
    parts = [folded(name.capitalize(), _indented(document_[name])) for name in ("settings", "versions")]
    return f"<section><h2>Settings</h2>\n{''.join(parts)}</section>"


def _indented(values: Values) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False)


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


def _off_diagonal(values_LEE: Any) -> np.ndarray:
    """[L, E * (E - 1)]; of one expert per layer, a 1."""
    values = np.array(values_LEE, dtype=float)
    n_experts = values.shape[-1]
    return values[:, ~np.eye(n_experts, dtype=bool)] if n_experts > 1 else values[:, 0]


def _without_diagonal(values_EE: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(values_EE), dtype=bool), 0.0, values_EE)


def _spread_out(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
