"""The result of an evaluation as a file and as a table."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from padd_ds.evaluation.kept import finish_work, responses_file
from padd_ds.evaluation.perplexity import Perplexity
from padd_ds.evaluation.routing import RoutingResult
from padd_ds.evaluation.scoring import EvaluationResult
from padd_ds.files import write_text_whole

_PACKAGES = ("padd-ds", "torch", "transformers", "math-verify", "latex2sympy2_extended", "sympy")


@dataclass(kw_only=True)
class Measured:
    """What one evaluation measured; None where it was not asked for."""

    problems: EvaluationResult | None = None
    """Of greedy responses."""
    samples: EvaluationResult | None = None
    """Of sampled responses."""
    perplexity: Perplexity | None = None
    solution_perplexity: Perplexity | None = None
    routing: RoutingResult | None = None
    """On the problems' solutions."""


def write_result(path: Path, settings: dict[str, Any], model: dict[str, Any], measured: Measured) -> None:
    """Write headline numbers, settings, versions, `model_facts` and every verdict to `path`, whole or not at all.

    The responses themselves go beside it, into `responses_file(path)`, before. After a kill the same evaluation
    writes both again.
    """
    responses = [
        response for result in (measured.problems, measured.samples) if result for response in result.responses
    ]
    document = {
        "headline": headline(measured),
        "settings": settings,
        "model": model,
        "versions": package_versions(),
        "responses_file": responses_file(path).name if responses else None,
        "responses": _verdicts(measured.problems),
        "sampled_responses": _verdicts(measured.samples),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if responses:
        finish_work(path, sorted(responses, key=lambda response: response.key), text)
    else:
        write_text_whole(path, text)


def headline(measured: Measured) -> dict[str, Any]:
    """The numbers that a result is quoted by, under the names of `Measured`."""
    return {
        "problems": _scores(measured.problems),
        "samples": _scores(measured.samples),
        "perplexity": _plain(measured.perplexity),
        "solution_perplexity": _plain(measured.solution_perplexity),
        "routing": None if measured.routing is None else asdict(measured.routing),
    }


def _verdicts(result: EvaluationResult | None) -> list[dict[str, Any]]:
    names = ("problem", "sample", "correct", "status", "tokens", "ended")
    return [{name: getattr(response, name) for name in names} for response in (result.responses if result else [])]


def _scores(result: EvaluationResult | None) -> dict[str, Any] | None:
    return None if result is None else {key: value for key, value in asdict(result).items() if key != "responses"}


def _plain(measured: Perplexity | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    # JSON has no infinity.
    return asdict(measured) | ({"value": "inf"} if measured.value == float("inf") else {})


def table(measured: Measured) -> str:
    """The headline as a few lines of text."""
    rows: list[tuple[str, str]] = []
    result, sampled = measured.problems, measured.samples
    if result is not None:
        rows += [
            ("Pass@1", _share(result)),
            ("cut off", f"{result.truncated} responses at the token limit"),
            ("no answer", f"{result.unparsed} responses"),
            ("not checked", f"{result.unchecked} responses whose comparison took too long or failed"),
            ("gold unparsable", f"{result.gold_unparsable} problems, left out"),
            ("tokens", f"{result.tokens_mean:.1f} per response"),
        ]
        groups = [*result.by_subject.items(), *((f"level {name}", count) for name, count in result.by_level.items())]
        rows += [(f"  {name}", f"{right} of {total}") for name, (right, total) in groups]
    if sampled is not None:
        rows.append((f"mean of {sampled.samples}", f"{_share(sampled)}; {sampled.truncated} cut off"))
        rows += [(f"Pass@{k}", f"{100 * share:.1f} %") for k, share in sampled.pass_at_k.items() if k > 1]
    if (text := measured.perplexity) is not None:
        spans = f"{text.tokens} tokens predicted in {text.windows} windows of {text.window}"
        rows.append(("perplexity", f"{text.value:.3f} ({spans})"))
    if (solutions := measured.solution_perplexity) is not None:
        rows.append(("of solutions", f"perplexity {solutions.value:.3f} ({solutions.tokens} tokens predicted)"))
    if (routing := measured.routing) is not None:
        labels = "" if routing.nmi is None else f", NMI {routing.nmi:.4f}, ESI {routing.esi_nats:.4f} nats"
        moved = (
            "" if routing.shift is None else f", shift {routing.shift:.3g}, flips {100 * (routing.flips or 0):.1f} %"
        )
        rows.append(("routing", f"load violation {routing.max_violation:.3f}{labels}{moved}"))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _share(result: EvaluationResult) -> str:
    low, high = result.interval_95
    counts = f"{result.correct} of {result.problems * result.samples}"
    return f"{100 * result.pass_at_1:.1f} % ({counts}), 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
