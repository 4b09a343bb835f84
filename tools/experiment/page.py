"""docs/results.md: tables and plots from the results of cells, and from nothing else."""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from padd_ds.errors import UserError
from padd_ds.files import write_text_whole
from tools.experiment.cell import Cell
from tools.experiment.figures import bars_figure, cost_figure, curves_figure
from tools.experiment.result import Result, current_results
from tools.experiment.search import search_section
from tools.experiment.settings import ABLATIONS, CHOICES, IDEAS, METHODS, SHAPES, STUDENTS, Scale, Shape
from tools.experiment.statistics import Estimate, over_seeds, paired_over_questions, pooled

Group = list[Result]
"""Results of one row, one per seed, in the order of seeds."""

TITLES = {
    "teacher-sft": "Teacher, before GRPO",
    "teacher": "**Teacher (GRPO)**",
    "converted": "Base: the converted student",
    "sft": "the same after SFT",
    "warmed-up": "the same after Stage I b",
    "sft-responses": "Base after SFT on the demonstrations and the teacher's right responses",
    "dense-narrowed": "dense of that active size, cut",
    "dense-sft": "the same after SFT",
    "dense-sft-responses": "dense, cut, after SFT on the demonstrations and the teacher's right responses",
    "dense-grpo": "Dense-GRPO",
    "vanilla-grpo": "Vanilla-GRPO",
    "gspo": "GSPO",
    "rspo": "RSPO",
    "online-kd": "Online KD",
    "padd": "**PADD**",
    "without-i": "w/o I: random experts and router, no warm-up",
    "without-i-b": "w/o I b: no warm-up",
    "without-i-teacher": "w/o the teacher in I b: SFT on the demonstrations",
    "without-responses": "w/o the teacher's responses in I b",
    "without-ii": "w/o II: fixed temperature",
    "without-kd": "w/o II and KD",
    "without-iii": "w/o III: plain GRPO",
    "without-iv": "w/o IV: auxiliary-loss balancing",
    "without-ii-iii-iv": "I alone, then Vanilla-GRPO",
    "responses-alone": "SFT on the demonstrations and the teacher's right responses, then Vanilla-GRPO",
}
MAIN_ROWS = (
    *("teacher-sft", "teacher", "converted", "sft", "warmed-up"),
    *("dense-narrowed", "dense-sft", "dense-sft-responses", "dense-grpo"),
)
CURVES_SHOWN = (
    ("reward_correct", "right answers in rollouts"),
    ("load_max_violation", "load violation"),
    ("router_shift", "router shift within a rollout's updates"),
)
OVERVIEW = (
    *("student", "decoding", "seeds", "Teacher (GRPO)", "Vanilla-GRPO", "PADD"),
    *("ahead of Vanilla-GRPO", "of the teacher", "of the best baseline"),
)
OVERVIEW_ROWS = ("teacher", "vanilla-grpo", "padd")
PROVENANCE = """`{work}` is the folder of all cells, `{here}` that of the row's cell. A commit with a + had changes
that were not committed. `python tools/repro.py --only CELL --verify` makes a cell again and compares."""
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "experiment.md"
HEAD = """# Results

Made by `make {target}` (`python tools/repro.py --scale {scale}`) from the files under `results/{results}`; no number
is typed by hand. What the experiment is, and how to read it, stands in [experiment.md]({guide}). {done} of {total}
cells are there.

Greedy Pass@1 in percent with the 95 % interval over the questions of these seeds; *sampled*: mean of several responses
at temperature 1. *PADD ahead by*: PADD minus the row, question by question, with its 95 % interval over questions, and
the two-sided p of a paired t-test over seeds. *active*: parameters that a token passes through, of all that are held.
*shift*: mean router shift since the student that the stage began with; *load*: maximal violation on the test problems'
solutions.
"""


def write_page(path: Path, results: Path, cells: list[Cell], scale: Scale, name: str = "full") -> None:
    """The page and its figures, in a folder beside it; UserError while there is nothing to show."""
    there = current_results(results, cells)
    if not there:
        raise UserError(f"{results}: holds no result of these cells; run them first")
    target = "repro" if name == "full" else f"repro-{name}"
    guide = os.path.relpath(GUIDE, path.absolute().parent)
    counts = {"done": len(there), "total": len(cells)}
    parts = [HEAD.format(target=target, scale=name, results=results.name, guide=guide, **counts)]
    figures = path.with_name(path.stem)
    figures.mkdir(parents=True, exist_ok=True)
    tables = {shape: main_rows(there, shape, seeds) for shape, seeds in scale.seeds.items()}
    tables = {shape: rows for shape, rows in tables.items() if "padd" in rows}
    if tables:
        parts.append(overview(tables, figures))
    for shape, rows in tables.items():
        parts.append(f"## {headline(SHAPES[shape])}\n\n{table(rows, rows['padd'])}")
        parts.append(figures_of(rows, figures, shape))
    rows = part_rows(there, scale.shapes[0])
    if rows and scale.shapes[0] in tables:
        padd = tables[scale.shapes[0]]["padd"]
        parts.append(f"## PADD without its parts, and with other Choices ({SHAPES[scale.shapes[0]].title})\n")
        parts.append(table({"padd": padd} | rows, padd))
    for shape in scale.searched:
        candidates = [one for one in there.values() if (one["kind"], one.get("shape")) == ("search", shape)]
        if candidates:
            parts.append(search_section(candidates, TITLES))
    parts.append(provenance(there))
    write_text_whole(path, "\n\n".join(part.rstrip() for part in parts) + "\n")


def headline(shape: Shape) -> str:
    return shape.title[0].upper() + shape.title[1:]


def main_rows(there: dict[str, Result], shape: str, seeds: Sequence[int]) -> dict[str, Group]:
    """Groups of the main table of a shape, by the keys of TITLES, in its order; `seeds`: those of the shape."""
    rows: dict[str, Group] = defaultdict(list)
    for result in there.values():
        kind, method = result["kind"], result.get("method")
        if result.get("shape", shape) == shape and result["seed"] in seeds:
            if method in METHODS or method == "dense-grpo":
                rows[method].append(result)
            elif kind in MAIN_ROWS:
                rows[kind].append(result)
    return {name: in_order(rows[name]) for name in (*MAIN_ROWS, *METHODS) if name in rows}


def part_rows(there: dict[str, Result], shape: str) -> dict[str, Group]:
    """Groups of the ablations, Choices and other students."""
    rows: dict[str, Group] = defaultdict(list)
    for result in there.values():
        if result.get("shape") == shape and result["kind"] == "joint":
            rows[result["method"]].append(result)
    names = (*ABLATIONS, *CHOICES, *STUDENTS, *IDEAS)
    return {name: in_order(rows[name]) for name in names if name in rows}


def in_order(group: Group) -> Group:
    return sorted(group, key=lambda result: result["seed"])


def overview(tables: dict[str, dict[str, Group]], figures: Path) -> str:
    """PADD beside the teacher, Vanilla-GRPO and the best baseline, for every shape; and the main rows as points."""
    lines = [f"| {' | '.join(OVERVIEW)} |", "|---" * len(OVERVIEW) + "|"]
    points: dict[str, dict[str, tuple[float, Estimate]]] = defaultdict(dict)
    for shape, rows in tables.items():
        lines += [overview_line(shape, rows, decoding) for decoding in SCORES]
        for name in ("teacher", "dense-grpo", "vanilla-grpo", "online-kd", "padd"):
            if name in rows:
                points[TITLES[name].strip("*")][shape] = (active_millions(rows[name]), pooled_scores(rows[name]))
    cost_figure(figures / "cost.svg", {title: list(of.values()) for title, of in points.items()})
    return "\n".join(["## Overview", "", *lines, "", f"![Pass@1 and active parameters]({figures.name}/cost.svg)"])


def overview_line(shape: str, rows: dict[str, Group], decoding: str) -> str:
    """Scores of the main rows of a shape, over the seeds that PADD has, and PADD's leads."""
    padd, score = rows["padd"], SCORES[decoding]
    seeds = [result["seed"] for result in padd]
    rows = {name: [result for result in group if result["seed"] in seeds] for name, group in rows.items()}
    scores = {name: pooled_scores(group, score) for name, group in rows.items() if group}
    baselines = [name for name in ("dense-grpo", *METHODS) if name in scores and name != "padd"]
    best = max(baselines, key=lambda name: scores[name].mean, default=None)
    cells = [headline(SHAPES[shape]), decoding, ", ".join(map(str, seeds))]
    cells += [shown(scores[name]) if name in scores else "" for name in OVERVIEW_ROWS]
    cells += [ahead(rows[name], padd, score) if name in scores else "" for name in ("vanilla-grpo", "teacher")]
    cells.append(f"{TITLES[best]}: {ahead(rows[best], padd, score)}" if best else "")
    return f"| {' | '.join(cells)} |"


def active_millions(group: Group) -> float:
    """Active parameters, in millions."""
    return group[0]["cost"]["active_parameters"] / 1e6


def greedy(result: Result) -> list[float]:
    """1 for each question that the greedy response answers."""
    return [float(verdict) for verdict in result["greedy"]]


def sampled(result: Result) -> list[float]:
    """The share of right ones among the sampled responses to each question."""
    return [int(count) / result["headline"]["samples"]["samples"] for count in result["sampled"]]


Score = Callable[[Result], list[float]]
SCORES: dict[str, Score] = {"greedy": greedy, "sampled": sampled}


def pooled_scores(group: Group, score: Score = greedy) -> Estimate:
    return pooled([score(result) for result in group])


def table(rows: dict[str, Group], padd: Group) -> str:
    """A markdown table, a row per group."""
    head = "| | seeds | active, M | Pass@1 | sampled | PADD ahead by | shift | NMI | ESI | load | minutes |"
    lines = [head, "|---" * 11 + "|"]
    lines += [f"| {' | '.join(row_cells(name, group, padd))} |" for name, group in rows.items()]
    return "\n".join(lines)


def row_cells(name: str, group: Group, padd: Group) -> list[str]:
    samples = mean_of(group, lambda result: 100 * result["headline"]["samples"]["pass_at_1"])
    routing = [
        mean_of(group, lambda result, key=key: (result["headline"]["routing"] or {}).get(key), digits)  # type: ignore[misc]
        for key, digits in (("shift", 5), ("nmi", 4), ("esi_nats", 4), ("max_violation", 2))
    ]
    minutes = mean_of(group, lambda result: result["seconds"] / 60)
    seeds = ", ".join(str(result["seed"]) for result in group)
    cost = group[0]["cost"]
    active = f"{active_millions(group):.3g} of {cost['total_parameters'] / 1e6:.3g}"
    estimate = shown(pooled_scores(group))
    return [TITLES.get(name, name), seeds, active, estimate, samples, ahead(group, padd), *routing, minutes]


def ahead(group: Group, padd: Group, score: Score = greedy) -> str:
    """How far PADD is in front, over the seeds that both have."""
    pairs = [(one, other) for one in padd for other in group if one["seed"] == other["seed"]]
    if not pairs or group is padd or any(one is other for one, other in pairs):
        return ""
    left, right = [score(one) for one, _ in pairs], [score(other) for _, other in pairs]
    questions = paired_over_questions(left, right)
    text = f"{100 * questions.mean:+.1f} ({100 * questions.low:+.1f} to {100 * questions.high:+.1f})"
    if len(pairs) > 1:
        means = [sum(a) / len(a) - sum(b) / len(b) for a, b in zip(left, right, strict=True)]
        p_value = over_seeds(means).p_value
        assert p_value is not None  # there are several seeds
        text += f", p {p_value:.3f}" if p_value >= 0.001 else ", p < 0.001"
    return text


def shown(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def mean_of(group: Group, value: Callable[[Result], float | None], digits: int = 1) -> str:
    values = [value(result) for result in group]
    known = [one for one in values if one is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else ""


def figures_of(rows: dict[str, Group], folder: Path, shape: str) -> str:
    """Pass@1 as bars, and curves of reward, load and shift from the rollout before, as files beside the page."""
    bars = {name: pooled_scores(group) for name, group in rows.items()}
    titles = {name: TITLES[name].strip("*") for name in rows}
    bars_figure(folder / f"{shape}-pass.svg", {titles[name]: bar for name, bar in bars.items()}, titles.get("teacher"))
    trained = {titles[name]: rows[name] for name in (*METHODS, "dense-grpo") if name in rows}
    lines = [f"![Greedy Pass@1, {shape}]({folder.name}/{shape}-pass.svg)"]
    for key, label in CURVES_SHOWN:
        curves = {title: mean_curve(group, key) for title, group in trained.items()}
        curves_figure(folder / f"{shape}-{key}.svg", {t: c for t, c in curves.items() if c}, label)
        lines.append(f"![{label}, {shape}]({folder.name}/{shape}-{key}.svg)")
    return "\n".join(lines)


def mean_curve(group: Group, key: str) -> list[float]:
    """Mean over seeds of a curve; empty where a run does not have it."""
    curves = [result["curves"].get(key, []) for result in group]
    if not all(curves):
        return []
    return [sum(step) / len(step) for step in zip(*curves, strict=False)]


def provenance(there: dict[str, Result]) -> str:
    """The commands of one cell for every row, with the seeds and commits of all."""
    rows: dict[str, Group] = defaultdict(list)
    for result in there.values():
        row = result.get("row") or result.get("method") or result["kind"]
        rows[f"{result['kind']} {result.get('shape', '')} {row}"].append(result)
    lines = ["## Commands", "", PROVENANCE]
    for group in rows.values():
        seeds = ", ".join(str(seed) for seed in sorted({result["seed"] for result in group}))
        commits = ", ".join(sorted({result["commit"] for result in group}))
        commands = [command_line(command) for command in group[0]["commands"]]
        lines += ["", f"`{group[0]['cell']}`, seeds {seeds}, commits {commits}:", "", "```", *commands, "```"]
    return "\n".join(lines)


def command_line(command: Sequence[str]) -> str:
    return " ".join(f"'{word}'" if any(sign in word for sign in " #$(") else word for word in command)
