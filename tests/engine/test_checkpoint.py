"""Checkpoints: whole or absent, resumed with the same numbers, exported without loss."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeForCausalLM

from padd_ds.checkpoint.export import ExportOptions, export_run
from padd_ds.checkpoint.layout import find_checkpoints
from padd_ds.config.sections import OptimizerConfig
from padd_ds.engine.checkpoint import _trusted_deepspeed_types, last_whole_checkpoint, load_checkpoint, save_checkpoint
from padd_ds.engine.ranks import Ranks
from padd_ds.engine.student import build_student
from padd_ds.errors import UserError
from padd_ds.files import sha256_of
from padd_ds.hf import load_causal_lm
from padd_ds.run.folder import keep_student_files
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import FixedChecker, deepspeed_tree, joint_config, make_joint_stage, make_tokenizer

TOKENS = torch.tensor([[5, 9, 7, 4, 21, 8, 30, 11]])
FACTS = {"stage": "joint", "bias_target": "selection"}


def train_resume(ranks: Ranks, folder: str, expert_parallel: int, zero_stage: int) -> dict[str, Any]:
    """Three steps, a checkpoint after the first; then steps two and three again from the checkpoint."""
    checker = FixedChecker(lambda text, gold: len(text) % 2 == 0)
    run_dir, facts = Path(folder), FACTS
    stage = make_joint_stage(ranks, joint_config(), expert_parallel, checker, zero_stage=zero_stage)
    undisturbed = [dict(stage.step(0).metrics)]
    save_checkpoint(stage.student, run_dir, 1, stage.state(), facts)
    undisturbed += [dict(stage.step(step).metrics) for step in (1, 2)]
    save_checkpoint(stage.student, run_dir, 3, stage.state(), facts)
    if ranks.is_main:
        keep_student_files(run_dir, stage.student.model, make_tokenizer(), Path("none"))
    stage.student.engine.eval()
    with torch.no_grad():
        logits = stage.student.engine(input_ids=TOKENS, use_cache=False).logits
    again = make_joint_stage(ranks, joint_config(seed=0), expert_parallel, checker, zero_stage=zero_stage)
    load_checkpoint(again.student, find_checkpoints(run_dir)[0], again.load_state)
    resumed = [dict(again.step(step).metrics) for step in (1, 2)]
    return {"undisturbed": undisturbed, "resumed": resumed, "logits": logits}


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run_ranks(train_resume, 2, str(folder), 2, request.param)[0]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_resumed_run_repeats_the_undisturbed_one(trained: tuple[Path, dict[str, Any]]) -> None:
    _, result = trained
    for expected, resumed in zip(result["undisturbed"][1:], result["resumed"], strict=True):
        names = {name for name in expected if "second" not in name}
        assert {name: resumed[name] for name in names} == {name: expected[name] for name in names}
    assert result["undisturbed"][1]["loss_kd"] != result["undisturbed"][2]["loss_kd"]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_exported_student_computes_the_engines_logits(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = trained
    summary = export_run(ExportOptions(run=folder, output=tmp_path / "student", shard_bytes=20_000))
    assert summary.step == 3
    assert len(list((tmp_path / "student").glob("model-*.safetensors"))) > 1
    model = load_causal_lm(str(tmp_path / "student"), torch.float32)
    assert any(bias.abs().max() > 0 for name, bias in model.named_buffers() if "e_score" in name)
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits, result["logits"], rtol=1e-5, atol=1e-5)


def resumable(ranks: Ranks, folder: str) -> dict[str, Any]:
    """What a resumed run says of its checkpoints, the newest damaged."""
    refused, told = "", list[str]()
    try:
        last_whole_checkpoint(Path(folder), ranks, False, told.append)
    except UserError as error:
        refused = str(error)
    found = last_whole_checkpoint(Path(folder), ranks, True, told.append)
    assert found is not None and len(told) == (1 if ranks.is_main else 0)
    return {"refused": refused, "step": found.step}


@pytest.mark.ranks
@pytest.mark.slow
def test_damage_is_named(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = trained
    newest = find_checkpoints(folder)[-1].folder
    victim = newest / "weights" / "layer_00001.rank_00001.safetensors"
    whole = victim.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        victim.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rank_00001\.safetensors.*damaged"):
            export_run(ExportOptions(run=folder, output=tmp_path / "student"))
    for found in run_ranks(resumable, 2, str(folder)):
        assert found["step"] == 1 and "rank_00001.safetensors" in found["refused"]
    newest.with_name("damaged_step_3").rename(newest)
    victim.write_bytes(whole)
    (newest / "manifest.json").rename(newest / "elsewhere.json")
    assert [checkpoint.step for checkpoint in find_checkpoints(folder)] == [1]
    (newest / "elsewhere.json").rename(newest / "manifest.json")
    assert not (tmp_path / "student").exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_a_missing_expert_is_not_exported(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = trained
    victim = find_checkpoints(folder)[0].folder / "weights" / "layer_00001.rank_00001.safetensors"
    whole, tensors = victim.read_bytes(), load_file(victim)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    padding = {name + ".renamed": tensors.pop(name)}
    save_file(tensors | padding, victim)
    manifest = victim.parent.parent / "manifest.json"
    text = manifest.read_text()
    tree = json.loads(text)
    tree["files"]["weights/layer_00001.rank_00001.safetensors"] = {
        "bytes": victim.stat().st_size,
        "sha256": sha256_of(victim),
    }
    manifest.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        export_run(ExportOptions(run=folder, output=tmp_path / "student", step=1))
    victim.write_bytes(whole)
    manifest.write_text(text)


def train_bare(ranks: Ranks, folder: str) -> torch.Tensor:
    """A step at ZeRO-3 and a checkpoint of a student that has no shared experts; its logits."""
    student = build_student(
        tiny_student(shared=0),
        joint_config(),
        deepspeed_tree(2, 3),
        ranks,
        trainable=lambda name: True,
        accumulation_steps=1,
        total_steps=2,
    )
    student.backward(student.engine(input_ids=TOKENS, use_cache=False).logits.square().mean())
    student.step()
    save_checkpoint(student, Path(folder), 1, {}, FACTS)
    if ranks.is_main:
        keep_student_files(Path(folder), student.model, make_tokenizer(), Path("none"))
    with torch.no_grad():
        logits: torch.Tensor = student.engine(input_ids=TOKENS, use_cache=False).logits
    return logits


@pytest.mark.ranks
@pytest.mark.slow
def test_a_student_without_shared_experts_trains_at_zero_3_and_is_exported_whole(tmp_path: Path) -> None:
    expected = run_ranks(train_bare, 2, str(tmp_path / "run"))[0]
    export_run(ExportOptions(run=tmp_path / "run", output=tmp_path / "student"))
    model, info = Glm4MoeForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        before = tiny_student(shared=0)(input_ids=TOKENS, use_cache=False).logits
    assert (before - logits).abs().max() > 1e-3


class Reduced:
    """Pickles as a call of getattr, as Python 3.11.0 to 3.11.3 pickle a member of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self.call = (owner, name)

    def __reduce__(self) -> Any:
        return getattr, self.call


@pytest.mark.parametrize("owner", [ZeroStageEnum, str])
def test_a_checkpoint_may_name_enum_members_and_nothing_else(owner: Any, tmp_path: Path) -> None:
    torch.save(Reduced(owner, "gradients" if owner is ZeroStageEnum else "upper"), tmp_path / "file.pt")
    with _trusted_deepspeed_types():
        if owner is ZeroStageEnum:
            assert torch.load(tmp_path / "file.pt") is ZeroStageEnum.gradients
        else:
            with pytest.raises(pickle.UnpicklingError):
                torch.load(tmp_path / "file.pt")


def settings_after_resuming(ranks: Ranks, folder: str, zero_stage: int) -> list[tuple[float, ...]]:
    """Learning rate, weight decay and betas of every group: of a run, and of one resumed with other settings."""
    found = []
    checker = FixedChecker(lambda text, gold: len(text) % 2 == 0)
    first = OptimizerConfig(learning_rate=1e-3, schedule="linear")
    second = OptimizerConfig(learning_rate=1e-6, weight_decay=0.3, betas=(0.5, 0.6), schedule="linear")
    for options in (first, first, second):
        stage = make_joint_stage(ranks, joint_config(optimizer=options), 1, checker, zero_stage=zero_stage)
        if found:
            load_checkpoint(stage.student, find_checkpoints(Path(folder))[0], stage.load_state)
        else:
            stage.step(0)
            save_checkpoint(stage.student, Path(folder), 1, stage.state(), FACTS)
        groups = stage.student.engine.optimizer.param_groups
        found.append([(group["lr"], group["weight_decay"], *group["betas"]) for group in groups])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_resumed_run_has_its_own_optimizer_settings(zero_stage: int, tmp_path: Path) -> None:
    ((before, same, other),) = run_ranks(settings_after_resuming, 1, str(tmp_path), zero_stage)
    assert same == before and all(0 < rate < 1e-3 for rate, *_ in before)
    share = before[0][0] / 1e-3
    assert other == [pytest.approx((share * 1e-6, 0.3, 0.5, 0.6))] * len(before)
