"""The engine computes what the Hugging Face class computes, whatever the number of ranks."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import DataConfig, ModelConfig, OptimizerConfig
from padd_ds.engine.ranks import Ranks
from padd_ds.engine.student import Student, build_student
from padd_ds.engine.weights import EXPERT_NAMES, checkpoint_name, local_tensors
from padd_ds.losses.prior import expert_prior
from padd_ds.losses.tokens import cross_entropy_sum, global_mean
from padd_ds.losses.warmup import init_kl
from tests.ranks import run_ranks
from tests.tiny import tiny_student

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def deepspeed_tree(stage: int, expert_parallel: int) -> dict[str, Any]:
    # Under ZeRO-3 small parameters would stay whole.
    spread = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "zero_optimization": {"stage": stage, **spread},
        "gradient_clipping": 0.0,
        "expert_parallel": {"enabled": True, "autoep_size": expert_parallel, "use_grouped_mm": False},
    }


def run_config(**overrides: Any) -> RunConfig:
    values: dict[str, Any] = {
        "stage": "warmup",
        "run_dir": "unused",
        "deepspeed": "unused",
        "steps": 4,
        "micro_batch_size": 2,
        "model": ModelConfig(student="unused", teacher="unused"),
        "data": DataConfig(source="unused"),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
    }
    return RunConfig(**(values | overrides))


def build(ranks: Ranks, stage: int, expert_parallel: int, checkpointing: bool = False, **model: Any) -> Student:
    tree = deepspeed_tree(stage, expert_parallel)
    return build_student(
        tiny_student(),
        run_config(
            activation_checkpointing=checkpointing, model=ModelConfig(student="unused", teacher="unused", **model)
        ),
        tree,
        ranks,
        trainable=lambda name: True,
        accumulation_steps=1,
        total_steps=4,
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(3, 64, (4, 12), generator=generator)
    mask_BT = torch.ones(4, 12)
    mask_BT[1, 7:] = 0
    mask_BT[2, 3:] = 0
    return tokens_BT, mask_BT


def send_all_to_two_experts(model: torch.nn.Module, starve: bool) -> None:
    """Let every token choose experts 0 and 1, so that 2 and 3 get none; or as the scores say."""
    for name, bias_E in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias_E[:2] = 100.0 if starve else 0.0


def one_step(
    ranks: Ranks,
    stage: int,
    expert_parallel: int,
    expert_compute: str = "dispatched",
    starving_ranks: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """Loss of a step on this rank's share of four sequences, and the weights after it."""
    student = build(ranks, stage, expert_parallel, expert_compute=expert_compute)
    send_all_to_two_experts(student.model, ranks.rank in starving_ranks)
    tokens_BT, mask_BT = (part.chunk(ranks.world)[ranks.rank] for part in batch())
    student.engine.train()
    logits_BTV = student.engine(input_ids=tokens_BT, attention_mask=mask_BT.long(), use_cache=False).logits
    loss_sum = cross_entropy_sum(logits_BTV[:, :-1], tokens_BT[:, 1:], mask_BT[:, 1:])
    student.backward(global_mean(loss_sum, batch()[1][:, 1:].sum(), ranks.world))
    student.step()
    return {"loss_sum": loss_sum.detach(), "logits": logits_BTV.detach()} | {
        name: tensor.clone() for _, tensors in local_tensors(student) for name, tensor in tensors.items()
    }


def reference_step(world: int = 1, starving_ranks: Sequence[int] = ()) -> dict[str, Any]:
    """The same without ranks, one share after the other, and how many experts of a layer had a gradient."""
    model = tiny_student().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    loss_sum, shares = torch.zeros(()), []
    for rank, (tokens_BT, mask_BT) in enumerate(zip(*(part.chunk(world) for part in batch()), strict=True)):
        send_all_to_two_experts(model, rank in starving_ranks)
        logits_BTV = model(input_ids=tokens_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        loss_sum = loss_sum + cross_entropy_sum(logits_BTV[:, :-1], tokens_BT[:, 1:], mask_BT[:, 1:])
        shares.append(logits_BTV.detach())
    (loss_sum / batch()[1][:, 1:].sum()).backward()
    optimizer.step()
    # What rank 0 saves.
    send_all_to_two_experts(model, 0 in starving_ranks)
    gradient_EFD = model.model.layers[0].mlp.experts.gate_up_proj.grad
    assert gradient_EFD is not None
    return {
        "loss_sum": loss_sum.detach(),
        "logits": torch.cat(shares),
        "fed_experts": int(gradient_EFD.abs().amax(dim=(1, 2)).count_nonzero()),
        "state": copy.deepcopy(model.state_dict()),
    }


@pytest.mark.parametrize(
    ("world", "stage", "expert_parallel", "expert_compute"),
    [
        (1, 0, 1, "dispatched"),
        (2, 2, 1, "dispatched"),
        (2, 2, 2, "dispatched"),
        (4, 2, 2, "dispatched"),
        (2, 2, 1, "masked"),
        (2, 2, 2, "masked"),
        (4, 3, 2, "masked"),
        (2, 3, 1, "dispatched"),
        (2, 3, 2, "dispatched"),
        (4, 3, 2, "dispatched"),
    ],
)
def test_a_step_equals_plain_transformers(world: int, stage: int, expert_parallel: int, expert_compute: str) -> None:
    compare_with_reference(reference_step(), run_ranks(one_step, world, stage, expert_parallel, expert_compute))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("expert_compute", ["dispatched", "masked"])
@pytest.mark.parametrize(
    ("world", "expert_parallel", "starving_ranks"),
    [(2, 2, (0, 1)), (4, 4, (0, 1, 2, 3)), (4, 2, (0, 1))],
    ids=["a rank without tokens", "two ranks without tokens", "one of two replicas without tokens"],
)
def test_experts_that_get_no_token_hold_nobody_up(
    stage: int, expert_compute: str, world: int, expert_parallel: int, starving_ranks: tuple[int, ...]
) -> None:
    expected = reference_step(world, starving_ranks)
    assert expected["fed_experts"] == (2 if len(starving_ranks) == world else 4)
    compare_with_reference(expected, run_ranks(one_step, world, stage, expert_parallel, expert_compute, starving_ranks))


def compare_with_reference(expected: dict[str, Any], by_rank: list[dict[str, torch.Tensor]]) -> None:
    logits_BTV = torch.cat([result["logits"] for result in by_rank])
    real = batch()[1].bool()
    torch.testing.assert_close(logits_BTV[real], expected["logits"][real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(r["loss_sum"] for r in by_rank), expected["loss_sum"], rtol=1e-6, atol=0)
    merged = {name: tensor for result in by_rank for name, tensor in result.items()}
    for name, tensor in expected["state"].items():
        if ".experts." not in name:
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-5, msg=name)
    gate_up_EFD: torch.Tensor = expected["state"]["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(4):
        torch.testing.assert_close(
            merged[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"],
            gate_up_EFD[expert, :16],
            rtol=0,
            atol=2e-5,
        )


PRIOR_E = torch.tensor([0.1, 0.2, 0.3, 0.4])


def gradients(
    ranks: Ranks, expert_parallel: int, stage: int, checkpointing: bool = False, expert_compute: str = "dispatched"
) -> dict[str, torch.Tensor]:
    """Gradients of a language-model loss plus L_init, by checkpoint name, from a sigmoid of all sorts of tokens."""
    student = build(ranks, stage, expert_parallel, checkpointing=checkpointing, expert_compute=expert_compute)
    tokens_BT, mask_BT = (part.chunk(ranks.world)[ranks.rank] for part in batch())
    student.engine.train()
    with student.routing("routed", sample_S=torch.arange(tokens_BT.numel())):
        student.backward(_loss(student, tokens_BT, mask_BT, expert_parallel))
    return dict(_full_gradients(student))


def _loss(student: Student, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, expert_parallel: int) -> torch.Tensor:
    with student.recording() as record:
        logits_BTV = student.engine(input_ids=tokens_BT, attention_mask=mask_BT.long(), use_cache=False).logits
    loss_sum = cross_entropy_sum(logits_BTV[:, :-1], tokens_BT[:, 1:], mask_BT[:, 1:])
    activities = [record.activity_E[index] for index in range(len(student.layers))]
    init = torch.stack([init_kl(expert_prior(activity_E, 0.3), PRIOR_E) for activity_E in activities]).mean()
    return global_mean(loss_sum, batch()[1][:, 1:].sum(), student.ranks.world) + init * expert_parallel


def _full_gradients(student: Student) -> Any:
    for name, parameter in student.model.named_parameters():
        gradient = safe_get_full_grad(parameter)
        plain = checkpoint_name(name)
        if plain is not None:
            yield plain, gradient.clone()
            continue
        prefix, stacked = name.rsplit(".", 1)
        first = student.layers[0].ep_rank * student.layers[0].num_local_experts
        for offset, part in enumerate(gradient):
            yield f"{prefix}.{first + offset}.{EXPERT_NAMES[stacked]}.weight", part.clone()


def merged_gradients(world: int, *case: Any) -> dict[str, Any]:
    by_rank = run_ranks(gradients, world, *case)
    return {name: gradient for result in by_rank for name, gradient in result.items()}


def assert_same_gradients(
    found: dict[str, Any], expected: dict[str, Any], case: object, tolerance: float = 1e-6
) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        difference = float((found[name] - gradient).abs().max())
        assert difference <= tolerance * scale, (name, case, difference / scale)


def test_gradients_depend_neither_on_expert_parallelism_nor_on_the_zero_stage() -> None:
    """L_init sees the tokens of a whole expert-parallel group, so that group has all ranks here."""
    alone = merged_gradients(1, 1, 2)
    for case in ((2, 2, 3, True), (2, 2, 2), (4, 4, 2), (2, 2, 3)):
        assert_same_gradients(merged_gradients(*case), alone, case)
    # Masked, each rank adds up its own experts first: another order of fp32 sums.
    for case in ((2, 2, 3, True, "masked"), (4, 4, 2, False, "masked")):
        assert_same_gradients(merged_gradients(*case), alone, case, tolerance=4e-6)


def test_gradients_of_several_replicas_do_not_depend_on_the_zero_stage() -> None:
    for world, expert_parallel in ((2, 1), (4, 2)):
        expected = merged_gradients(world, expert_parallel, 1)
        for stage in (2, 3):
            case = (world, expert_parallel, stage)
            assert_same_gradients(merged_gradients(*case), expected, case)


def clipped(ranks: Ranks, expert_parallel: int, stage: int, bf16: bool, only_experts: bool) -> float:
    """The norm that a step was clipped by."""
    tree = deepspeed_tree(stage, expert_parallel) | {"gradient_clipping": 0.01, "bf16": {"enabled": bf16}}
    student = build_student(
        tiny_student(),
        run_config(),
        tree,
        ranks,
        trainable=lambda name: ".experts." in name or not only_experts,
        accumulation_steps=1,
        total_steps=4,
    )
    tokens_BT, mask_BT = (part.chunk(ranks.world)[ranks.rank] for part in batch())
    student.engine.train()
    with student.routing("routed", sample_S=torch.arange(tokens_BT.numel())):
        student.backward(_loss(student, tokens_BT, mask_BT, expert_parallel))
    student.step()
    return float(student.engine.get_global_grad_norm())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_norm_that_clips_is_that_of_all_gradients_at_any_zero_stage(bf16: bool) -> None:
    for only_experts in (True, False):
        for world in (1, 2):
            found = [run_ranks(clipped, world, world, stage, bf16, only_experts) for stage in (0, 2)]
            assert len(set(found[0])) == 1
            assert found[0][0] == pytest.approx(found[1][0], rel=0.02 if bf16 else 1e-5)
