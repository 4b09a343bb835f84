"""The scaling benchmark's cases, sums and table; a run of it is what `make bench-scaling` does."""

import pytest

from tools.bench_plan import sent_by_kind
from tools.bench_scaling import KINDS, Case, Measured, all_cases, step_seconds, table, trained_tokens
from tools.watched_train import MOVED


def test_every_layout_has_its_one_rank_to_be_compared_with() -> None:
    cases = all_cases(4)
    assert len(cases) == 2 * 2 * (1 + 2 + 2)
    assert all(case._replace(world=1, experts_over=1) in cases for case in cases)
    assert {case.experts_over for case in cases if case.world == 4} == {1, 4}


def test_every_collective_that_is_counted_has_its_column() -> None:
    assert sorted(kind for kinds in KINDS.values() for kind in kinds) == sorted(MOVED)


def test_a_ring_sends_a_sum_twice_and_all_but_a_ranks_own_share() -> None:
    ranks = [
        {"traffic": {"all_reduce over 4": 400, "all_to_all_single over 2": 100, "broadcast over 1": 70}},
        {"traffic": {"all_reduce over 4": 400, "all_to_all_single over 2": 300}},
    ]
    assert sent_by_kind(ranks) == {"all_reduce": 600, "all_to_all_single": 100, "broadcast": 0}


def test_a_step_takes_all_its_phases() -> None:
    line = {"seconds_rollout": 1.0, "seconds_scoring": 0.5, "seconds_update": 2.0, "tokens_per_second_update": 50.0}
    assert (trained_tokens(line), step_seconds(line)) == (100, 3.5)


@pytest.mark.parametrize(("speeds", "told"), [((100.0, 75.0), "0.75"), ((None, None), "")])
def test_a_speed_is_told_beside_that_of_one_rank(speeds: tuple[float | None, float | None], told: str) -> None:
    sent = dict.fromkeys(KINDS, 1234.4)
    alone, two = Case("warmup", 2, 1, 1), Case("warmup", 2, 2, 2)
    text = table({alone: Measured(speeds[0], sent), two: Measured(speeds[1], sent)})
    assert text.splitlines()[-1] == f"| warmup | 2 | 2 | 2 | {told} |" + " 1,234 |" * len(KINDS)
