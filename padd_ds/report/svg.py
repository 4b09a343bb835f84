"""Matplotlib figures as SVG that takes its colours from the page.

Colours are written as marker values and replaced by CSS variables, so that one drawing fits light and dark.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#000001"
GRID = "#000002"
SERIES = ("#000011", "#000012", "#000013", "#000014")
"""Markers of the series' colours, by position."""


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The colours of a drawing."""

    ink: str
    grid: str
    series: tuple[str, ...]


Draw = Callable[[Axes, Palette], None]
PAGE = Palette(ink=INK, grid=GRID, series=SERIES)
"""Markers, for a drawing that is part of a page."""
PRINT = Palette(ink="#1d2126", grid="#c9ced4", series=("#2166ac", "#c9580c", "#2a8a5b", "#8a4fb0"))
"""The page's colours in the light, for a drawing of its own."""
_VARIABLES = {INK: "--ink", GRID: "--grid"} | {mark: f"--series-{i}" for i, mark in enumerate(SERIES, start=1)}

# The width in px of a plot on a phone and in three columns alike, so that text has its nominal size.
_WIDTH_PX, _HEIGHT_PX, _DPI = 340, 200, 72
_LEFT_PX, _RIGHT_PX, _BOTTOM_PX, _TOP_PX = 50, 8, 37, 8
_PNG_DPI = 200
_LEGEND: dict[str, Any] = {
    **{"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "frameon": False, "alignment": "left"},
    **{"fontsize": 8.5, "borderpad": 0, "borderaxespad": 0.6},
}


def _settings(palette: Palette) -> dict[Any, Any]:
    return {
        "svg.fonttype": "none",
        "font.size": 10.5,
        "text.color": palette.ink,
        "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.grid,
        "axes.linewidth": 1.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": palette.grid,
        "grid.linewidth": 0.6,
        "xtick.color": palette.grid,
        "ytick.color": palette.grid,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
    }


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What is drawn into empty axes, on a page and in files of its own alike."""

    draw: Draw
    height_px: int = _HEIGHT_PX

    def svg(self, label: str, key: str) -> str:
        """An <svg> element that is read out as `label`.

        `key` is unique on the page: parts of a drawing refer to each other by names derived from it.
        """
        with matplotlib.rc_context({**_settings(PAGE), "svg.hashsalt": key}):
            figure = _figure(self.height_px)
            self.draw(figure.axes[0], PAGE)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True)
        return _inline(buffer.getvalue(), label, self.height_px)

    def save(self, path: Path, title: str) -> None:
        """Write it as `path`.svg and `path`.png, on white, with `title` and what is labelled in it above."""
        with matplotlib.rc_context({**_settings(PRINT), "svg.hashsalt": path.name}):
            figure = _figure(self.height_px)
            axes = figure.axes[0]
            self.draw(axes, PRINT)
            handles, _ = axes.get_legend_handles_labels()
            axes.legend(handles=handles, title=plain(title), **_LEGEND)
            figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None}, bbox_inches="tight")
            figure.savefig(path.with_name(path.name + ".png"), dpi=_PNG_DPI, bbox_inches="tight")


def plain(text: str) -> str:
    """Without what matplotlib would take for a formula."""
    return text.replace("$", r"\$")


def _figure(height_px: int) -> Figure:
    """With one set of axes."""
    figure = Figure(figsize=(_WIDTH_PX / _DPI, height_px / _DPI), dpi=_DPI)
    left, right = _LEFT_PX / _WIDTH_PX, 1 - _RIGHT_PX / _WIDTH_PX
    figure.subplots_adjust(left, _BOTTOM_PX / height_px, right, 1 - _TOP_PX / height_px)
    figure.add_subplot()
    return figure


def _inline(document: str, label: str, height_px: int) -> str:
    """The drawing alone: no prologue, metadata or style sheet, and colours and font of the page."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    body = re.sub(r' transform="rotate\(-0[^"]*"', "", body)
    body = re.sub(r"\n\s*", "\n", body)
    for mark, variable in _VARIABLES.items():
        body = body.replace(mark, f"var({variable})")
    head = f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH_PX} {height_px}">'
    return re.sub(r"^<svg[^>]*>", lambda _: head, body).strip()
