"""Answers judged in worker processes that a hung or dying comparison cannot take the run down with.

Workers are plain child processes that speak JSON lines: `multiprocessing` (and pools built on it) would
import the training script, and with it torch, again in each of them.
"""

import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from padd_ds.data.answers import (
    EXACT,
    AnswerFormat,
    Tolerance,
    extract_answer,
    is_integer,
    last_boxed,
    same_answer,
)
from padd_ds.rollout.compare import same_text
from padd_ds.rollout.verify_worker import READY, encode_task

STATUSES = ("ok", "no_answer", "gold_unparsable", "timeout", "error")
Task = tuple[str, str, Tolerance]
"""Response, gold answer, how far apart their numbers may be."""
_START_TIMEOUT_S = 120.0
_WORKER_COMMAND = (sys.executable, "-m", "padd_ds.rollout.verify_worker")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one response; `correct` is True with status `ok` only."""

    correct: bool
    status: str
    """`ok`: compared. `no_answer`: the response holds none. `gold_unparsable`: the gold answer is at fault.
    `timeout`: took too long. `error`: the comparison failed, or two workers died of it."""
    extracted: str
    """The answer found in the response, empty if none."""


class AnswerChecker:
    """Checks responses against gold answers; a context manager that ends its processes on leaving.

    Workers start when first needed. A worker that hangs costs its response `timeout_s` and the run nothing: it is
    killed, and a new one starts for the next response. A response at which a worker dies is tried once more, in
    another one, since what killed the first may have had nothing to do with it.
    """

    def __init__(
        self,
        answer_format: AnswerFormat | None = None,
        *,
        workers: int = 1,
        timeout_s: float = 5.0,
        command: Sequence[str] = _WORKER_COMMAND,
    ) -> None:
        self._format = answer_format or AnswerFormat()
        self._timeout_s = timeout_s
        self._workers = [_Worker(command) for _ in range(workers)]

    def __enter__(self) -> "AnswerChecker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and wait for them; the checker can be used again afterwards."""
        for worker in self._workers:
            worker.close()

    def check(self, pairs: Sequence[tuple[str, str]], tolerances: Sequence[Tolerance] | None = None) -> list[Verdict]:
        """One verdict per (response, gold), in order; equal questions are judged once.

        `tolerances`: of each pair's numbers; without them, they must be equal.
        """
        bounds = [EXACT] * len(pairs) if tolerances is None else tolerances
        tasks = [(*pair, tolerance) for pair, tolerance in zip(pairs, bounds, strict=True)]
        verdicts = {task: self._judge_here(*task) for task in dict.fromkeys(tasks)}
        open_tasks = [task for task, verdict in verdicts.items() if verdict is None]
        verdicts.update(zip(open_tasks, self._judge_in_workers(open_tasks), strict=True))
        return [verdict for task in tasks if (verdict := verdicts[task]) is not None]

    def _judge_here(self, response: str, gold: str, tolerance: Tolerance) -> Verdict | None:
        """The verdict that plain text gives beyond doubt, without a process."""
        if self._format.by_math_verify:
            boxed = last_boxed(response)
            # A box that says the same is right; whether it is the only answer is math-verify's to say.
            if boxed and (same_answer(boxed, gold) or same_text(boxed, gold)):
                return Verdict(correct=True, status="ok", extracted=boxed)
            return None
        if self._format.pattern is not None:  # the user's own: it may backtrack for ever
            return None
        extracted = extract_answer(response, self._format)
        if extracted is None:
            return Verdict(correct=False, status="no_answer", extracted="") if is_integer(gold) else None
        same = same_answer(extracted, gold)
        if same is None or (tolerance and not same):
            return None
        return Verdict(correct=same, status="ok", extracted=extracted)

    def _judge_in_workers(self, tasks: Sequence[Task]) -> list[Verdict]:
        if not tasks:
            return []
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def judge(task: Task) -> Verdict:
            worker = idle.get()
            try:
                return worker.judge(task, self._format, self._timeout_s)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as pool:
            return list(pool.map(judge, tasks))


class _Worker:
    """One child process, started when needed and again after its death. Used by one thread at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def judge(self, task: Task, answer_format: AnswerFormat, timeout_s: float) -> Verdict:
        verdict = self._judge_once(task, answer_format, timeout_s)
        return self._judge_once(task, answer_format, timeout_s) if verdict.status == "error" else verdict

    def _judge_once(self, task: Task, answer_format: AnswerFormat, timeout_s: float) -> Verdict:
        process = self._process or self._start()
        deadline = time.monotonic() + timeout_s
        try:
            _send(process, encode_task(*task, answer_format, timeout_s).encode(), deadline)
            return Verdict(**self._receive(deadline))
        except TimeoutError:
            self.close(at_once=True)
            return Verdict(correct=False, status="timeout", extracted="")
        except (EOFError, BrokenPipeError):
            self.close(at_once=True)
            return Verdict(correct=False, status="error", extracted="")

    def close(self, *, at_once: bool = False) -> None:
        process, self._process, self._received = self._process, None, b""
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=0 if at_once else 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _start(self) -> subprocess.Popen[bytes]:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            self._process = process
            try:
                ready = self._receive(time.monotonic() + _START_TIMEOUT_S)
            except (EOFError, TimeoutError) as error:
                self.close(at_once=True)
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip() or repr(error)
                raise RuntimeError(f"the answer checker's process did not start: {reason}") from error
        assert ready == READY, ready
        return process

    def _receive(self, deadline: float) -> Any:
        """The next JSON line; TimeoutError at `deadline`, EOFError if the process has ended."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._received:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                raise TimeoutError
            chunk = os.read(descriptor, 2**16)
            if not chunk:
                raise EOFError
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


def _send(process: "subprocess.Popen[bytes]", task: bytes, deadline: float) -> None:
    """Write a task; TimeoutError at `deadline` if a process that hangs leaves a part of it unread."""
    assert process.stdin is not None
    descriptor = process.stdin.fileno()
    while task:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([], [descriptor], [], left_s)[1]:
            raise TimeoutError
        task = task[os.write(descriptor, task) :]
