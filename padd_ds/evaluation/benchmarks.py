"""The benchmarks known by name, and where their problems come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padd_ds.data.problems import FieldMap, Problem, map_rows
from padd_ds.data.sources import read_rows
from padd_ds.errors import UserError

MINERVA_ERROR = 0.01
"""Share of the answer. Choice: that of OCWCourses in Lewkowycz et al. 2022, as Azerbayev et al. 2023 score it."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One public set of problems with checkable answers."""

    file: str
    """Its name in a folder of benchmark files."""
    hub: str
    """Hub name, with a configuration after a colon."""
    shapes: tuple[FieldMap, ...]
    """The fields that copies of it have, the first that fits being taken; the first is named where none fits."""
    split: str = "test"
    samples: int = 0
    """Responses drawn per problem, unless the caller wants another number."""


def _named(*questions: str, **fields: Any) -> tuple[FieldMap, ...]:
    return tuple(FieldMap(question=question, **fields) for question in questions)


BENCHMARKS = {
    "gsm8k": Benchmark(
        file="gsm8k_test.jsonl", hub="openai/gsm8k:main", shapes=_named("question", gold_format="gsm8k")
    ),
    "math500": Benchmark(
        file="math500.jsonl",
        hub="HuggingFaceH4/MATH-500",
        shapes=(*_named("problem", solution="solution", subject="subject", level="level"), *_named("problem")),
    ),
    "aime24": Benchmark(
        file="aime24.jsonl",
        hub="HuggingFaceH4/aime_2024",
        split="train",
        samples=32,
        shapes=(*_named("problem", solution="solution"), *_named("problem")),
    ),
    "amc23": Benchmark(file="amc23.jsonl", hub="math-ai/amc23", shapes=_named("problem", "question")),
    "minerva": Benchmark(
        file="minerva_math.jsonl",
        hub="math-ai/minervamath",
        shapes=(
            *_named("problem", answer="solution", subject="type", gold_format="boxed", relative_error=MINERVA_ERROR),
            *_named("question", relative_error=MINERVA_ERROR),
        ),
    ),
    "olympiadbench": Benchmark(
        file="olympiadbench.jsonl",
        hub="math-ai/olympiadbench",
        shapes=(
            *_named("question", answer="final_answer", solution="solution", subject="subfield", absolute_error="error"),
            *_named("question", answer="final_answer", absolute_error="error"),
        ),
    ),
}


def load_benchmark(name: str, data_dir: Path | None = None) -> list[Problem]:
    """All problems of benchmark `name`, from its file in `data_dir`, or from the hub without a `data_dir`.

    UserError: unknown name, file missing, a field missing, the hub out of reach.
    """
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"benchmark {name!r} is unknown; choose one of {known}, or give --data")
    benchmark = BENCHMARKS[name]
    source = benchmark.hub if data_dir is None else str(data_dir.expanduser().absolute() / benchmark.file)
    rows = read_rows(source, benchmark.split)
    shape = next((shape for shape in benchmark.shapes if _fits(shape, rows[0])), benchmark.shapes[0])
    return map_rows(rows, shape, source, "--{role}-field, with --data,")


def _fits(shape: FieldMap, row: Mapping[str, Any]) -> bool:
    names = (shape.question, shape.answer, shape.solution, shape.subject, shape.level)
    return all(name is None or row.get(name) is not None for name in names)
