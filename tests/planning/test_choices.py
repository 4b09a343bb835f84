"""What is recommended fits, and is the fastest that does."""

from dataclasses import replace

import pytest

from padd_ds.planning.choices import Question, all_choices, recommended
from padd_ds.planning.cluster import Cluster
from padd_ds.planning.compute import as_it_runs, copies_of_a_token
from padd_ds.planning.estimate import estimate_step
from padd_ds.planning.traffic import step_transfers
from tests.planning.test_memory import DENSE, EXPERTS, LAYOUT, SHAPE, WORK

CLUSTER = Cluster(
    devices_per_node=4,
    memory_gib=80,
    tflops=1000,
    memory_gb_per_s=3000,
    within_node_gb_per_s=400,
    between_nodes_gb_per_s=50,
)
LARGE = replace(
    SHAPE, layers=48, width=2048, heads=32, head_width=128, vocabulary=150_000, experts=128, expert_width=768
)


def question(memory_gib: float, work=WORK, shape=LARGE) -> Question:  # type: ignore[no-untyped-def]
    cluster = replace(CLUSTER, memory_gib=memory_gib)
    return Question(student=shape, teacher=shape, longest=work, mean=work, cluster=cluster)


def test_every_stage_and_every_size_that_divides_is_there() -> None:
    choices = all_choices(question(80), LAYOUT)
    assert {(c.layout.zero_stage, c.layout.expert_parallel) for c in choices} == {
        (stage, size) for stage in range(4) for size in (1, 2, 4)
    }


def test_the_recommended_one_fits_and_none_that_fits_is_faster() -> None:
    asked = question(400)
    choices = all_choices(asked, LAYOUT)
    best, changes = recommended(asked, choices)
    assert best is not None and best.fits and changes == []
    assert best.estimate.step_s == pytest.approx(min(c.estimate.step_s for c in choices if c.fits), abs=1e-3)
    assert any(not c.fits for c in choices)


def test_where_nothing_fits_as_little_as_possible_is_changed() -> None:
    asked = question(400)
    peaks = sorted(choice.memory.peak for choice in all_choices(asked, LAYOUT))
    tight = question(peaks[0] / 2**30 + CLUSTER.reserved_gib - 1)
    best, changes = recommended(tight, all_choices(tight, LAYOUT))
    assert best is not None and best.fits and len(changes) == 1
    hopeless = question(3)
    best, tried = recommended(hopeless, all_choices(hopeless, LAYOUT))
    assert best is None and "zero_optimization.offload_optimizer.device=cpu" in tried


def test_transfers_by_hand() -> None:
    """Two updates of two micro-batches; four ranks, two to a set of experts."""
    by_name = {(one.phase, one.what, one.ranks, one.kind): one for one in step_transfers(SHAPE, SHAPE, LAYOUT, WORK)}
    tokens = by_name["update", "tokens to experts and back", 2, "all_to_all"]
    # layers x (dispatch and combine, and again backward) x micro-batches x rows x tokens x top-k x width x bytes
    assert tokens.moved == 2 * 4 * 4 * 2 * 32 * 2 * 64 * 2
    assert tokens.sent == tokens.moved / 2
    gradients = by_name["update", "gradients", 4, "all_reduce"]
    assert gradients.moved == 4 * DENSE * 2 and gradients.sent == 2 * 3 / 4 * gradients.moved
    experts = step_transfers(SHAPE, SHAPE, LAYOUT, WORK)
    shared = [one.moved for one in experts if one.ranks == 2 and one.what == "updated weights"]
    assert shared == [2 * EXPERTS / 2 * 2]


def test_a_lone_rank_sends_nothing() -> None:
    assert step_transfers(SHAPE, SHAPE, replace(LAYOUT, world=1, expert_parallel=1), WORK) == []


def test_masked_experts_by_hand() -> None:
    """Two of eight experts, four to a rank: a token needs both ranks unless both its experts are on one of them."""
    masked, alone = replace(WORK, masked=True), replace(LAYOUT, world=1, expert_parallel=1)
    assert copies_of_a_token(SHAPE, LAYOUT, WORK) == 2
    assert copies_of_a_token(SHAPE, LAYOUT, masked) == pytest.approx(2 * (1 - 6 / 28))
    assert copies_of_a_token(SHAPE, alone, masked) == 1
    assert as_it_runs(SHAPE, LAYOUT, WORK) is SHAPE
    assert as_it_runs(SHAPE, LAYOUT, masked).top_k == 6  # 11 / 7 ranks of four
    assert as_it_runs(SHAPE, alone, masked).top_k == 8
    moved = [one.moved for one in step_transfers(SHAPE, SHAPE, LAYOUT, masked) if one.what.startswith("tokens")]
    sent = [one.moved for one in step_transfers(SHAPE, SHAPE, LAYOUT, WORK) if one.what.startswith("tokens")]
    # A row has four weights more, one way of two.
    assert moved == pytest.approx([11 / 14 * 66 / 64 * bytes_sent for bytes_sent in sent])
    usual, as_masked = (estimate_step(SHAPE, SHAPE, LAYOUT, work, CLUSTER) for work in (WORK, masked))
    assert as_masked.flops == usual.flops
    assert as_masked.computing_s["update"] > usual.computing_s["update"]


def test_collectives_beyond_a_node_take_the_slower_wire() -> None:
    layout = replace(LAYOUT, world=8, expert_parallel=4)
    inside = estimate_step(SHAPE, None, layout, WORK, replace(CLUSTER, devices_per_node=8, latency_us=0))
    across = estimate_step(SHAPE, None, layout, WORK, replace(CLUSTER, latency_us=0))
    assert across.communicating_s["all_to_all"] == inside.communicating_s["all_to_all"]
    assert across.communicating_s["all_reduce"] == pytest.approx(8 * inside.communicating_s["all_reduce"])
