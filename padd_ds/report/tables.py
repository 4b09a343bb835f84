"""The headline table, for the terminal and for a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from padd_ds.report.numbers import UNKNOWN, scaled

_HEADER = (
    "model",
    "perplexity",
    "Pass@1 %",
    "95 % interval",
    "sampled %",
    "questions",
    "active",
    "total",
    "FLOPs/token",
)


@dataclass(frozen=True)
class TableRow:
    """One model; None where a number is not known."""

    name: str
    perplexity: float | None = None
    pass_at_1: float | None = None
    """Share of right answers, in [0, 1]; so are the bounds of its interval."""
    pass_at_1_low: float | None = None
    pass_at_1_high: float | None = None
    sampled: float | None = None
    """Mean share of right answers of sampled responses, in [0, 1]."""
    questions: int | None = None
    """How many the share was measured on."""
    active_parameters: int | None = None
    """Parameters that one token passes through."""
    total_parameters: int | None = None
    flops_per_token: float | None = None


def format_table(rows: Sequence[TableRow]) -> str:
    """The rows as aligned lines of text, teachers first; without a newline at the end."""
    lines = [_HEADER, *(_cells(row) for row in teachers_first(rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(_aligned(line, widths) for line in lines)


def html_table(rows: Sequence[TableRow]) -> str:
    """The rows as an HTML table, teachers first, with a small picture of each interval."""
    if not rows:
        return '<p class="no-data">no data</p>'
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in _HEADER[:4])
    heads += '<th scope="col" class="range">0 to 100 %</th>'
    heads += "".join(f'<th scope="col">{escape(head)}</th>' for head in _HEADER[4:])
    body = "\n".join(_html_row(row) for row in teachers_first(rows))
    return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def teachers_first(rows: Sequence[TableRow]) -> list[TableRow]:
    """Rows named after a teacher, then the others; each in their order."""
    return sorted(rows, key=lambda row: "teacher" not in row.name.casefold())


def _cells(row: TableRow) -> tuple[str, ...]:
    interval = UNKNOWN
    if row.pass_at_1_low is not None and row.pass_at_1_high is not None:
        interval = f"{100 * row.pass_at_1_low:.1f} to {100 * row.pass_at_1_high:.1f}"
    counts = (row.active_parameters, row.total_parameters, row.flops_per_token)
    return (
        row.name,
        UNKNOWN if row.perplexity is None else f"{row.perplexity:.2f}",
        UNKNOWN if row.pass_at_1 is None else f"{100 * row.pass_at_1:.1f}",
        interval,
        UNKNOWN if row.sampled is None else f"{100 * row.sampled:.1f}",
        UNKNOWN if row.questions is None else str(row.questions),
        *(UNKNOWN if count is None else scaled(count) for count in counts),
    )


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = line
    return "  ".join([name.ljust(widths[0]), *(text.rjust(w) for text, w in zip(numbers, widths[1:], strict=True))])


def _html_row(row: TableRow) -> str:
    name, *numbers = (escape(cell) for cell in _cells(row))
    cells = "".join(f"<td>{text}</td>" for text in numbers[:3])
    cells += f'<td class="range">{_range(row)}</td>'
    cells += "".join(f"<td>{text}</td>" for text in numbers[3:])
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _range(row: TableRow) -> str:
    """A tick at Pass@1 on a bar over its interval, on a scale from 0 to 100 %."""
    if row.pass_at_1 is None:
        return ""
    low = row.pass_at_1 if row.pass_at_1_low is None else row.pass_at_1_low
    high = row.pass_at_1 if row.pass_at_1_high is None else row.pass_at_1_high
    axis = '<line class="axis" x1="0%" x2="100%" y1="50%" y2="50%"/>'
    interval = f'<line class="interval" x1="{100 * low:.1f}%" x2="{100 * high:.1f}%" y1="50%" y2="50%"/>'
    share = f"{100 * row.pass_at_1:.1f}%"
    tick = f'<line class="share" x1="{share}" x2="{share}" y1="15%" y2="85%"/>'
    return f'<svg aria-hidden="true">{axis}{interval}{tick}</svg>'
