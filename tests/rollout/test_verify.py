import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from padd_ds.data.answers import AnswerFormat, Tolerance
from padd_ds.rollout.verify import AnswerChecker

BOXED = AnswerFormat(name="boxed")


def children(pid: int = os.getpid()) -> set[int]:
    """Living child processes, zombies included, when two looks agree: a child whose thread ends is not seen by one."""
    one, other = _listed(pid), None
    while one != other:
        time.sleep(0.02)
        one, other = _listed(pid), one
    return one


def _listed(pid: int) -> set[int]:
    listed = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # that thread ended
            listed |= {int(child) for child in file.read_text().split()}
    return listed


@pytest.fixture(scope="module")
def auto():
    with AnswerChecker() as checker:
        yield checker


@pytest.fixture(scope="module")
def boxed():
    with AnswerChecker(BOXED) as checker:
        yield checker


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        (r"so $x = \frac{1}{2}$, \boxed{\frac12}", "0.5", True),
        ("The answer is 1,000 dollars.", "1000", True),
        ("the result is 15.", "13", False),
        ("it costs $36.", r"\$36", True),
        (r"\boxed{18.9}", r"\$18.90", True),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"$\boxed{2x+1}$", "1+2x", True),
        (r"\boxed{\text{Friday}}", r"\text{Friday}", True),
    ],
)
def test_math_verify_compares_values(auto, response, gold, correct):
    verdict = auto.check([(response, gold)])[0]
    assert (verdict.status, verdict.correct) == ("ok", correct)


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        ("", "5", "no_answer"),
        ("no box", "5", "no_answer"),
        ("no box", r"\frac{1}{2}", "no_answer"),
        (r"\boxed{5}", "", "gold_unparsable"),
        (r"\boxed{5}", "???", "gold_unparsable"),
        ("no box", "", "gold_unparsable"),
        (r"\boxed{\frac{}", "5", "no_answer"),
        (r"\boxed{???}", r"\frac{1}{2}", "ok"),
    ],
)
def test_what_cannot_be_compared_is_wrong_and_says_why(boxed, response, gold, status):
    verdict = boxed.check([(response, gold)])[0]
    assert (verdict.status, verdict.correct) == (status, False)


def test_verdicts_come_in_the_order_of_the_pairs_whatever_decided_them(boxed):
    pairs = [(f"\\boxed{{{answer}}}", "4") for answer in ("4", r"\frac{8}{2}", "5", "4", "2^2", "x")]
    verdicts = boxed.check(pairs)
    assert [verdict.correct for verdict in verdicts] == [True, True, False, True, True, False]
    assert [verdict.extracted for verdict in verdicts] == ["4", r"\frac{8}{2}", "5", "4", "2^2", "x"]


def test_each_pair_has_its_own_tolerance(auto, boxed):
    pairs, tolerances = [(r"\boxed{99}", "100")] * 2, [Tolerance(), Tolerance(relative=0.01)]
    for checker in (auto, boxed):
        assert [verdict.correct for verdict in checker.check(pairs, tolerances)] == [False, True]


def test_integers_need_no_process():
    before = children()
    with AnswerChecker(AnswerFormat(name="last_number")) as checker:
        verdicts = checker.check([("It is 13.", "13"), ("It is 12.", "13"), ("?", "13")])
        assert children() == before
    assert [verdict.correct for verdict in verdicts] == [True, False, False]
    assert [verdict.status for verdict in verdicts] == ["ok", "ok", "no_answer"]


@pytest.mark.slow
def test_a_hung_comparison_costs_its_timeout_and_nothing_else():
    hang = AnswerFormat(name="pattern", pattern=r"^((?:a|aa)+)$")
    with AnswerChecker(hang, timeout_s=3.0) as checker:
        checker.check([("a", "a")])  # start-up is not on the clock
        start = time.monotonic()
        verdicts = checker.check([("aaa", "aaa"), ("a" * 60 + "b", "a"), ("aa", "aa")])
        elapsed_s = time.monotonic() - start
    assert [verdict.status for verdict in verdicts] == ["ok", "timeout", "ok"]
    assert 3.0 <= elapsed_s < 60.0


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["1 2 3 4 ", r"\frac{1}{", r"\boxed{"])
def test_a_huge_response_is_bounded_by_the_timeout(unit):
    response = "$" + unit * (100_000 // len(unit)) + "$"
    with AnswerChecker(timeout_s=1.5) as checker:
        checker.check([("4", "4")])
        start = time.monotonic()
        verdict = checker.check([(response, "5")])[0]
        assert time.monotonic() - start < 30.0
    assert not verdict.correct


@pytest.mark.slow
def test_pathological_answers_cost_their_timeout_at_most():
    pairs = [("", "5"), (r"$9^{9^{9^{9^{9}}}}$", "5"), (r"\boxed{" + r"\sqrt{" * 300 + "2" + "}" * 301, "5")]
    with AnswerChecker(timeout_s=1.0) as checker:
        checker.check([("\\boxed{2x}", "x + x")])  # start-up is not on the clock
        start = time.monotonic()
        verdicts = checker.check([*pairs, (r"\boxed{\frac{10}{2}}", "5")])
        assert time.monotonic() - start < 60.0
    assert [verdict.correct for verdict in verdicts] == [False, False, False, True]
    assert verdicts[0].status == "no_answer"


def test_a_comparison_that_raises_is_an_error_and_spares_its_worker(monkeypatch):
    worker = """
        from padd_ds.rollout import verify_worker

        def compare(answer, *others):
            return 1 // int(answer) == 1

        verify_worker.compare = compare
        verify_worker.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(worker)]
    with AnswerChecker(BOXED, command=command) as checker:
        before = children()
        verdicts = checker.check([(r"\boxed{0}", "x"), (r"\boxed{1}", "x")])
        assert len(children() - before) == 1
    assert [(verdict.status, verdict.correct) for verdict in verdicts] == [("error", False), ("ok", True)]


def test_a_comparison_that_takes_too_much_memory_is_an_error_and_spares_its_worker():
    worker = """
        from padd_ds.rollout import verify_worker

        def compare(answer, *others):
            return len(bytearray(int(answer) * 2**30)) > 0

        verify_worker.compare = compare
        verify_worker.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(worker)]
    with AnswerChecker(BOXED, command=command) as checker:
        verdicts = checker.check([(r"\boxed{5}", "x"), (r"\boxed{1}", "x")])
    assert [(verdict.status, verdict.correct) for verdict in verdicts] == [("error", False), ("ok", True)]


def test_what_was_asked_of_a_worker_that_died_is_asked_again():
    with AnswerChecker() as checker:
        before = children()
        assert checker.check([("2", "2")])[0].correct
        (worker,) = children() - before
        os.kill(worker, signal.SIGKILL)
        verdicts = checker.check([("2", "2"), ("3", "3")])
        assert [verdict.status for verdict in verdicts] == ["ok", "ok"]


def test_a_worker_that_reads_nothing_costs_the_timeout_however_much_it_is_given():
    command = [sys.executable, "-c", "import time; print('\"ready\"', flush=True); time.sleep(600)"]
    with AnswerChecker(command=command, timeout_s=0.5) as checker:
        verdicts = checker.check([("2", "2"), ("3 " * 2**20, "3")])
    assert [(verdict.status, verdict.correct) for verdict in verdicts] == [("timeout", False)] * 2


def test_a_worker_that_is_stopped_is_replaced():
    with AnswerChecker(timeout_s=2.0) as checker:
        before = children()
        assert checker.check([("2", "2")])[0].correct
        (worker,) = children() - before
        os.kill(worker, signal.SIGSTOP)
        assert [verdict.status for verdict in checker.check([("3", "3"), ("4", "4")])] == ["timeout", "ok"]
        assert not _running(worker)


def test_an_answer_that_kills_two_workers_is_an_error():
    command = [sys.executable, "-c", "print('\"ready\"', flush=True); input()"]
    with AnswerChecker(command=command) as checker:
        verdicts = checker.check([("2", "2"), ("3", "3")])
    assert [(verdict.status, verdict.correct) for verdict in verdicts] == [("error", False)] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_process_tree_does_not_end_a_worker(number):
    with AnswerChecker() as checker:
        before = children()
        assert checker.check([("2", "2")])[0].correct
        workers = children() - before
        os.kill(next(iter(workers)), number)
        assert checker.check([("4", "4")])[0].correct
        assert children() - before == workers


def test_a_worker_that_cannot_start_is_an_error_with_its_reason():
    command = [sys.executable, "-c", "import sys; sys.exit('no such library')"]
    with AnswerChecker(command=command) as checker, pytest.raises(RuntimeError, match="no such library"):
        checker.check([("2", "2")])


def test_several_workers_share_the_pairs_and_leave_nobody_behind():
    before = children()
    with AnswerChecker(BOXED, workers=2) as checker:
        pairs = [(f"\\boxed{{\\frac{{{2 * n}}}{{2}}}}", str(n)) for n in range(1, 20)]
        assert all(verdict.correct for verdict in checker.check(pairs))
        assert 1 <= len(children() - before) <= 2
    assert children() == before


def test_workers_end_when_their_parent_is_killed():
    script = """
        import os, time
        from padd_ds.rollout.verify import AnswerChecker
        checker = AnswerChecker()
        checker.check([("2", "2")])
        print(checker._workers[0]._process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    worker = int(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    deadline = time.monotonic() + 10
    while _running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(worker)


def test_workers_load_no_torch():
    script = """
        import sys
        from padd_ds.rollout.verify_worker import judge
        from padd_ds.data.answers import AnswerFormat, Tolerance
        assert judge("$1/2$", "0.5", AnswerFormat())["correct"]
        print(sorted({"torch", "transformers", "deepspeed", "datasets"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return False
    return state != "Z"
