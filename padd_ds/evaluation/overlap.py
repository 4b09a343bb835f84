"""Which rows of a training set hold questions of a benchmark."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from padd_ds.data.sources import Row
from padd_ds.data.split import normalise_question

KINDS = ("exact", "normalised", "n-gram")
"""From the surest to the weakest; a pair of row and question is told with the first that holds."""
N_GRAM = 13
"""Words in a row that both have. Source: Brown et al. 2020 (GPT-3), appendix C: 8 to 13 words."""
SHORTEST_N_GRAM = 8
"""A question of fewer than N_GRAM words is looked for as a whole; one of fewer than these must be a whole text."""
COMMON_ROWS = 10
"""Words that stand in more rows than these are a set phrase and tell nothing. Source: as N_GRAM."""
_WORD = re.compile(r"[^\W_]+")

Question = tuple[str, int]
"""Benchmark, number of the problem from 1."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """A training row that holds a question."""

    place: str
    """File and line of the row."""
    benchmark: str
    problem: int
    """Number in the benchmark, from 1."""
    kind: str
    """One of KINDS."""
    share: float
    """Of the question's runs of N_GRAM words, those that the row has; 1 for the other kinds."""
    words: str
    """The start of the question, or the first run of words that both have."""


@dataclass
class _Hit:
    place: str
    question: Question
    kind: str
    shared: list[str]


def find_overlaps(rows: Iterable[Row], questions: Mapping[str, Sequence[str]]) -> list[Overlap]:
    """Every pair of a row and a question that overlap, in the order of rows. `questions`: those of each benchmark.

    All texts of a row are looked through, solutions too, however they are nested.
    """
    texts = {(name, place): text for name, asked in questions.items() for place, text in enumerate(asked, start=1)}
    wholes: dict[str, list[Question]] = defaultdict(list)
    grams: dict[str, list[Question]] = defaultdict(list)
    for question, text in texts.items():
        wholes[_squeezed(text)].append(question)
        for gram in _own_grams(text):
            grams[gram].append(question)
    lengths = sorted({gram.count(" ") + 1 for gram in grams})
    rows_with: Counter[str] = Counter()
    hits: list[_Hit] = []
    for row in rows:
        of_row: dict[Question, _Hit] = {}
        seen: set[str] = set()
        for text in _texts(row):
            shared = [gram for gram in dict.fromkeys(_grams(_words(text), lengths)) if gram in grams]
            seen |= set(shared)
            by_question: dict[Question, list[str]] = {question: [] for question in wholes.get(_squeezed(text), [])}
            for gram in shared:
                for question in grams[gram]:
                    by_question.setdefault(question, []).append(gram)
            for question, both in by_question.items():
                kind = _kind(texts[question], text)
                hit = of_row.setdefault(question, _Hit(row.place, question, kind, []))
                hit.kind = min(hit.kind, kind, key=KINDS.index)
                hit.shared += [gram for gram in both if gram not in hit.shared]
        rows_with.update(seen)
        hits += of_row.values()
    found = (_overlap(hit, texts[hit.question], rows_with) for hit in hits)
    return [overlap for overlap in found if overlap.share > 0]


def overlap_table(overlaps: Sequence[Overlap], sizes: Mapping[str, int]) -> str:
    """How many questions of each benchmark overlap, by their surest kind, and each overlap on a line."""
    lines = [f"{'benchmark':<14} questions  {'  '.join(f'{kind:>10}' for kind in KINDS)}"]
    for name, size in sizes.items():
        surest: dict[int, int] = {}
        for hit in overlaps:
            if hit.benchmark == name:
                surest[hit.problem] = min(surest.get(hit.problem, len(KINDS)), KINDS.index(hit.kind))
        counts = Counter(surest.values())
        lines.append(f"{name:<14} {size:>9}  {'  '.join(f'{counts[kind]:>10}' for kind in range(len(KINDS)))}")
    for hit in overlaps:
        share = f" {100 * hit.share:.0f} %" if hit.kind == "n-gram" else ""
        lines.append(f"{hit.place}: {hit.benchmark} {hit.problem}, {hit.kind}{share}: {hit.words}")
    return "\n".join(lines)


def _kind(asked: str, text: str) -> str:
    if asked.strip() in text:
        return "exact"
    return "normalised" if _squeezed(asked) in _squeezed(text) else "n-gram"


def _overlap(hit: _Hit, asked: str, rows_with: Mapping[str, int]) -> Overlap:
    telling = [gram for gram in hit.shared if rows_with[gram] <= COMMON_ROWS]
    by_words = hit.kind == "n-gram"
    return Overlap(
        place=hit.place,
        benchmark=hit.question[0],
        problem=hit.question[1],
        kind=hit.kind,
        share=len(telling) / len(_own_grams(asked)) if by_words else 1.0,
        words=" ".join(telling[:1]) if by_words else " ".join(asked.split())[:80],
    )


def _squeezed(text: str) -> str:
    """A text without case, spacing and punctuation, but with its operators: $x^{2}+ j x$ is x^2+jx."""
    return normalise_question(text).replace(" ", "")


def _own_grams(question: str) -> list[str]:
    words = _words(question)
    return list(dict.fromkeys(_grams(words, [min(len(words), N_GRAM)])))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _grams(words: Sequence[str], lengths: Iterable[int]) -> Iterator[str]:
    """All runs of so many words; none of fewer than SHORTEST_N_GRAM."""
    for length in lengths:
        if length >= SHORTEST_N_GRAM:
            for start in range(len(words) - length + 1):
                yield " ".join(words[start : start + length])


def _texts(value: Any) -> Iterator[str]:
    """Every string in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
