"""The pieces that pages are made of: document, table, plots with what is told of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from padd_ds.report.style import STYLE
from padd_ds.report.svg import Plot

# Nothing may be loaded or run, whatever a response contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MAX_CHARACTERS = 2000
"""Of a text that a model or a data set gives."""
MAX_NAME = 60
"""Characters of a file's name."""
NO_DATA = '<p class="no-data">no data</p>'


def document(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: bool = False) -> str:
    """Plain cells, whose lines may be broken if they are `texts`; the first of each row names it."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(text)}</td>" for text in cells)}</tr>'
        for name, *cells in rows
    )
    start = '<table class="texts">' if texts else "<table>"
    return f'<div class="wide">{start}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot with what is told of it."""

    title: str
    unit: str
    plot: Plot | None
    """None where there is nothing to draw, which `nothing` says."""
    caption: str = ""
    entries: Sequence[tuple[str, str]] = ()
    """The series' names, each with a value."""
    limits: tuple[str, str, str] | None = None
    """What a heat map's colours mean: lowest, middle and highest; without a middle from no colour to orange."""
    nothing: str = NO_DATA

    def html(self, key: str) -> str:
        """Four rows (heading, key, drawing, caption), which panels side by side share; `key` as in `Plot.svg`."""
        heading = f"<h4>{escape(self.title)} <small>{escape(self.unit)}</small></h4>"
        colours = scale(*self.limits) if self.limits else legend(self.entries) if self.entries else ""
        drawn = self.plot.svg(self.title, key) if self.plot else self.nothing
        caption = f"<figcaption>{escape(self.caption.strip())}</figcaption>"
        return f"<figure>{heading}<div>{colours}</div>{drawn}{caption}</figure>"

    def save(self, path: Path) -> None:
        """The plot as `path`.svg and `path`.png; nothing where there is none."""
        if self.plot is not None:
            limits = "" if self.limits is None else f", {self.limits[0]} to {self.limits[2]}"
            self.plot.save(path, f"{self.title} ({self.unit}{limits})")


def panel_grid(panels: Sequence[Panel], key: str) -> str:
    """Panels side by side; `key` is unique on the page."""
    drawn = "\n".join(panel.html(f"{key}/{number}") for number, panel in enumerate(panels, start=1))
    return f'<div class="panels">\n{drawn or NO_DATA}\n</div>'


def save_panels(folder: Path, panels: Sequence[Panel]) -> None:
    """Their plots in a new folder, as NN_title.svg and NN_title.png."""
    folder.mkdir(parents=True)
    for number, panel in enumerate(panels, start=1):
        name = re.sub(r"\W+", "_", panel.title).strip("_").lower()[:MAX_NAME]
        panel.save(folder / f"{number:02d}_{name}")


def scale(low: str, middle: str, high: str) -> str:
    """The colour bar of a heat map; without a middle it runs from no colour to orange."""
    kind = "diverging" if middle else "rising"
    return f'<div class="scale"><span>{low}</span><i class="{kind}"></i><span>{high}</span></div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names in the colours of their series, each with a value."""
    keys = "".join(
        f'<li class="series-{index}"><i></i>{escape(name)} <b>{escape(value)}</b></li>'
        for index, (name, value) in enumerate(entries, start=1)
    )
    return f'<ul class="legend">{keys}</ul>'


def cut(text: str, most: int = MAX_CHARACTERS) -> str:
    """The first `most` characters of a text, and how many are left out."""
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[:most]} … ({left_out} more characters)"


def folded(name: str, text: str | None) -> str:
    """A text that opens at a click."""
    content = NO_DATA if text is None else f"<pre>{escape(text)}</pre>"
    return f"<details><summary>{escape(name)}</summary>{content}</details>"
