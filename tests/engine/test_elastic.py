"""A run that goes on at another size: the same losses, or a refusal with its reason."""

from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds.checkpoint.layout import Checkpoint, find_checkpoints
from padd_ds.config.sections import OptimizerConfig
from padd_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from padd_ds.engine.elastic import check_resizable
from padd_ds.engine.ranks import Ranks, sum_over_ranks
from padd_ds.engine.student import Student, build_student
from padd_ds.errors import UserError
from padd_ds.losses.tokens import cross_entropy_sum, global_mean
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import deepspeed_tree, joint_config

SEQUENCES, TOKENS = 8, 10
Size = tuple[int, int, int]
"""Ranks, expert-parallel size, ZeRO stage."""


def make(ranks: Ranks, expert_parallel: int, stage: int, offloaded: tuple[str, ...] = ()) -> Student:
    """A student whose learning rate falls, so that a schedule that was not restored would show."""
    config = joint_config(optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear"))
    tree = deepspeed_tree(expert_parallel, stage)
    tree["zero_optimization"] |= {part: {"device": "cpu"} for part in offloaded}
    return build_student(
        tiny_student(), config, tree, ranks, trainable=lambda name: True, accumulation_steps=1, total_steps=10
    )


def loss_of_step(student: Student, step: int) -> float:
    """Train on the same sequences whatever the number of ranks; the mean loss over all tokens."""
    generator = torch.Generator().manual_seed(100 + step)
    ids_BT = torch.randint(3, 64, (SEQUENCES, TOKENS), generator=generator)
    mine_BT = ids_BT.chunk(student.ranks.world)[student.ranks.rank]
    student.engine.train()
    logits_BTV = student.engine(input_ids=mine_BT, use_cache=False).logits
    loss_sum = cross_entropy_sum(logits_BTV[:, :-1], mine_BT[:, 1:], torch.ones(mine_BT[:, 1:].shape))
    n_tokens = torch.tensor(float(SEQUENCES * (TOKENS - 1)))
    student.backward(global_mean(loss_sum, n_tokens, student.ranks.world))
    student.step()
    return float(sum_over_ranks(loss_sum)) / float(n_tokens)


def undisturbed(
    ranks: Ranks, folder: str, expert_parallel: int, stage: int, offloaded: tuple[str, ...] = ()
) -> list[float]:
    """Two steps, a checkpoint, and the losses of the next five."""
    student = make(ranks, expert_parallel, stage, offloaded)
    for step in range(2):
        loss_of_step(student, step)
    save_checkpoint(student, Path(folder), 2, {"kept": torch.arange(3)}, {"stage": "joint"})
    return [loss_of_step(student, step) for step in range(2, 7)]


def resumed(
    ranks: Ranks, folder: str, expert_parallel: int, stage: int, offloaded: tuple[str, ...] = ()
) -> list[float]:
    student = make(ranks, expert_parallel, stage, offloaded)
    remembered: dict[str, torch.Tensor] = {}
    load_checkpoint(student, find_checkpoints(Path(folder))[0], remembered.update)
    assert list(remembered) == ["kept"] and torch.equal(remembered["kept"], torch.arange(3))
    return [loss_of_step(student, step) for step in range(2, 7)]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "targets"),
    [((2, 2, 2), [(1, 1, 2), (4, 4, 1)]), ((2, 2, 3), [(2, 1, 3), (1, 1, 3)]), ((1, 1, 1), [(2, 2, 2)])],
)
def test_a_run_goes_on_at_another_size_with_the_same_losses(source: Size, targets: list[Size], tmp_path: Path) -> None:
    expected = run_ranks(undisturbed, source[0], str(tmp_path), *source[1:])[0]
    assert max(expected) - min(expected) > 1e-2
    for target in targets:
        found = run_ranks(resumed, target[0], str(tmp_path), *target[1:])[0]
        assert found == pytest.approx(expected, abs=1e-5), target
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


@pytest.mark.ranks
@pytest.mark.slow
def test_offloaded_weights_and_optimizers_train_alike_and_resume(tmp_path: Path) -> None:
    both = ("offload_optimizer", "offload_param")
    expected = run_ranks(undisturbed, 2, str(tmp_path / "kept"), 2, 2)[0]
    for stage, offloaded in ((2, both[:1]), (3, both)):
        folder = str(tmp_path / f"{stage}")
        assert run_ranks(undisturbed, 2, folder, 2, stage, offloaded)[0] == pytest.approx(expected, abs=1e-5)
        assert run_ranks(resumed, 2, folder, 2, stage, offloaded)[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("there", "here", "remedy"), [(2, 3, "1 or 2"), (3, 2, "to 3"), (0, 2, "to 0"), (1, 0, "1 or 2")]
)
def test_what_deepspeed_cannot_convert_is_refused_with_what_works(there: int, here: int, remedy: str) -> None:
    facts: dict[str, Any] = {"zero_stage": there}
    with pytest.raises(UserError, match=f"ZeRO stage {there}, resumed at {here}.*{remedy}"):
        check_resizable(Checkpoint(folder=Path("runs/a/checkpoints/step_2"), step=2, facts=facts), here)
