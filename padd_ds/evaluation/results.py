"""The result of an evaluation as a file and as a table."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from padd_ds.evaluation.perplexity import Perplexity
from padd_ds.evaluation.scoring import EvaluationResult
from padd_ds.files import write_text_whole

_PACKAGES = ("padd-ds", "torch", "transformers", "math-verify", "latex2sympy2_extended", "sympy")


def write_result(
    path: Path,
    settings: dict[str, Any],
    result: EvaluationResult | None,
    text: Perplexity | None,
    solutions: Perplexity | None = None,
) -> None:
    """Write headline numbers, settings, versions and every response to `path`, whole or not at all."""
    responses = [] if result is None else [asdict(response) for response in result.responses]
    document = {
        "headline": headline(result, text, solutions),
        "settings": settings,
        "versions": package_versions(),
        "responses": responses,
    }
    write_text_whole(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def headline(
    result: EvaluationResult | None, text: Perplexity | None, solutions: Perplexity | None = None
) -> dict[str, Any]:
    """The numbers that a result is quoted by: problems, perplexity, solution_perplexity; None if not measured."""
    scores = None if result is None else asdict(result)
    if scores is not None:
        del scores["responses"]
    return {"problems": scores, "perplexity": _plain(text), "solution_perplexity": _plain(solutions)}


def _plain(measured: Perplexity | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    # JSON has no infinity.
    return asdict(measured) | ({"value": "inf"} if measured.value == float("inf") else {})


def table(result: EvaluationResult | None, text: Perplexity | None, solutions: Perplexity | None = None) -> str:
    """The headline as a few lines of text."""
    rows: list[tuple[str, str]] = []
    if result is not None:
        low, high = result.interval_95
        share = f"{100 * result.pass_at_1:.1f} % ({result.correct} of {result.problems})"
        rows += [
            ("Pass@1", f"{share}, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"),
            ("cut off", f"{result.truncated} responses at the token limit"),
            ("no answer", f"{result.unparsed} responses"),
            ("gold unparsable", f"{result.gold_unparsable} problems, left out"),
            ("tokens", f"{result.tokens_mean:.1f} per response"),
        ]
        rows += [(f"  {name}", f"{right} of {total}") for name, (right, total) in result.by_subject.items()]
    if text is not None:
        spans = f"{text.tokens} tokens predicted in {text.windows} windows of {text.window}"
        rows.append(("perplexity", f"{text.value:.3f} ({spans})"))
    if solutions is not None:
        rows.append(("of solutions", f"perplexity {solutions.value:.3f} ({solutions.tokens} tokens predicted)"))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
