"""A process that compares answers by math-verify, one JSON line in, one JSON line out.

Run as `python -m padd_ds.rollout.verify_worker`. It must not load torch: a job has several of these, and
each should start in a second and stay far below the memory that torch takes.
"""

import json
import logging
import os
import resource
import signal
import sys
from dataclasses import asdict
from typing import Any

from padd_ds.data.answers import AnswerFormat, extract_answer, same_answer

READY = "ready"
_MEMORY_LIMIT_BYTES = 4 * 2**30
_GRACE_S = 2.0


def encode_task(response: str, gold: str, answer_format: AnswerFormat, timeout_s: float) -> str:
    """One task as a line for the worker's standard input."""
    task = {"response": response, "gold": gold, "timeout_s": timeout_s}
    return json.dumps(task | {"answer_format": asdict(answer_format)}) + "\n"


def main() -> None:
    """Answer tasks until standard input ends, that is until the parent closes it or dies."""
    # Slurm and Ctrl-C signal the whole process tree; what it means is the parent's to decide.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing a library prints may reach the results
    import math_verify  # noqa: F401 - loaded before the clock of the first task runs

    _send(results, READY)
    for line in sys.stdin:
        task = json.loads(line)
        # The parent kills a late worker; the alarm's default action does so when the parent is gone.
        signal.setitimer(signal.ITIMER_REAL, task["timeout_s"] + _GRACE_S)
        result = judge(task["response"], task["gold"], AnswerFormat(**task["answer_format"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(results, result)


def judge(response: str, gold: str, answer_format: AnswerFormat) -> dict[str, Any]:
    """The verdict on one response as `{"status", "correct", "extracted"}`, without a time limit."""
    from math_verify import verify

    if answer_format.by_math_verify:
        extracted, parsed = _parse(response)
    else:
        extracted = extract_answer(response, answer_format) or ""
        parsed = _parse(f"\\boxed{{{extracted}}}")[1] if extracted else []
    same = same_answer(extracted, gold)
    if extracted and same is not None:
        return _verdict("ok", same, extracted)
    has_formula = "$" in gold.replace("\\$", "")
    parsed_gold = _parse(gold if has_formula else f"\\boxed{{{gold}}}")[1] if gold.strip() else []
    if not parsed_gold:
        return _verdict("gold_unparsable", False, extracted)
    if not extracted:
        return _verdict("no_answer", False, "")
    return _verdict("ok", bool(parsed) and verify(parsed_gold, parsed, timeout_seconds=None), extracted)


def _parse(text: str) -> tuple[str, list[Any]]:
    """The answer's text as math-verify found it, and what it was parsed to (empty: nothing)."""
    from math_verify import parse

    # No timeouts of its own: they are signals that a C call ignores, and the parent has the clock.
    found = parse(text, parsing_timeout=None, fallback_mode="first_match")
    as_text = [item for item in found if isinstance(item, str)]
    return as_text[0] if as_text else "", [item for item in found if not isinstance(item, str)]


def _verdict(status: str, correct: bool, extracted: str) -> dict[str, Any]:
    return {"status": status, "correct": bool(correct), "extracted": extracted}


def _send(stream: Any, message: Any) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
