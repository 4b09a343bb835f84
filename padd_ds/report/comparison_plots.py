"""The plots of a comparison, each drawn into axes for the page and for a file of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from padd_ds.report.numbers import readable, scaled
from padd_ds.report.svg import Palette, Plot, plain

_GROUP_PX, _BASE_PX = 32, 60
_MAX_NAME = 30
_LOG_FROM = 10
"""Where the largest cost is this many times the smallest, its axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model; quality and its interval in per cent."""

    name: str
    cost: float
    quality: float
    low: float
    high: float


def quality_over_cost(points: Sequence[Point], cost: str) -> Plot:
    """Quality with its interval over `cost`; the first point, the teacher's, say, is a square."""

    def draw(axes: Axes, palette: Palette) -> None:
        for place, point in enumerate(points):
            colour, mark = palette.series[min(place, len(palette.series) - 1)], "o" if place else "s"
            error = [[point.quality - point.low], [point.high - point.quality]]
            axes.errorbar(
                [point.cost], [point.quality], yerr=error, fmt=mark, color=colour, markersize=5, linewidth=1.4
            )
        _label(axes, points)
        costs = [point.cost for point in points]
        if max(costs) > _LOG_FROM * min(costs) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.margins(x=0.25, y=0.2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value, 4)))
        axes.set_xlabel(cost, labelpad=2)
        axes.set_ylabel("Pass@1, %")
        axes.grid(axis="y")
        axes.set_axisbelow(True)

    return Plot(draw=draw)


def quality_by_group(shares: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Plot:
    """A row of dots per group: per cent of right responses of each of `names`, which follow the series' colours."""

    def draw(axes: Axes, palette: Palette) -> None:
        for place, name in enumerate(names):
            rows = [(row, group[name]) for row, group in enumerate(shares.values()) if name in group]
            heights = [row + 0.1 * (place - (len(names) - 1) / 2) for row, _ in rows]
            axes.plot(
                [share for _, share in rows],
                heights,
                "o",
                color=palette.series[place],
                markersize=4.5,
                label=_short(name),
            )
        for row, group in enumerate(shares):
            axes.annotate(_short(group), (0, row - 0.42), va="center", fontsize=8.5)
        axes.set_yticks([])
        axes.set_ylim(len(shares) - 0.5, -0.75)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("right, %", labelpad=2)
        axes.grid(axis="x")
        axes.set_axisbelow(True)

    return Plot(draw=draw, height_px=_BASE_PX + _GROUP_PX * len(shares))


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Names above and below the intervals by turns, farther off every other time, so that neighbours stay apart."""
    middle = sum(point.cost for point in points) / len(points)
    for place, point in enumerate(sorted(points, key=lambda one: one.cost)):
        above, farther = place % 2 == 0, place % 4 > 1
        offset = 14 if farther else 4
        axes.annotate(
            _short(point.name),
            (point.cost, point.high if above else point.low),
            xytext=(0, offset if above else -offset),
            textcoords="offset points",
            ha="right" if point.cost > middle else "left",
            va="bottom" if above else "top",
            fontsize=8.5,
        )


def _short(text: str) -> str:
    """Cut, and without what matplotlib would take for a formula."""
    return plain(text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 1] + "…")
