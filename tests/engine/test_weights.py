"""The student's weights on one rank, as rollout servers get them over the network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from padd_ds.engine.checkpoint import save_checkpoint
from padd_ds.engine.ranks import Ranks
from padd_ds.engine.weights import whole_tensors
from tests.ranks import run_ranks
from tests.world import deepspeed_tree, joint_config, make_student


def whole_and_saved(ranks: Ranks, folder: str, zero_stage: int, expert_parallel: int) -> list[dict[str, Any]]:
    student = make_student(ranks, joint_config(), deepspeed_tree(expert_parallel, zero_stage))
    for number, layer in enumerate(student.layers):
        layer.router.e_score_correction_bias.copy_(torch.arange(layer.num_experts) + number)
    whole = [{name: tensor.clone() for name, tensor in tensors.items()} for _, tensors in whole_tensors(student)]
    save_checkpoint(student, Path(folder), 1, {}, {"stage": "joint", "bias_target": "selection"})
    return whole


@pytest.mark.ranks
@pytest.mark.parametrize(("zero_stage", "expert_parallel"), [(2, 2), (3, 2), (3, 1)])
def test_rank_0_gets_every_tensor_of_the_checkpoint(tmp_path: Path, zero_stage: int, expert_parallel: int) -> None:
    first, second = run_ranks(whole_and_saved, 2, str(tmp_path), zero_stage, expert_parallel)
    whole = {name: tensor for layer in first for name, tensor in layer.items()}
    saved = {
        name: tensor for path in tmp_path.rglob("weights/*.safetensors") for name, tensor in load_file(path).items()
    }
    assert whole.keys() == saved.keys() and len(whole) == sum(len(layer) for layer in first)
    for name, tensor in saved.items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=0)
    assert any(tensor.max() > 1 for name, tensor in whole.items() if "e_score_correction_bias" in name)
    assert len(first) > 2, "a layer at a time"
    assert not any(second)
