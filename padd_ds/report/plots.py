"""The kinds of plots in a report, each from numbers to an <svg> element.

Legend: L layers, E experts, R records over time.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from padd_ds.report.numbers import power_of_ten, readable
from padd_ds.report.source import Series
from padd_ds.report.svg import GRID, INK, SERIES, drawing

MAX_POINTS = 300
"""A longer curve is drawn as means over that many blocks of steps."""
MAX_BARS = 60
_BAR_WIDTH = 0.75
_STEPS = (1, 2, 2.5, 5, 10)
_SMOOTHED_FROM = 30
_MARKED_UP_TO = 12
_ABOVE, _BELOW = to_rgb("#d9711c"), to_rgb("#2f7fc4")
_MAP_BASE_PX, _MAP_ROW_PX, _MAP_LARGEST_PX = 45, 8, 330
_PAIR_MAP_PX = 300


def curves(
    label: str,
    key: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    from_zero: bool = False,
    reference: float | None = None,
    across: str = "step",
) -> str:
    """Values over steps (or what `across` names): each logged step thin, their running mean thick.

    A log axis shows the values above 0, and there must be one. `from_zero` starts the value axis at 0;
    `reference` is a dashed level.
    """
    with drawing(label, key) as result:
        axes = result.axes
        for one, colour in zip(series, SERIES, strict=False):
            _curve(axes, one, colour)
        if reference is not None:
            axes.axhline(reference, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        _step_axis(axes, across)
        _value_axis(axes, log, from_zero)
    return result.svg


def stacked_bars(label: str, key: str, series: Sequence[Series]) -> str:
    """One bar per step (or block of steps, with means), the series on top of each other; same steps in all."""
    with drawing(label, key) as result:
        axes = result.axes
        steps = block_means(series[0].steps, MAX_BARS)
        width = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
        bottom = np.zeros(len(steps))
        for one, colour in zip(series, SERIES, strict=False):
            heights = block_means(one.values, MAX_BARS)
            axes.bar(steps, heights, width * _BAR_WIDTH, bottom, color=colour, linewidth=0)
            bottom += heights
        _step_axis(axes)
        _value_axis(axes, log=False, from_zero=True)
    return result.svg


def distribution(label: str, key: str, edges: Sequence[float], counts: Sequence[Sequence[float]], name: str) -> str:
    """Shares below each of the growing `edges`, on a logarithmic axis called `name`; a line per list of counts.

    Counts are of values below the first edge, between two neighbours, and above the last.
    """
    with drawing(label, key) as result:
        axes = result.axes
        for one, colour in zip(counts, SERIES, strict=False):
            below = np.cumsum(np.array(one, dtype=float))
            axes.step(edges, below[:-1] / max(below[-1], 1.0), where="mid", color=colour, linewidth=1.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(math.log10(value)))))
        axes.set_xlabel(name, labelpad=2)
        _value_axis(axes, log=False, from_zero=False)
        axes.set_ylim(-0.02, 1.02)
    return result.svg


def expert_map(label: str, key: str, values_LE: np.ndarray, limit: float, first_layer: int = 0) -> str:
    """Cells by layer (the first of them on top) and expert: orange above 0, blue below, full colour at +-limit."""
    n_layers, n_experts = values_LE.shape
    with drawing(label, key, _map_height_px(n_layers)) as result:
        axes = result.axes
        _cells(axes, values_LE / limit, (-0.5, n_experts - 0.5), first_row=first_layer)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_STEPS, integer=True))
        axes.set_xlabel("expert", labelpad=2)
    return result.svg


def pair_map(label: str, key: str, values_EE: np.ndarray, limit: float) -> str:
    """Cells by expert and expert, coloured as those of `expert_map`."""
    with drawing(label, key, _PAIR_MAP_PX) as result:
        axes = result.axes
        _cells(axes, values_EE / limit, (-0.5, values_EE.shape[1] - 0.5), rows="expert")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_STEPS, integer=True))
        axes.set_xlabel("other expert", labelpad=2)
    return result.svg


def layers_over_steps(label: str, key: str, steps_R: Sequence[int], values_RL: np.ndarray, limit: float) -> str:
    """Cells by record and layer: no colour at 0, full colour at `limit`."""
    n_records, n_layers = values_RL.shape
    with drawing(label, key, _map_height_px(n_layers)) as result:
        axes = result.axes
        _cells(axes, values_RL.T / limit, (-0.5, n_records - 0.5))
        # records need not be evenly spaced in steps, so each column is labelled by its own step
        ticks = np.unique(np.linspace(0, n_records - 1, min(n_records, 6)).round().astype(int))
        axes.set_xticks(ticks, [str(steps_R[tick]) for tick in ticks])
        axes.set_xlabel("step", labelpad=2)
    return result.svg


def block_means(values: np.ndarray, most: int) -> np.ndarray:
    """The values, or if they are more than `most`, the means of as many neighbours each as it takes."""
    if len(values) <= most:
        return values
    size = math.ceil(len(values) / most)
    return np.array([values[start : start + size].mean() for start in range(0, len(values), size)])


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` (odd) values around each; fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def _curve(axes: Axes, series: Series, colour: str) -> None:
    steps, values = block_means(series.steps, MAX_POINTS), block_means(series.values, MAX_POINTS)
    if len(steps) < _SMOOTHED_FROM:
        marker = "o" if len(steps) <= _MARKED_UP_TO else None
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.45)
    axes.plot(steps, running_mean(values, 2 * (len(values) // 24) + 1), color=colour, linewidth=2.0)


def _step_axis(axes: Axes, name: str = "step") -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value, 6)))
    axes.set_xlabel(name, labelpad=2)


def _value_axis(axes: Axes, log: bool, from_zero: bool) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if log:
        _log_axis(axes)
        return
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value, 4)))
    _widen_a_flat_axis(axes)
    highest = axes.get_ylim()[1]
    if from_zero and highest > 0:
        axes.set_ylim(0, 1.05 * highest)


def _log_axis(axes: Axes) -> None:
    """Whole decades, so that at least two powers of ten are labelled."""
    axes.set_yscale("log", nonpositive="mask")
    low, high = math.floor(math.log10(axes.dataLim.minposy)), math.ceil(math.log10(axes.dataLim.ymax))
    axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(math.log10(value)))))


def _widen_a_flat_axis(axes: Axes) -> None:
    """A curve that hardly moves is shown as flat instead of its rounding noise at full height."""
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    least = max(abs(middle) * 0.01, 1e-12)
    if high - low < least:
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _cells(
    axes: Axes, values: np.ndarray, columns: tuple[float, float], rows: str = "layer", first_row: int = 0
) -> None:
    """An image with the first of `rows` on top; strength as opacity, so that the page's background is neutral."""
    n_rows = len(values)
    strength = np.nan_to_num(np.clip(np.abs(values), 0, 1))
    colours = np.where((values >= 0)[..., None], _ABOVE, _BELOW)
    extent = (*columns, first_row + n_rows - 0.5, first_row - 0.5)
    axes.imshow(np.dstack([colours, strength]), aspect="auto", interpolation="none", extent=extent)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(GRID)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS, integer=True))
    axes.set_ylabel(rows)


def _map_height_px(n_layers: int) -> int:
    return min(max(_MAP_BASE_PX + _MAP_ROW_PX * n_layers, 120), _MAP_LARGEST_PX)
