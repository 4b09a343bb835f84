"""The pictures of docs/results.md, as SVG files."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from tools.experiment.statistics import Estimate

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "padd",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WINDOW = 9
"""Steps that a curve is averaged over."""


def bars_figure(path: Path, bars: dict[str, Estimate], reference: str | None) -> None:
    """Means with intervals, in percent, from top to bottom; a dashed line at the one named `reference`."""
    with rc_context(RC):
        figure = Figure(figsize=(6.4, 0.6 + 0.28 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        for row, estimate in enumerate(bars.values()):
            low, high = estimate.mean - estimate.low, estimate.high - estimate.mean
            axes.errorbar(
                100 * estimate.mean, row, xerr=[[100 * low], [100 * high]], fmt="o", color="#2f7fc4", capsize=3
            )
        if reference in bars:
            axes.axvline(100 * bars[reference].mean, color="#888888", linestyle=(0, (4, 3)), linewidth=0.8)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlabel("greedy Pass@1, %")
        axes.grid(axis="x", linewidth=0.4)
        save(figure, path)


def cost_figure(path: Path, rows: dict[str, list[tuple[float, Estimate]]]) -> None:
    """Pass@1 in percent over active parameters in millions: a line per row, a point with its interval per shape."""
    with rc_context(RC):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for title, points in rows.items():
            ordered = sorted(points, key=lambda point: point[0])
            millions = [active for active, _ in ordered]
            means = [100 * estimate.mean for _, estimate in ordered]
            below = [100 * (estimate.mean - estimate.low) for _, estimate in ordered]
            axes.errorbar(millions, means, yerr=below, label=title, fmt="o-", markersize=4, linewidth=1.2, capsize=3)
        axes.set_xlabel("active parameters, millions")
        axes.set_ylabel("greedy Pass@1, %")
        axes.grid(linewidth=0.4)
        axes.legend(fontsize=8, frameon=False)
        save(figure, path)


def curves_figure(path: Path, curves: dict[str, list[float]], label: str) -> None:
    """Values over rollouts, each the mean of up to WINDOW steps around it."""
    with rc_context(RC):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for title, values in curves.items():
            axes.plot(smoothed(values), label=title, linewidth=1.4)
        axes.set_xlabel("rollout")
        axes.set_ylabel(label)
        axes.grid(axis="y", linewidth=0.4)
        axes.legend(fontsize=8, frameon=False, ncols=2)
        save(figure, path)


def smoothed(values: list[float]) -> list[float]:
    half = WINDOW // 2
    windows = (values[max(0, step - half) : step + half + 1] for step in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def save(figure: Figure, path: Path) -> None:
    """Without date, so that the same numbers give the same bytes; on white, as pages may be dark."""
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
