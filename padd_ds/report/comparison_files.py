"""The plots and numbers of a comparison as files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from padd_ds.evaluation.comparison import PARTS, Compared, Comparison
from padd_ds.report.comparison_page import COSTS, group_counts, panels
from padd_ds.report.rows import write_rows


def write_comparison_files(folder: Path, comparisons: Sequence[Comparison]) -> None:
    """Into `folder`; of several sets of questions each has a numbered folder in it.

    headline.csv: a row per model. by_subject.csv, by_level.csv: right responses and all, per group and model.
    questions.csv: the share of right responses per question and model. The plots as SVG and PNG.
    """
    for number, comparison in enumerate(comparisons, start=1):
        place = folder if len(comparisons) == 1 else folder / f"set_{number}"
        place.mkdir(exist_ok=True)
        _write_one(place, comparison)


def _write_one(folder: Path, comparison: Comparison) -> None:
    write_rows(folder / "headline.csv", (_headline(member) for member in comparison.members))
    for kind in ("subject", "level"):
        rows = [
            {kind: group, "model": name, "right": right, "responses": total}
            for group, by_name in group_counts(comparison, kind).items()
            for name, (right, total) in by_name.items()
        ]
        write_rows(folder / f"by_{kind}.csv", rows)
    write_rows(folder / "questions.csv", _questions(comparison))
    for name, panel in panels(comparison).items():
        panel.save(folder / name)


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
