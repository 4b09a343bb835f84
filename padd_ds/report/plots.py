"""The kinds of plots in a report, each from numbers.

Legend: L layers, E experts, R records over time.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from padd_ds.report.numbers import power_of_ten, readable
from padd_ds.report.source import Series
from padd_ds.report.svg import Palette, Plot, plain

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
    series: Mapping[str, Series],
    *,
    log: bool = False,
    from_zero: bool = False,
    reference: float | None = None,
    across: str = "step",
) -> Plot:
    """Named values over steps (or what `across` names): each logged step thin, their running mean thick.

    A log axis shows the values above 0, and there must be one. `from_zero` starts the value axis at 0;
    `reference` is a dashed level.
    """

    def draw(axes: Axes, palette: Palette) -> None:
        for (name, one), colour in zip(series.items(), palette.series, strict=False):
            _curve(axes, one, colour, plain(name))
        if reference is not None:
            axes.axhline(reference, color=palette.ink, linewidth=0.8, linestyle=(0, (4, 3)))
        _step_axis(axes, across)
        _value_axis(axes, log, from_zero)

    return Plot(draw=draw)


def stacked_bars(series: Mapping[str, Series]) -> Plot:
    """One bar per step (or block of steps, with means), the series on top of each other; same steps in all."""

    def draw(axes: Axes, palette: Palette) -> None:
        steps = block_means(next(iter(series.values())).steps, MAX_BARS)
        width = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
        bottom = np.zeros(len(steps))
        for (name, one), colour in zip(series.items(), palette.series, strict=False):
            heights = block_means(one.values, MAX_BARS)
            axes.bar(steps, heights, width * _BAR_WIDTH, bottom, color=colour, linewidth=0, label=plain(name))
            bottom += heights
        _step_axis(axes)
        _value_axis(axes, log=False, from_zero=True)

    return Plot(draw=draw)


def distribution(edges: Sequence[float], counts: Mapping[str, Sequence[float]], across: str) -> Plot:
    """Shares below each of the growing `edges`, on a logarithmic axis that `across` names; a line per list of counts.

    Counts are of values below the first edge, between two neighbours, and above the last.
    """

    def draw(axes: Axes, palette: Palette) -> None:
        for (name, one), colour in zip(counts.items(), palette.series, strict=False):
            below = np.cumsum(np.array(one, dtype=float))
            shares = below[:-1] / max(below[-1], 1.0)
            axes.step(edges, shares, where="mid", color=colour, linewidth=1.8, label=plain(name))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(math.log10(value)))))
        axes.set_xlabel(across, labelpad=2)
        _value_axis(axes, log=False, from_zero=False)
        axes.set_ylim(-0.02, 1.02)

    return Plot(draw=draw)


def expert_map(values_LE: np.ndarray, limit: float, first_layer: int = 0) -> Plot:
    """Cells by layer (the first of them on top) and expert: orange above 0, blue below, full colour at +-limit."""
    return _expert_cells(values_LE, limit, "layer", "expert", _map_height_px(len(values_LE)), first_layer)


def pair_map(values_EE: np.ndarray, limit: float) -> Plot:
    """Cells by expert and expert, coloured as those of `expert_map`."""
    return _expert_cells(values_EE, limit, "expert", "other expert", _PAIR_MAP_PX)


def layers_over_steps(
    steps_R: Sequence[int], values_RL: np.ndarray, limit: float, across: str = "step", first_layer: int = 0
) -> Plot:
    """Cells by record (of a step, or of what `across` names) and layer: no colour at 0, full colour at `limit`."""
    n_records, n_layers = values_RL.shape

    def draw(axes: Axes, palette: Palette) -> None:
        _cells(axes, palette, values_RL.T / limit, (-0.5, n_records - 0.5), first_row=first_layer)
        # records need not be evenly spaced in steps, so each column is labelled by its own step
        ticks = np.unique(np.linspace(0, n_records - 1, min(n_records, 6)).round().astype(int))
        axes.set_xticks(ticks, [str(steps_R[tick]) for tick in ticks])
        axes.set_xlabel(across, labelpad=2)

    return Plot(draw=draw, height_px=_map_height_px(n_layers))


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


def _curve(axes: Axes, series: Series, colour: str, name: str) -> None:
    steps, values = block_means(series.steps, MAX_POINTS), block_means(series.values, MAX_POINTS)
    if len(steps) < _SMOOTHED_FROM:
        marker = "o" if len(steps) <= _MARKED_UP_TO else None
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4, label=name)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.45)
    axes.plot(steps, running_mean(values, 2 * (len(values) // 24) + 1), color=colour, linewidth=2.0, label=name)


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


def _expert_cells(
    values: np.ndarray, limit: float, rows: str, columns: str, height_px: int, first_row: int = 0
) -> Plot:
    def draw(axes: Axes, palette: Palette) -> None:
        _cells(axes, palette, values / limit, (-0.5, values.shape[1] - 0.5), rows, first_row)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_STEPS, integer=True))
        axes.set_xlabel(columns, labelpad=2)

    return Plot(draw=draw, height_px=height_px)


def _cells(
    axes: Axes,
    palette: Palette,
    values: np.ndarray,
    columns: tuple[float, float],
    rows: str = "layer",
    first_row: int = 0,
) -> None:
    """An image with the first of `rows` on top; strength as opacity, so that the page's background is neutral."""
    n_rows = len(values)
    strength = np.nan_to_num(np.clip(np.abs(values), 0, 1))
    colours = np.where((values >= 0)[..., None], _ABOVE, _BELOW)
    extent = (*columns, first_row + n_rows - 0.5, first_row - 0.5)
    axes.imshow(np.dstack([colours, strength]), aspect="auto", interpolation="none", extent=extent)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(palette.grid)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS, integer=True))
    axes.set_ylabel(rows)


def _map_height_px(n_layers: int) -> int:
    return min(max(_MAP_BASE_PX + _MAP_ROW_PX * n_layers, 120), _MAP_LARGEST_PX)
