"""Results of several models on the same questions, held against the first."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from padd_ds.errors import UserError
from padd_ds.evaluation.paired import Difference, difference

PARTS = {"greedy": "responses", "drawn": "sampled_responses"}
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One model's result."""

    name: str
    path: Path
    document: Values = field(repr=False)
    """The result file."""
    shares: dict[str, dict[int, float]] = field(repr=False)
    """By part and question, the share of right responses; without those whose gold answer cannot be read."""
    differences: dict[str, Difference]
    """By part, to the first model of the comparison; none of that itself."""

    @property
    def dense(self) -> bool:
        """Whether every token passes through all parameters; False where that is not known."""
        costs = self.document.get("model", {}).get("costs", {})
        return "total_parameters" in costs and costs["total_parameters"] == costs["active_parameters"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One set of questions."""

    title: str
    members: tuple[Compared, ...]

    @property
    def role(self) -> str:
        """What the first model is to the others: a `teacher` if it alone is dense."""
        first, *others = self.members
        return "teacher" if first.dense and not any(other.dense for other in others) else "reference"


def compare(paths: Sequence[Path]) -> list[Comparison]:
    """One comparison for every set of questions, in the order in which they come up.

    UserError: a file that is no result on problems, one that is named twice, or one that is alone on its questions.
    """
    twice = [path for place, path in enumerate(paths) if path.resolve() in {one.resolve() for one in paths[:place]}]
    if twice:
        raise UserError(f"{twice[0]} is named twice; name every result once")
    documents = {path: _read(path) for path in paths}
    by_questions: dict[str, list[Path]] = {}
    for path, document in documents.items():
        by_questions.setdefault(document["settings"]["problems_sha256"], []).append(path)
    for alone in (group[0] for group in by_questions.values() if len(group) == 1):
        others = ", ".join(str(path) for path in documents if path != alone)
        raise UserError(
            f"{alone} and {others or 'no other file'} are not on the same questions; evaluate both on the same data "
            "and --limit"
        )
    return [_comparison({path: documents[path] for path in group}) for group in by_questions.values()]


def comparison_text(comparisons: Sequence[Comparison]) -> str:
    """The differences as a few lines."""
    lines = []
    for one in comparisons:
        for member in one.members[1:]:
            lines.append(f"{member.path} beside {one.members[0].path}")
            lines += [_line(part, found, member) for part, found in member.differences.items()]
    return "\n".join(lines)


def changed_questions(comparison: Comparison, most: int) -> tuple[list[int], list[int]]:
    """The questions of which the others get least beside the first model, and those of which they get most.

    By the mean difference in the share of right greedy responses, drawn ones deciding between equals.
    """
    first, *others = comparison.members

    def ahead(part: str, place: int) -> float:
        known = [other.shares[part] for other in (first, *others) if place in other.shares[part]]
        return fmean(share[place] for share in known[1:]) - known[0][place] if len(known) == len(others) + 1 else 0.0

    score = {place: (ahead("greedy", place), ahead("drawn", place)) for place in first.shares["greedy"]}
    ordered = sorted(score, key=lambda place: score[place])
    lost = [place for place in ordered if score[place][0] < 0][:most]
    won = [place for place in reversed(ordered) if score[place][0] > 0][:most]
    return lost, won


def greedy_responses(member: Compared) -> dict[int, Values]:
    """By question, the greedy response and all that is known of it; empty where its file is not there any more."""
    name = member.document.get("responses_file")
    path = member.path.with_name(Path(name).name) if name else None
    if path is None or not path.is_file():
        return {}
    found = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if row["sample"] == 0:
                    found[row["problem"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: is no response ({error!r}); evaluate again") from error
    return found


def _comparison(documents: dict[Path, Values]) -> Comparison:
    names = _names(documents)
    members: list[Compared] = []
    for path, document in documents.items():
        shares = {part: _shares(document[key]) for part, key in PARTS.items()}
        first = members[0].shares if members else {}
        differences = {
            part: _difference(first[part], shares[part]) for part in first if first[part].keys() & shares[part].keys()
        }
        members.append(Compared(name=names[path], path=path, document=document, shares=shares, differences=differences))
    settings = members[0].document["settings"]
    title = settings.get("benchmark") or Path(str(settings.get("data"))).name
    return Comparison(title=title, members=tuple(members))


def _names(documents: dict[Path, Values]) -> dict[Path, str]:
    """The folders of the models, or their files' names where two have the same."""
    names = {path: Path(str(document["settings"].get("model"))).name for path, document in documents.items()}
    unique = len(set(names.values())) == len(names)
    return names if unique else {path: path.stem for path in documents}


def _difference(first: dict[int, float], second: dict[int, float]) -> Difference:
    places = sorted(first.keys() & second.keys())
    return difference([first[place] for place in places], [second[place] for place in places])


def _line(part: str, found: Difference, member: Compared) -> str:
    low, high = found.interval_95
    return (
        f"{part}: {100 * found.mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}, 95 %), "
        f"more right on {found.better} and less on {found.worse} of {len(member.shares[part])} questions, "
        f"sign test p = {found.p_value:.3g}"
    )


def _read(path: Path) -> Values:
    try:
        document: Values = json.loads(path.read_text(encoding="utf-8"))
        _ = document["settings"]["problems_sha256"], *(document[part] for part in PARTS.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no result of padd-eval on problems ({error!r}); name the file of its --output"
        ) from error
    if not any(document[part] for part in PARTS.values()):
        raise UserError(f"{path}: holds no response, and responses are what is compared; evaluate on problems too")
    return document


def _shares(responses: Sequence[Values]) -> dict[int, float]:
    verdicts: dict[int, list[bool]] = {}
    for response in responses:
        if response["status"] != "gold_unparsable":
            verdicts.setdefault(response["problem"], []).append(response["correct"])
    return {place: fmean(right) for place, right in verdicts.items()}
