"""Training runs as one HTML page: side by side, then each with all that it logged."""

from collections.abc import Sequence
from html import escape

from padd_ds.evaluation.comparison import Comparison
from padd_ds.report.comparison_page import comparison_section
from padd_ds.report.differences import differing_table, flat, listed_table
from padd_ds.report.html import Panel, document, panel_grid, table
from padd_ds.report.numbers import UNKNOWN, readable
from padd_ds.report.page import run_section, run_title
from padd_ds.report.panels import CURVES, curve_panel, logged_seconds
from padd_ds.report.source import RunData
from padd_ds.report.svg import SERIES

TOLD = {
    "loss_lm": "language-model loss",
    "loss_kd": "distillation loss",
    "reward": "reward",
    "reward_correct": "correct",
    "response_tokens": "response tokens",
    "router_shift": "router shift",
    "load_max_violation": "load violation",
    "router_entropy_nats": "router entropy",
}
"""Metrics of the table of runs; those that no run has are left out."""


def runs_page(runs: Sequence[RunData], comparisons: Sequence[Comparison] = ()) -> str:
    """The page of runs, which follow the results of models. UserError for a file of a run that cannot be read."""
    title = "Training of " + ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>", _navigation(runs, comparisons)]
    body += [comparison_section(comparison, place) for place, comparison in enumerate(comparisons)]
    body += [_together(runs), *(run_section(run, index) for index, run in enumerate(runs, start=1))]
    return document(title, "\n".join(body))


def shared_panels(runs: Sequence[RunData]) -> list[Panel]:
    """A plot for each metric that several runs have, a line per run: of as many runs as there are colours.

    One that is 0 throughout is left out.
    """
    parts = []
    for curve in CURVES:
        for metric, name in curve.metrics.items():
            found = {run.name: run.series(metric) for run in runs[: len(SERIES)]}
            series = {run: one for run, one in found.items() if one is not None}
            title = curve.title if len(curve.metrics) == 1 else f"{curve.title}: {name}"
            if len(series) > 1 and any(one.values.any() for one in series.values()):
                parts.append(curve_panel(curve, title, series, runs[0]))
    return parts


def _navigation(runs: Sequence[RunData], comparisons: Sequence[Comparison]) -> str:
    places = [(f"set-{place}", one.title) for place, one in enumerate(comparisons)]
    places += [("runs", "Runs"), *((f"run-{index}", run_title(run)) for index, run in enumerate(runs, start=1))]
    links = [f'<a href="#{key}">{escape(name)}</a>' for key, name in places]
    return f"<nav>{''.join(links)}</nav>"


def _together(runs: Sequence[RunData]) -> str:
    parts = ['<section id="runs"><h2>Runs</h2>', _runs_table(runs)]
    parts.append('<p class="hint">Metrics: mean of the last tenth of the logged steps.</p>')
    if len(runs) > 1:
        names = [run.name for run in runs]
        drawn = "" if len(runs) <= len(SERIES) else f" Of the first {len(SERIES)} runs."
        parts += [
            "<h3>Training, side by side</h3>",
            f'<p class="hint">Beside a name: mean of the first tenth of the steps → mean of the last tenth.{drawn}</p>',
            panel_grid(shared_panels(runs), "runs"),
            "<h3>What differs in the configurations</h3>",
            differing_table([flat(run.settings) for run in runs], names),
            "<h3>Environment</h3>",
            listed_table([flat(run.surroundings) for run in runs], names),
        ]
    return "\n".join([*parts, "</section>"])


def _runs_table(runs: Sequence[RunData]) -> str:
    told = {metric: name for metric, name in TOLD.items() if any(run.series(metric) for run in runs)}
    heads = ["run", "stage", "last step", "seconds", *told.values()]
    return table(heads, [_row(run, list(told)) for run in runs])


def _row(run: RunData, metrics: Sequence[str]) -> list[str]:
    last = str(run.metrics[-1]["step"]) if run.metrics else UNKNOWN
    seconds = logged_seconds(run)
    found = [run.series(metric) for metric in metrics]
    values = [UNKNOWN if one is None or not len(one.values) else readable(one.last) for one in found]
    return [run.name, run.stage, last, readable(seconds) if seconds else UNKNOWN, *values]
