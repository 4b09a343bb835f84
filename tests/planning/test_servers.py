"""Rollout servers in a plan: their share of the training's GPUs, nodes of their own, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from padd_ds.errors import UserError
from padd_ds.planning.choices import Question
from padd_ds.planning.cluster import Cluster
from padd_ds.planning.plan import make_plan
from padd_ds.planning.servers import ServerPlan, plan_servers
from padd_ds.planning.traffic import step_transfers
from tests.planning.test_memory import DENSE, EXPERTS, LAYOUT, SHAPE, WORK
from tests.world import joint_config

GIB = 2**30
CLUSTER = Cluster(
    nodes=2, devices_per_node=4, memory_gib=10, host_memory_gib=64, tflops=1, memory_gb_per_s=1,
    within_node_gb_per_s=1, between_nodes_gb_per_s=1,
)  # fmt: skip


def planned(server_nodes: int | None = None, cluster: Cluster = CLUSTER, **vllm: Any) -> ServerPlan:
    config = joint_config(rollout={"engine": "vllm", "prompts": 8, "max_new_tokens": 6}, vllm=vllm)
    plan = plan_servers(config, SHAPE, cluster, 2, server_nodes)
    assert plan is not None
    return plan


def test_servers_of_the_ranks_by_hand() -> None:
    plan = planned(ranks_per_server=4, tensor_parallel=2, memory_share=0.5)
    assert (plan.servers, plan.nodes, plan.sleep) == (2, 0, True)
    assert plan.weights == 2 * (DENSE + EXPERTS) / 2 and plan.room == 5 * GIB
    assert plan.longest == (16 + 6) * 2 * 32 * 2 * 2 / 2  # tokens, keys with values, width, layers, bytes, GPUs
    assert plan.exchanged == 2 * (DENSE + EXPERTS)
    assert planned(exchange="/shared").exchanged == 0
    assert planned(cache_gib=3).room == 2 * (DENSE + EXPERTS) + 3 * GIB


def test_servers_of_their_own_take_nothing_of_the_training() -> None:
    plan = planned(servers="urls", transport="network", tensor_parallel=2, server_nodes=2)
    assert (plan.servers, plan.nodes, plan.exchanged) == (4, 2, 0)
    assert (plan.share.awake, plan.share.asleep) == (0, 0)
    with pytest.raises(UserError, match="3 nodes of 4 servers are more than the 8 ranks"):
        planned(servers="urls", transport="network", server_nodes=3)
    with pytest.raises(UserError, match="tensor_parallel 3 does not divide the 4 devices"):
        planned(servers="urls", transport="network", tensor_parallel=3)
    with pytest.raises(UserError, match="--server-nodes is for"):
        planned(server_nodes=1)


@pytest.mark.parametrize("sleep", [True, False])
def test_a_server_that_sleeps_is_there_in_the_rollout_alone(sleep: bool) -> None:
    plan = planned(sleep=sleep)
    question = Question(
        student=SHAPE, teacher=SHAPE, longest=replace(WORK, served=plan.share), mean=WORK, cluster=CLUSTER, servers=plan
    )
    moments = question.answer(LAYOUT).memory.moments
    assert moments["rollout"]["rollout server"] == 4 * GIB and "KV cache" not in moments["rollout"]
    assert moments["loss"]["rollout server"] == (0 if sleep else 4 * GIB)


def test_what_is_too_small_for_the_student_does_not_fit() -> None:
    plan = planned()
    question = Question(student=SHAPE, teacher=SHAPE, longest=WORK, mean=WORK, cluster=CLUSTER, servers=plan)
    assert plan.fits and question.answer(LAYOUT).fits
    tight = replace(plan, room=plan.weights)
    assert not tight.fits and not replace(question, servers=tight).answer(LAYOUT).fits
    crowded = replace(plan, exchanged=33 * GIB)
    assert not replace(question, servers=crowded).answer(LAYOUT).fits


def test_ranks_send_no_tokens_in_a_rollout_that_servers_do_and_gather_the_weights_once() -> None:
    served, layout = replace(WORK, served=planned().share), replace(LAYOUT, zero_stage=3)
    sent = [one for one in step_transfers(SHAPE, SHAPE, layout, served) if one.phase == "rollout"]
    assert {(one.kind, one.moved) for one in sent} == {("all_gather", 2 * DENSE), ("all_gather", EXPERTS)}


def test_the_papers_student_is_refused_on_one_gpu_and_taken_on_two(repository: Path) -> None:
    run, cluster = repository / "ds_configs/plans/paper.yaml", repository / "ds_configs/clusters/h100.yaml"
    options = ["rollout.engine=vllm", "vllm.servers=urls", "vllm.transport=network"]
    options += [f"deepspeed={repository}/ds_configs/gpu_zero2_ep8.json"]
    options += [f"model.{name}={repository}/ds_configs/plans/paper/{name}" for name in ("student", "teacher")]
    options += ["vllm.memory_share=0.6"]
    refused = make_plan(run, options, cluster, nodes=2)
    assert not refused.fits and "The student does not fit a rollout server" in refused.text
    plan = make_plan(run, [*options, "vllm.tensor_parallel=2"], cluster, nodes=2, server_nodes=2)
    assert plan.fits and "Rollout servers: 8 of 2 GPUs each, on 2 nodes of their own" in plan.text
    assert plan.facts["servers"]["fits"] and "rollout" not in plan.facts["asked"]["computing_s"]
