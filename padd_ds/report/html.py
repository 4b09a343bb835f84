"""The pieces that pages are made of: document, table, figure with legend or scale."""

from collections.abc import Sequence
from html import escape

from padd_ds.report.style import STYLE

# Nothing may be loaded or run, whatever a response contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MAX_CHARACTERS = 2000
"""Of a text that a model or a data set gives."""
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


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain cells; the first of each row names it."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(text)}</td>" for text in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def scale(low: str, middle: str, high: str) -> str:
    """The colour bar of a heat map; without a middle it runs from no colour to orange."""
    kind = "diverging" if middle else "rising"
    return f'<div class="scale"><span>{low}</span><i class="{kind}"></i><span>{high}</span></div>'


def legend(entries: list[tuple[str, str]]) -> str:
    """Names in the colours of their series, each with a value."""
    keys = "".join(
        f'<li class="series-{index}"><i></i>{escape(name)} <b>{escape(value)}</b></li>'
        for index, (name, value) in enumerate(entries, start=1)
    )
    return f'<ul class="legend">{keys}</ul>'


def figure(title: str, unit: str, key: str, drawing: str, caption: str) -> str:
    """Four rows (heading, key, drawing, caption), which figures side by side share."""
    heading = f"<h4>{escape(title)} <small>{escape(unit)}</small></h4>"
    caption = f"<figcaption>{escape(caption.strip())}</figcaption>"
    return f"<figure>{heading}<div>{key}</div>{drawing}{caption}</figure>"


def cut(text: str, most: int = MAX_CHARACTERS) -> str:
    """The first `most` characters of a text, and how many are left out."""
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[:most]} … ({left_out} more characters)"


def folded(name: str, text: str | None) -> str:
    """A text that opens at a click."""
    content = NO_DATA if text is None else f"<pre>{escape(text)}</pre>"
    return f"<details><summary>{escape(name)}</summary>{content}</details>"
