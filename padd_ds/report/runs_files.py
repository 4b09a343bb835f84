"""The plots and numbers of training runs as files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from padd_ds.report.html import save_panels
from padd_ds.report.panels import training_panels
from padd_ds.report.routing_panels import routing_panels
from padd_ds.report.rows import write_rows
from padd_ds.report.runs_page import shared_panels
from padd_ds.report.source import RunData

DISTRIBUTION = ("router_shift_edges", "router_shift_counts")
"""Neither per layer nor per expert."""


def write_runs_files(folder: Path, runs: Sequence[RunData]) -> None:
    """Into `folder`, with a numbered folder of plots, SVG and PNG, for each run, and for several together.

    metrics.csv: a row per run and logged step. layers.csv: per run, logged step and layer. experts.csv: per run,
    layer and expert, of the last logged step.
    """
    write_rows(folder / "metrics.csv", ({"run": run.name, **line} for run in runs for line in run.metrics))
    write_rows(folder / "layers.csv", (row for run in runs for record in run.routing for row in _layers(run, record)))
    write_rows(folder / "experts.csv", (row for run in runs if run.routing for row in _experts(run, run.routing[-1])))
    for number, run in enumerate(runs, start=1):
        save_panels(folder / f"run_{number}", [*training_panels(run), *routing_panels(run)])
    if len(runs) > 1:
        save_panels(folder / "side_by_side", shared_panels(runs))


def _layers(run: RunData, record: dict[str, Any]) -> Iterable[dict[str, Any]]:
    values = {name: of for name, of in _lists(record).items() if not isinstance(of[0], list)}
    n_layers = max(map(len, values.values()), default=0)
    for layer in range(n_layers):
        yield _place(run, record) | {"layer": layer} | {name: of[layer] for name, of in values.items()}


def _experts(run: RunData, record: dict[str, Any]) -> Iterable[dict[str, Any]]:
    n_layers, n_experts = len(record["load_share"]), len(record["load_share"][0])
    values = {name: of for name, of in _lists(record).items() if isinstance(of[0], list)}
    for layer in range(n_layers):
        for expert in range(n_experts):
            found = {name: of[layer][expert] for name, of in values.items()}
            yield _place(run, record) | {"layer": layer, "expert": expert} | found


def _place(run: RunData, record: dict[str, Any]) -> dict[str, Any]:
    return {"run": run.name, "step": record["step"]}


def _lists(record: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: of for name, of in record.items() if isinstance(of, list) and name not in DISTRIBUTION}
