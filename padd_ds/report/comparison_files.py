"""The plots and numbers of a comparison as files."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from padd_ds.evaluation.comparison import PARTS, Compared, Comparison
from padd_ds.files import staged_directory
from padd_ds.report.comparison_page import COSTS, group_counts, plots
from padd_ds.report.svg import save_plot


def write_comparison_files(folder: Path, comparisons: Sequence[Comparison], overwrite: bool = False) -> None:
    """Write a new `folder`, whole or not at all; of several sets of questions each has a numbered folder in it.

    headline.csv: a row per model. by_subject.csv, by_level.csv: right responses and all, per group and model.
    questions.csv: the share of right responses per question and model. The plots as SVG and PNG.
    """
    with staged_directory(folder, overwrite) as staged:
        for number, comparison in enumerate(comparisons, start=1):
            place = staged if len(comparisons) == 1 else staged / f"set_{number}"
            place.mkdir(exist_ok=True)
            _write_one(place, comparison)


def _write_one(folder: Path, comparison: Comparison) -> None:
    _write(folder / "headline.csv", (_headline(member) for member in comparison.members))
    for kind in ("subject", "level"):
        rows = [
            {kind: group, "model": name, "right": right, "responses": total}
            for group, by_name in group_counts(comparison, kind).items()
            for name, (right, total) in by_name.items()
        ]
        _write(folder / f"by_{kind}.csv", rows)
    _write(folder / "questions.csv", _questions(comparison))
    for name, (_, draw, height) in plots(comparison).items():
        save_plot(folder / name, draw, *([height] if height else []))


def _headline(member: Compared) -> dict[str, Any]:
    costs = member.document.get("model", {}).get("costs", {})
    row: dict[str, Any] = {"model": member.name, "result": member.path.name}
    for part, key in (("greedy", "problems"), ("drawn", "samples")):
        scores = (member.document.get("headline") or {}).get(key) or {}
        low, high = scores.get("interval_95", (None, None))
        row |= {f"{part}_pass_at_1": scores.get("pass_at_1"), f"{part}_low": low, f"{part}_high": high}
        found = member.differences.get(part)
        row |= {
            f"{part}_difference": found and found.mean,
            f"{part}_difference_low": found and found.interval_95[0],
            f"{part}_difference_high": found and found.interval_95[1],
            f"{part}_better": found and found.better,
            f"{part}_worse": found and found.worse,
            f"{part}_p_value": found and found.p_value,
        }
    return row | {name: costs.get(name) for name in COSTS}


def _questions(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for member in comparison.members:
        for part in PARTS:
            for place, share in member.shares[part].items():
                yield {"question": place + 1, "model": member.name, "responses": part, "right": share}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Nothing where there is no row."""
    rows = list(rows)
    if not rows:
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)


def _safe(value: Any) -> Any:
    """A text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and value else value
