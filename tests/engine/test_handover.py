"""A model that is not what it was is not trained."""

from pathlib import Path

import pytest
import torch

from padd_ds.checkpoint.layout import find_checkpoints
from padd_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from padd_ds.engine.handover import check_handover, probe_logits
from padd_ds.engine.ranks import Ranks
from padd_ds.errors import HandoverError
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import deepspeed_tree, joint_config, make_student


def test_logits_of_the_probe_do_not_depend_on_the_mode_and_leave_it() -> None:
    model = tiny_student().train()
    first = probe_logits(model, 64, torch.device("cpu"))
    assert model.training
    torch.testing.assert_close(first, probe_logits(model.eval(), 64, torch.device("cpu")))
    assert not model.training and first.shape == (16, 64) and first.std() > 0


@pytest.mark.parametrize(("precision", "passes", "fails"), [(torch.float32, 5e-5, 2e-4), (torch.bfloat16, 0.1, 0.3)])
def test_the_bound_is_that_of_the_precision(
    precision: torch.dtype, passes: float, fails: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("padd_ds.engine.handover.together", lambda action, ranks: action())
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    expected = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    check_handover(expected * (1 + passes), expected, precision, "a model", ranks)
    for wrong in (expected * (1 + fails), torch.full_like(expected, torch.nan)):
        with pytest.raises(HandoverError, match="a model: logits are off by"):
            check_handover(wrong, expected, precision, "a model", ranks)


def resume_otherwise(ranks: Ranks, folder: str) -> str:
    """What is said of a checkpoint that does not give back the student that was saved."""
    student = make_student(ranks, joint_config(), deepspeed_tree(2))
    save_checkpoint(student, Path(folder), 1, {}, {"stage": "joint"})

    def spoil(state: object) -> None:
        # One expert of one rank alone, as a mistaken share would be.
        if ranks.rank == 1:
            student.layers[0].experts.w1.data[0].mul_(1.5)

    try:
        load_checkpoint(student, find_checkpoints(Path(folder))[0], spoil)
    except HandoverError as error:
        return str(error)
    return ""


@pytest.mark.ranks
@pytest.mark.slow
def test_a_checkpoint_that_gives_back_another_student_is_refused_on_all_ranks(tmp_path: Path) -> None:
    for told in run_ranks(resume_otherwise, 2, str(tmp_path)):
        assert "step_1: logits are off by" in told
