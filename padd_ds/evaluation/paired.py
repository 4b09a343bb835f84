"""Two models on the same questions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from padd_ds.errors import UserError
from padd_ds.evaluation.intervals import Z_95

_PARTS = {"greedy": "responses", "drawn": "sampled_responses"}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more a second model gets right than a first one."""

    mean: float
    """Of the questions' differences in their share of right responses."""
    interval_95: tuple[float, float]
    """Normal, over the questions' differences; (-1, 1) below two questions."""
    better: int
    """Questions of which the second model gets more right."""
    worse: int
    p_value: float
    """Two-sided, of the exact sign test on `better` and `worse`: McNemar's, for one response per question."""


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of shares of right responses, question by question."""
    each = [after - before for before, after in zip(first, second, strict=True)]
    better, worse = sum(one > 0 for one in each), sum(one < 0 for one in each)
    half = Z_95 * stdev(each) / sqrt(len(each)) if len(each) > 1 else 1.0
    mean = fmean(each)
    interval = (max(-1.0, mean - half), min(1.0, mean + half)) if len(each) > 1 else (-1.0, 1.0)
    return Difference(mean=mean, interval_95=interval, better=better, worse=worse, p_value=sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """The chance, if both were as likely, of a count at least as uneven as this one; 1 if there is nothing to count."""
    total = better + worse
    tail = sum(comb(total, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare_results(first: Path, second: Path) -> str:
    """The differences of two result files as text. UserError unless both are results on the same questions."""
    before, after = _read(first), _read(second)
    if before["settings"]["problems_sha256"] != after["settings"]["problems_sha256"]:
        raise UserError(
            f"{first} and {second} are not on the same questions; evaluate both on the same data and --limit"
        )
    lines = [f"{second} beside {first}"]
    for name, part in _PARTS.items():
        shares = [_shares(document[part]) for document in (before, after)]
        places = sorted(shares[0].keys() & shares[1].keys())
        if not places:
            continue
        found = difference(*([share[place] for place in places] for share in shares))
        low, high = found.interval_95
        lines.append(
            f"{name}: {100 * found.mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}, 95 %), "
            f"more right on {found.better} and less on {found.worse} of {len(places)} questions, "
            f"sign test p = {found.p_value:.3g}"
        )
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        _ = document["settings"]["problems_sha256"], *(document[part] for part in _PARTS.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no result of padd-eval on problems ({error!r}); name the file of its --output"
        ) from error
    return document


def _shares(responses: Sequence[dict[str, Any]]) -> dict[int, float]:
    """By problem, the share of right responses; without those whose gold answer cannot be read."""
    verdicts: dict[int, list[bool]] = {}
    for response in responses:
        if response["status"] != "gold_unparsable":
            verdicts.setdefault(response["problem"], []).append(response["correct"])
    return {place: fmean(right) for place, right in verdicts.items()}
