"""The benchmarks known by name, and where their problems come from."""

from dataclasses import dataclass
from pathlib import Path

from padd_ds.data.problems import FieldMap, Problem, map_rows
from padd_ds.data.sources import read_rows
from padd_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One public set of problems with checkable answers."""

    file: str
    """Its name in a folder of benchmark files."""
    fields: FieldMap
    hub: str | None = None
    """Hub name with configuration, where its rows have the same fields."""
    split: str = "test"


BENCHMARKS = {
    "gsm8k": Benchmark(file="gsm8k_test.jsonl", hub="openai/gsm8k:main", fields=FieldMap(gold_format="gsm8k")),
    "math500": Benchmark(
        file="math500.jsonl",
        hub="HuggingFaceH4/MATH-500",
        fields=FieldMap(question="problem", solution="solution", subject="subject"),
    ),
    "aime24": Benchmark(file="aime24.jsonl", fields=FieldMap(question="problem")),
    "amc23": Benchmark(file="amc23.jsonl", fields=FieldMap(question="problem")),
    "minerva": Benchmark(
        file="minerva_math.jsonl",
        fields=FieldMap(question="problem", answer="solution", subject="type", gold_format="boxed"),
    ),
    "olympiadbench": Benchmark(file="olympiadbench.jsonl", fields=FieldMap(answer="final_answer", subject="subfield")),
}


def load_benchmark(name: str, data_dir: Path | None = None) -> list[Problem]:
    """All problems of benchmark `name`, from its file in `data_dir`, or from the hub without a `data_dir`.

    UserError: unknown name, file missing, a benchmark without a hub name and no folder.
    """
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"benchmark {name!r} is unknown; choose one of {known}, or give --data")
    benchmark = BENCHMARKS[name]
    if data_dir is None and benchmark.hub is None:
        raise UserError(f"benchmark {name} is read from a file; pass --data-dir with {benchmark.file} in it")
    source = benchmark.hub if data_dir is None else str(data_dir.expanduser().absolute() / benchmark.file)
    assert source is not None
    return map_rows(read_rows(source, benchmark.split), benchmark.fields, source, "--{role}-field, with --data,")
