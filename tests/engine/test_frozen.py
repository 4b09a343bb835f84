"""A frozen model gives the same logits wherever its weights are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds.config.sections import ModelConfig
from padd_ds.engine import frozen
from padd_ds.engine.frozen import place_frozen
from padd_ds.engine.ranks import Ranks
from padd_ds.hf import prompt_cache
from padd_ds.stages.materials import load_reference
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import joint_config, make_joint_stage
from tools.tiny_model import make_tiny_model

IDS = torch.tensor([[5, 9, 7, 4, 8], [3, 3, 6, 5, 9]])


def placed(ranks: Ranks) -> dict[str, Any]:
    frozen.PERSISTENT_ELEMENTS = 0
    found = {}
    for placement in ("replicated", "sharded", "offloaded"):
        model = place_frozen(make_tiny_model(), placement, torch.float32, ranks)
        # Other tokens on each rank, and all that the teacher does in a step.
        ids_BT = IDS + ranks.rank
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            cache = prompt_cache(model, ids_BT, torch.ones_like(ids_BT))
            last_BTV = model(input_ids=ids_BT[:, -1:], past_key_values=cache).logits
        held = sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters())
        found[placement] = {"logits": logits_BTV, "last": last_BTV, "held": held}
    return found


@pytest.mark.ranks
@pytest.mark.slow
def test_logits_do_not_depend_on_where_the_weights_are() -> None:
    for found in run_ranks(placed, 2):
        whole = found["replicated"]
        for placement in ("sharded", "offloaded"):
            assert found[placement]["held"] < 0.51 * whole["held"]
            for name in ("logits", "last"):
                torch.testing.assert_close(found[placement][name], whole[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(whole["last"][:, 0], whole["logits"][:, -1], rtol=0, atol=1e-5)


def joint_steps(ranks: Ranks, zero_stage: int) -> list[dict[str, float]]:
    """Two steps with a teacher and a reference with experts that are whole, and two with spread ones."""
    frozen.PERSISTENT_ELEMENTS = 0
    found = []
    config = joint_config(policy={"updates_per_rollout": 2, "kl_weight": 0.5})
    for placement in ("replicated", "sharded"):
        stage = make_joint_stage(ranks, config, 2, zero_stage=zero_stage, placement=placement)
        found.append([dict(stage.step(step).metrics) for step in range(2)][-1])
    return found


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_joint_step_does_not_depend_on_where_the_frozen_models_are(zero_stage: int) -> None:
    whole, spread = run_ranks(joint_steps, 2, zero_stage)[0]
    assert whole["loss_kd"] > 0 and whole["kl_reference_nats"] > 0
    names = {name for name in whole if "second" not in name}
    assert {name: spread[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-5)


def share_of_the_reference(ranks: Ranks, student: Path) -> float:
    """What a rank holds of the reference, which is the student as it began, by the run's own placement."""
    frozen.PERSISTENT_ELEMENTS = 0
    model = ModelConfig(student=str(student), teacher="unused", teacher_placement="sharded")
    config = joint_config(policy={"updates_per_rollout": 2, "kl_weight": 0.5}, model=model)
    parameters: Any = list(load_reference(config, torch.float32, ranks).parameters())
    return sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)


@pytest.mark.ranks
@pytest.mark.slow
def test_the_reference_is_where_the_teacher_is(tmp_path: Path) -> None:
    tiny_student().save_pretrained(tmp_path)
    assert run_ranks(share_of_the_reference, 2, tmp_path) == pytest.approx([0.5, 0.5], rel=0.01)
