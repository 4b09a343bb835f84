"""The analysis of a model's routing as one HTML page.

Legend: L layers, E experts.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from padd_ds.report.analysis_panels import last_part, routing_sections
from padd_ds.report.html import document, folded, panel_grid, table
from padd_ds.report.numbers import readable
from padd_ds.report.panels import EXCESS
from padd_ds.report.source import distinct_names

Values = Mapping[str, Any]
Row = list[str]


def routing_page(document_: Values) -> str:
    """The page of what `padd-eval --routing-analysis` writes as JSON."""
    routing, settings = document_["routing"], document_["settings"]
    title = f"Routing of {last_part(settings['model'])}"
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


def routing_summary(routing: Values) -> str:
    """The headline as a few lines of text."""
    rows = [*_associations(routing), *_loads(routing), *_changes(routing)]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}  {', '.join(_told(row))}" for row in rows)


def _told(row: Row) -> list[str]:
    _, value, interval, control, p_value = row
    named = (("", value), ("95 % ", interval), ("no association ", control), ("p ", p_value))
    return [name + text for name, text in named if text]


def _subtitle(routing: Values, settings: Values) -> str:
    data = settings.get("benchmark") or last_part(str(settings.get("data")))
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
    course = routing["over_training"]
    for one, name in zip(course, distinct_names([one["checkpoint"] for one in course]), strict=True):
        rows.append([f"Choices that {name} makes too", f"{100 * one['consistency']:.1f} %"])
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


def _off_diagonal(values_LEE: Any) -> np.ndarray:
    """[L, E * (E - 1)]; of one expert per layer, a 1."""
    values = np.array(values_LEE, dtype=float)
    n_experts = values.shape[-1]
    return values[:, ~np.eye(n_experts, dtype=bool)] if n_experts > 1 else values[:, 0]
