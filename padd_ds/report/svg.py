"""Matplotlib figures as SVG that takes its colours from the page.

Colours are written as marker values and replaced by CSS variables, so that one drawing fits light and dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#000001"
GRID = "#000002"
SERIES = ("#000011", "#000012", "#000013", "#000014")
"""Markers of the series' colours, by position."""
_VARIABLES = {INK: "--ink", GRID: "--grid"} | {mark: f"--series-{i}" for i, mark in enumerate(SERIES, start=1)}

# The width in px of a plot on a phone and in three columns alike, so that text has its nominal size.
_WIDTH_PX, _HEIGHT_PX, _DPI = 340, 200, 72
_LEFT_PX, _RIGHT_PX, _BOTTOM_PX, _TOP_PX = 50, 8, 37, 8
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


class Drawing:
    """A figure being drawn; `svg` holds the result once the block of `drawing` has ended."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.svg = ""


@contextmanager
def drawing(label: str, key: str, height_px: int = _HEIGHT_PX) -> Iterator[Drawing]:
    """Yield empty axes, then turn them into an <svg> element that is read out as `label`.

    `key` is unique on the page: parts of a drawing refer to each other by names derived from it.
    """
    with matplotlib.rc_context({**_RC, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH_PX / _DPI, height_px / _DPI), dpi=_DPI)
        left, right = _LEFT_PX / _WIDTH_PX, 1 - _RIGHT_PX / _WIDTH_PX
        figure.subplots_adjust(left, _BOTTOM_PX / height_px, right, 1 - _TOP_PX / height_px)
        result = Drawing(figure.add_subplot())
        yield result
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    result.svg = _inline(buffer.getvalue(), label, height_px)


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
