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

from padd_ds.data.answers import EXACT, AnswerFormat, Tolerance, extract_answer
from padd_ds.rollout.compare import answers_in, can_be_read, compare

READY = "ready"
_MEMORY_LIMIT_BYTES = 4 * 2**30
_GRACE_S = 2.0


def encode_task(response: str, gold: str, tolerance: Tolerance, answer_format: AnswerFormat, timeout_s: float) -> str:
    """One task as a line for the worker's standard input."""
    task = {"response": response, "gold": gold, "tolerance": asdict(tolerance), "timeout_s": timeout_s}
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
        tolerance, answer_format = Tolerance(**task["tolerance"]), AnswerFormat(**task["answer_format"])
        try:
            result = judge(task["response"], task["gold"], answer_format, tolerance)
        except Exception:  # of the many that a parser may raise on a model's text, none is worth a new process
            result = _verdict("error", False, "")
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(results, result)


def judge(response: str, gold: str, answer_format: AnswerFormat, tolerance: Tolerance = EXACT) -> dict[str, Any]:
    """The verdict on one response as `{"status", "correct", "extracted"}`, without a time limit."""
    answers = answers_in(response) if answer_format.by_math_verify else [extract_answer(response, answer_format) or ""]
    if not any(answers):
        return _verdict("no_answer" if can_be_read(gold) else "gold_unparsable", False, "")
    verdicts = [compare(answer, gold, tolerance) for answer in answers]
    if True in verdicts:
        return _verdict("ok", True, answers[verdicts.index(True)])
    return _verdict("gold_unparsable" if None in verdicts else "ok", False, answers[-1])


def _verdict(status: str, correct: bool, extracted: str) -> dict[str, Any]:
    return {"status": status, "correct": correct, "extracted": extracted}


def _send(stream: Any, message: Any) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
