"""Memory of a rank: parts worked out by hand, and activations against what autograd really keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from padd_ds.config.sections import ModelConfig
from padd_ds.engine.ranks import Ranks
from padd_ds.engine.student import build_student
from padd_ds.hf import response_logits
from padd_ds.planning.memory import activations, plan_memory
from padd_ds.planning.shape import ModelShape, shape_of
from padd_ds.planning.workload import Layout, Workload
from padd_ds.stages import warmup
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import deepspeed_tree, joint_config

SHAPE = ModelShape(
    layers=2, dense_layers=0, width=64, heads=4, kv_heads=2, head_width=16, vocabulary=100, tied=False, ffn_width=0,
    experts=8, top_k=2, expert_width=32, shared_width=32,
)  # fmt: skip
WORK = Workload(
    stage="joint", prompt_tokens=8, response_tokens=24, rows=8, updates=2, micro_batch=2, group=4, prompts_at_once=2,
    checkpointing=False, distils=True, trains_all=True,
)  # fmt: skip
LAYOUT = Layout(world=4, zero_stage=2, expert_parallel=2, value_bytes=2, reduce_bucket=1000)
EXPERTS = 2 * 8 * 3 * 64 * 32
DENSE = 2 * (64 * (2 * 64 + 2 * 32) + 2 * 64) + 2 * 8 * 64 + 2 * 3 * 64 * 32 + 2 * 100 * 64 + 64


def test_parts_by_hand_at_zero_2_in_bf16() -> None:
    assert (SHAPE.dense_parameters, SHAPE.expert_parameters) == (DENSE, EXPERTS)
    plan = plan_memory(SHAPE, SHAPE, LAYOUT, WORK)
    backward = plan.moments["backward"]
    assert backward["weights"] == 2 * (DENSE + EXPERTS / 2)
    assert backward["optimizer"] == 12 * (DENSE + EXPERTS) / 4
    assert backward["gradients"] == 2 * (DENSE + EXPERTS) / 4
    assert backward["teacher"] == 2 * (DENSE + EXPERTS)
    assert backward["reduction buckets"] == backward["reduction"] == 2 * 1000
    caches = plan.moments["rollout"]["KV cache"]
    one_layer = 2 * 4 * 32 * 2 * 32 * 2  # prompts, responses, tokens, keys with values, width, bytes
    assert caches == 2 * one_layer + one_layer * (1 + 2)
    assert plan.peak == max(sum(parts.values()) for parts in plan.moments.values())


def test_zero_3_spreads_the_weights_and_gathers_what_may_live() -> None:
    layout = replace(LAYOUT, zero_stage=3, live_parameters=500)
    parts = plan_memory(SHAPE, SHAPE, layout, WORK).moments["loss"]
    assert parts["weights"] == 2 * (DENSE + EXPERTS) / 4
    assert parts["gathered weights"] == 2 * 500


def test_what_is_offloaded_goes_to_the_host() -> None:
    layout = replace(LAYOUT, zero_stage=3, offloads_optimizer=True, offloads_weights=True)
    work = replace(WORK, teacher_placement="offloaded")
    plan = plan_memory(SHAPE, SHAPE, layout, work)
    assert set(plan.host) == {"weights", "optimizer", "teacher"}
    for parts in plan.moments.values():
        assert not {"weights", "optimizer", "teacher"} & set(parts)
    assert plan.host["optimizer"] == (12 + 4) * (DENSE + EXPERTS) / 4


def test_a_rank_without_offload_keeps_nothing_on_the_host() -> None:
    assert plan_memory(SHAPE, SHAPE, LAYOUT, WORK).host == {}


def wide_student() -> Glm4MoeForCausalLM:
    """Wide enough that indices and counts, which the plan leaves out, do not matter beside activations."""
    wide = {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "head_dim": 32,
        "num_attention_heads": 8,
        "use_qk_norm": True,
    }
    return Glm4MoeForCausalLM(Glm4MoeConfig(**tiny_student().config.to_dict() | wide))


def kept_bytes(ranks: Ranks, stage: str, precision: str, expert_compute: str) -> int:
    """What autograd saves of a forward pass, beside parameters and logits."""
    model = ModelConfig(student="unused", teacher="unused", expert_compute=expert_compute)  # type: ignore[arg-type]
    config = joint_config(stage=stage, model=model)
    more: dict[str, Any] = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    trained = (lambda name: warmup.is_trained(name, True)) if stage == "warmup" else (lambda name: True)
    student = build_student(
        wide_student(), config, deepspeed_tree(1, **more), ranks, trainable=trained, accumulation_steps=1, total_steps=1
    )
    known = {parameter.untyped_storage().data_ptr() for parameter in student.model.parameters()}
    sizes: dict[int, int] = {}
    tensors = []  # kept alive, so that no storage's address is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    ids_BL = torch.randint(5, 60, (4, 48), generator=torch.Generator().manual_seed(0))
    student.engine.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with student.routing("routed"), hooks:
        logits_BRV = response_logits(student.engine, ids_BL, torch.ones_like(ids_BL).tril(20), 40)
    return sum(sizes.values()) - sizes.get(logits_BRV.untyped_storage().data_ptr(), 0)


KINDS = [(s, p, e) for s in ("joint", "warmup") for p in ("fp32", "bf16") for e in ("dispatched", "masked")]


def kept_by_kind(ranks: Ranks) -> dict[str, int]:
    return {", ".join(kind): kept_bytes(ranks, *kind) for kind in KINDS}


@pytest.mark.ranks
@pytest.mark.slow
def test_activations_are_what_autograd_keeps() -> None:
    shape = shape_of(wide_student().config, "wide")
    kept = run_ranks(kept_by_kind, 1)[0]
    for stage, precision, expert_compute in KINDS:
        work = replace(WORK, micro_batch=4, prompt_tokens=8, response_tokens=40, trains_all=stage == "joint")
        work = replace(work, masked=expert_compute == "masked")
        layout = Layout(world=1, zero_stage=2, expert_parallel=1, value_bytes=2 if precision == "bf16" else 4)
        name = f"{stage}, {precision}, {expert_compute}"
        assert activations(shape, layout, work) == pytest.approx(kept[name], rel=0.1), name
