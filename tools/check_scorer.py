"""Whether the answer checker scores every gold solution of the benchmarks, and no wrong answer made of one.

    python tools/check_scorer.py --data DIR [--benchmark NAME ...] [--output TABLE.md]

Each problem gives its gold solution; its gold answer written in another way (a power of ten, a trailing zero, another
order, other fractions and brackets); and wrong answers: a sign, a digit, an answer more or less, another option.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from padd_ds.data.answers import last_boxed
from padd_ds.data.problems import FieldMap, Problem, map_rows
from padd_ds.data.sources import read_rows
from padd_ds.errors import UserError, run_cli
from padd_ds.evaluation.benchmarks import BENCHMARKS, load_benchmark
from padd_ds.files import write_text_whole
from padd_ds.rollout.compare import number, split_answers, tidy
from padd_ds.rollout.verify import AnswerChecker, Verdict

BOUND = 0.995
"""Share of each kind that must be judged right."""
KINDS = ("gold", "reworded", "sign", "digit", "count", "option")
RIGHT_KINDS = ("gold", "reworded")
_PLAIN = re.compile(r"([-+]?)(\d+)(\.\d+)?")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_OPTION = re.compile(r"\(?([A-Za-z])\)?|\\text\{\(?([A-Za-z][A-Za-z ]*)\)?\}")
# A digit that says how large something is, not which one it is.
_DIGIT = re.compile(r"(?<![_\d.])(?<!_\{)\d")
_OPERATOR = re.compile(r"(?<=[\w})\]']) *([-+]) *(?=[\w\\({])")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A response whose verdict is known."""

    place: int
    """Number of the problem, from 1."""
    problem: Problem
    kind: str
    response: str

    @property
    def is_right(self) -> bool:
        return self.kind in RIGHT_KINDS


def cases_of(place: int, problem: Problem, others: Sequence[str]) -> Iterator[Case]:
    """The gold response, its answer in other words, and wrong ones; `others`: the options to swap with."""
    gold = re.sub(r"(?<!\\)\$", "", problem.answer)
    worked = problem.solution or ""
    yield Case(
        place=place,
        problem=problem,
        kind="gold",
        response=worked if last_boxed(worked) else f"{worked}\n{boxed(gold)}",
    )
    made = {"reworded": reworded(gold), "sign": other_sign(gold), "digit": other_digit(gold)}
    made |= {"count": other_count(gold), "option": other_option(gold, others)}
    for kind, answer in made.items():
        if answer is not None:
            yield Case(place=place, problem=problem, kind=kind, response=boxed(answer))


def boxed(answer: str) -> str:
    return f"So the final answer is $\\boxed{{{answer}}}$."


def reworded(gold: str) -> str | None:
    """The same answer, written otherwise."""
    parts = split_answers(gold)
    if len(parts) > 1:
        return ", ".join(reversed(parts))
    gold = tidy(gold)
    if found := _SCIENTIFIC.fullmatch(gold):
        return f"{found[1]} \\times 10^{{{int(found[2])}}}"
    if found := _PLAIN.fullmatch(gold):
        return f"{gold}0" if found[3] else f"{found[1]}{int(found[2]):,}.0"
    written = gold.replace(r"\frac{", r"\dfrac{").replace("(", r"\left( ").replace(")", r" \right)")
    return written if written != gold else f"\\, {gold} \\,"


def other_sign(gold: str) -> str | None:
    """One sign turned: of a number, of the first of several answers, between two terms, or of a whole expression."""
    first, *rest = split_answers(gold) or [""]
    if r"\pm" in first or number(first) == 0 or _OPTION.fullmatch(gold) or r"\infty" in first:
        return None
    start = first.index("=") + 1 if re.search(r"^[^=]*=\s*(?!0$)[^=]+$", first) else 0
    if number(first) is not None or not (found := _OPERATOR.search(first, start)):
        # An equation whose side is 0 stays the same when that side is turned.
        if re.search(r"[<>]|\\(?:[lg]eq?|neq|cup|in|text|begin)\b|=\s*0$", first) or first.startswith(("(", "[")):
            return None
        side = first[start:].strip()
        turned = first[:start] + (side.lstrip("-") if side.startswith("-") else f"-{side.lstrip('+')}")
    else:
        turned = first[: found.start(1)] + ("+" if found[1] == "-" else "-") + first[found.end(1) :]
    return ", ".join([turned, *rest])


def other_digit(gold: str) -> str | None:
    """The first digit that is not an index or a zero before the point raised by one."""
    found = next((found for found in _DIGIT.finditer(gold) if not gold.startswith("0.", found.start())), None)
    found = found or re.search(r"[1-9]", gold)
    if found is None:
        return None
    digit = str(int(found[0]) % 9 + 1)
    return gold[: found.start()] + digit + gold[found.end() :]


def other_count(gold: str) -> str | None:
    """One of several answers left out."""
    parts = split_answers(gold)
    return ", ".join(parts[:-1]) if len(parts) > 1 else None


def other_option(gold: str, others: Sequence[str]) -> str | None:
    """Another option where the answer is a letter or a word: one of those that the benchmark has elsewhere."""
    if not _OPTION.fullmatch(gold):
        return None
    return next((other for other in others if tidy(other) != tidy(gold)), None)


def failures_of(
    problems: Sequence[Problem], checker: AnswerChecker
) -> tuple[dict[str, int], list[tuple[Case, Verdict]]]:
    """How many cases there are of each kind, and those that were misjudged."""
    options = [problem.answer for problem in problems if _OPTION.fullmatch(problem.answer)]
    cases = [case for place, problem in enumerate(problems, start=1) for case in cases_of(place, problem, options)]
    verdicts = checker.check(
        [(case.response, case.problem.answer) for case in cases], [case.problem.tolerance for case in cases]
    )
    counts = {kind: sum(case.kind == kind for case in cases) for kind in KINDS}
    wrong = [(case, said) for case, said in zip(cases, verdicts, strict=True) if said.correct != case.is_right]
    return counts, wrong


def row(name: str, counts: dict[str, int], wrong: Sequence[tuple[Case, Verdict]]) -> str:
    """A line of the table: of each kind how many were judged as they should be."""
    missed = {kind: sum(case.kind == kind for case, _ in wrong) for kind in KINDS}
    cells = [f"{counts[kind] - missed[kind]} of {counts[kind]}" if counts[kind] else "-" for kind in KINDS]
    return f"| {name} | {' | '.join(cells)} |"


def shares(counts: dict[str, int], wrong: Sequence[tuple[Case, Verdict]]) -> list[float]:
    """The share of gold solutions that score, and of wrong answers that do not."""
    groups = (("gold",), tuple(kind for kind in KINDS if kind not in RIGHT_KINDS))
    totals = [sum(counts[kind] for kind in group) for group in groups]
    missed = [sum(case.kind in group for case, _ in wrong) for group in groups]
    return [1 - miss / max(total, 1) for miss, total in zip(missed, totals, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the benchmarks' files")
    parser.add_argument("--benchmark", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS), help="default: all")
    parser.add_argument(
        "--also", type=Path, metavar="FILE", help="problems with boxed solutions, such as the training set of MATH"
    )
    parser.add_argument("--check-workers", type=int, default=1, help="answer checking processes")
    parser.add_argument("--check-timeout", type=float, default=10.0, metavar="SECONDS", help="for one answer")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write what is printed there too")
    args = parser.parse_args(argv)
    problems = {name: load_benchmark(name, args.data) for name in args.benchmark}
    if args.also:
        fields = FieldMap(question="problem", answer="solution", gold_format="boxed")
        problems[args.also.name] = map_rows(read_rows(str(args.also)), fields, str(args.also))
    table = [f"| benchmark | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    listed, below = [], []
    with AnswerChecker(workers=args.check_workers, timeout_s=args.check_timeout) as checker:
        for name, asked in problems.items():
            counts, wrong = failures_of(asked, checker)
            table.append(row(name, counts, wrong))
            listed += [
                f"- {name} {case.place}, {case.kind}: `{case.problem.answer}`, found `{said.extracted}` ({said.status})"
                for case, said in wrong
            ]
            below += [name] * (min(shares(counts, wrong)) < BOUND)
    text = "\n".join([*table, "", *listed])
    print(text)
    if args.output:
        write_text_whole(args.output, text + "\n")
    if below:
        raise UserError(f"{', '.join(below)}: fewer than {100 * BOUND:g} % are judged as they should be")


if __name__ == "__main__":
    run_cli(main)
