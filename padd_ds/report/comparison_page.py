"""Models on the same questions as one HTML page."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from padd_ds.evaluation.comparison import Compared, Comparison, changed_questions, greedy_responses
from padd_ds.evaluation.intervals import wilson_interval
from padd_ds.evaluation.paired import Difference
from padd_ds.report.comparison_plots import Point, quality_by_group, quality_over_cost
from padd_ds.report.differences import differing_table, flat, listed_table
from padd_ds.report.html import NO_DATA, Panel, cut, document, folded, panel_grid, table
from padd_ds.report.numbers import MINUS, UNKNOWN, readable, scaled
from padd_ds.report.svg import SERIES

MAX_QUESTIONS, MAX_GROUPS = 5, 30
COSTS = {
    "active_parameters": "active parameters",
    "flops_per_token": "FLOPs per token",
    "total_parameters": "parameters",
}
_NOT_SETTINGS = ("model", "output", "overwrite", "compare", "runs", "check_overlap", "local_rank", "problems_sha256")
UNIT = "of greedy responses"
Row = list[str]


def comparison_page(comparisons: Sequence[Comparison]) -> str:
    """All comparisons, the numbers that count first. UserError for responses that cannot be read."""
    title = "Comparison of " + ", ".join(dict.fromkeys(one.name for c in comparisons for one in c.members))
    body = [f"<h1>{escape(title)}</h1>", _navigation(comparisons)]
    body += [comparison_section(comparison, place) for place, comparison in enumerate(comparisons)]
    return document(title, "\n".join(body))


def panels(comparison: Comparison) -> dict[str, Panel]:
    """By the name of its file."""
    found: dict[str, Panel] = {}
    caption = f"Bars: 95 % intervals. Square: {comparison.members[0].name} ({comparison.role})."
    for key in ("active_parameters", "flops_per_token"):
        points = [point for member in comparison.members if (point := _point(member, key))]
        if len(points) == len(comparison.members):
            title, plot = f"Pass@1 over {COSTS[key]}", quality_over_cost(points, COSTS[key])
            found[f"quality_over_{key}"] = Panel(title=title, unit=UNIT, plot=plot, caption=caption)
    names = [member.name for member in comparison.members][: len(SERIES)]
    for kind in ("subject", "level"):
        counts = group_counts(comparison, kind)
        if 1 < len(counts) <= MAX_GROUPS:
            shares = {group: {name: 100 * right / n for name, (right, n) in of.items()} for group, of in counts.items()}
            plot, entries = quality_by_group(shares, names), [(name, "") for name in names]
            found[f"by_{kind}"] = Panel(title=f"By {kind}", unit=UNIT, plot=plot, entries=entries)
    return found


def group_counts(comparison: Comparison, kind: str) -> dict[str, dict[str, tuple[int, int]]]:
    """By subject or level, then by model: right greedy responses and all."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for member in comparison.members:
        for group, (right, total) in (_scores(member).get(f"by_{kind}") or {}).items():
            found.setdefault(group, {})[member.name] = (right, total)
    return found


def _navigation(comparisons: Sequence[Comparison]) -> str:
    links = [f'<a href="#set-{place}">{escape(one.title)}</a>' for place, one in enumerate(comparisons)]
    return f"<nav>{''.join(links)}</nav>" if len(links) > 1 else ""


def comparison_section(comparison: Comparison, place: int) -> str:
    """Models on one set of questions, the `place`-th of the page."""
    members, names = comparison.members, [member.name for member in comparison.members]
    parts = [
        f'<section id="set-{place}"><h2>{escape(comparison.title)}</h2>',
        headline_table(comparison),
        _notes(comparison),
        panel_grid(list(panels(comparison).values()), f"set-{place}"),
        *(_group_table(comparison, kind) for kind in ("subject", "level")),
        _questions(comparison),
        "<h3>What differs in the models</h3>",
        differing_table([flat(one.document.get("model", {}).get("config", {})) for one in members], names),
        "<h3>What differs in the evaluations</h3>",
        differing_table([_settings(one) for one in members], names),
        "<h3>Environment</h3>",
        _environment(members),
        "</section>",
    ]
    return "\n".join(filter(None, parts))


def headline_table(comparison: Comparison) -> str:
    """A row per model; differences are to the first."""
    heads = ["model", "Pass@1 %", "95 % interval", *COSTS.values(), "difference", "95 % interval", "p"]
    drawn = all(_scores(member, "samples") for member in comparison.members)
    heads += ["mean of drawn %", "difference", "95 % interval"] if drawn else []
    heads += ["cut off %", "tokens"]
    return table(heads, [_headline_row(comparison, member, drawn) for member in comparison.members])


def _headline_row(comparison: Comparison, member: Compared, drawn: bool) -> Row:
    scores, first = _scores(member), member is comparison.members[0]
    costs = member.document.get("model", {}).get("costs", {})
    row = [f"{member.name} ({comparison.role})" if first else member.name, *_quality(scores)]
    row += [scaled(costs[key]) if key in costs else UNKNOWN for key in COSTS]
    row += _difference(member.differences.get("greedy"), with_p=True)
    if drawn:
        row += [_quality(_scores(member, "samples"))[0], *_difference(member.differences.get("drawn"), with_p=False)]
    responses = scores.get("problems", 0) * scores.get("samples", 0)
    row.append(readable(100 * scores["truncated"] / responses) if responses else UNKNOWN)
    row.append(readable(scores["tokens_mean"]) if scores else UNKNOWN)
    return row


def _quality(scores: Mapping[str, Any]) -> Row:
    if not scores:
        return [UNKNOWN, UNKNOWN]
    low, high = scores["interval_95"]
    return [f"{100 * scores['pass_at_1']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]


def _difference(found: Difference | None, *, with_p: bool) -> Row:
    if found is None:
        return [UNKNOWN] * (3 if with_p else 2)
    low, high = found.interval_95
    cells = [_points(found.mean), f"{_points(low)} to {_points(high)}"]
    return [*cells, readable(found.p_value, 2)] if with_p else cells


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)


def _notes(comparison: Comparison) -> str:
    first, *others = comparison.members
    counts = "; ".join(
        f"{other.name}: right on {found.better} questions that {first.name} misses, wrong on {found.worse} that it gets"
        for other in others
        if (found := other.differences.get("greedy"))
    )
    notes = [
        f"Differences are in points, to {first.name}, question by question; p: exact sign test. {counts}.",
        "FLOPs are those of a token that is generated behind 1024 others.",
    ]
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


def _point(member: Compared, key: str) -> Point | None:
    scores, costs = _scores(member), member.document.get("model", {}).get("costs", {})
    if not scores or key not in costs:
        return None
    low, high = scores["interval_95"]
    share = scores["pass_at_1"]
    return Point(name=member.name, cost=costs[key], quality=100 * share, low=100 * low, high=100 * high)


def _group_table(comparison: Comparison, kind: str) -> str:
    counts = group_counts(comparison, kind)
    if not counts:
        return ""
    heads = [kind, "questions", *(f"{one.name}, %" for one in comparison.members)]
    rows = []
    for group, by_name in counts.items():
        cells = [_share(by_name.get(one.name)) for one in comparison.members]
        rows.append([group, str(max(total for _, total in by_name.values())), *cells])
    return f"<h3>By {kind}</h3>\n{table(heads, rows)}"


def _share(count: tuple[int, int] | None) -> str:
    if count is None or count[1] == 0:
        return UNKNOWN
    low, high = wilson_interval(*count)
    return f"{100 * count[0] / count[1]:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _questions(comparison: Comparison) -> str:
    """The questions that the others lost and won most against the first model, with all greedy responses."""
    lost, won = changed_questions(comparison, MAX_QUESTIONS)
    responses = [greedy_responses(member) for member in comparison.members]
    first = comparison.members[0].name
    parts = []
    for title, places in ((f"Worst questions beside {first}", lost), (f"Best questions beside {first}", won)):
        parts.append(f"<h3>{escape(title)}</h3>")
        shown = [_question(comparison, responses, place) for place in places]
        parts.append("\n".join(filter(None, shown)) or (NO_DATA if places else '<p class="hint">none</p>'))
    return "\n".join(parts)


def _question(comparison: Comparison, responses: Sequence[Mapping[int, Any]], place: int) -> str:
    known = next((of[place] for of in responses if place in of), None)
    if known is None:
        return ""
    facts = [f"question {place + 1}", *(str(known[key]) for key in ("subject", "level") if known.get(key))]
    facts.append(f"gold answer {known['gold']}")
    beside = [_response(member, of.get(place)) for member, of in zip(comparison.members, responses, strict=True)]
    return (
        f'<article class="question"><p class="facts">{escape(" · ".join(facts))}</p>'
        f'<p>{escape(cut(known["question"]))}</p><div class="beside">{"".join(beside)}</div></article>'
    )


def _response(member: Compared, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return f"<div><header>{escape(member.name)}</header>{NO_DATA}</div>"
    facts = [member.name, "right" if row["correct"] else "wrong"]
    facts += [f"answer {cut(row['extracted'])}"] if row["extracted"] else [row["status"]]
    facts += [f"{row['tokens']} tokens", *([] if row["ended"] else ["cut off"])]
    return f"<div><header>{escape(' · '.join(facts))}</header><pre>{escape(cut(row['response']))}</pre></div>"


def _settings(member: Compared) -> dict[str, str]:
    return flat({key: value for key, value in member.document["settings"].items() if key not in _NOT_SETTINGS})


def _environment(members: Sequence[Compared]) -> str:
    facts = [flat(one.document.get("versions", {})) for one in members]
    for known, one in zip(facts, members, strict=True):
        known |= {key: str(one.document["settings"].get(key, UNKNOWN)) for key in ("device", "dtype")}
    commands = [folded(f"Settings of {one.name}", json.dumps(one.document["settings"], indent=1)) for one in members]
    return listed_table(facts, [one.name for one in members]) + "".join(commands)


def _scores(member: Compared, part: str = "problems") -> Mapping[str, Any]:
    return (member.document.get("headline") or {}).get(part) or {}
