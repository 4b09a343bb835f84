"""Writing and reading a run's checkpoints from all ranks.

What a checkpoint holds stands in padd_ds/checkpoint/layout.py.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from padd_ds.checkpoint.layout import (
    DEEPSPEED_TAG,
    MANIFEST,
    STAGE_STATE,
    WEIGHTS,
    Checkpoint,
    check_sizes,
    checkpoint_folders,
    read_checkpoint,
)
from padd_ds.checkpoint.probe import PROBE
from padd_ds.engine.elastic import check_resizable, load_resized
from padd_ds.engine.handover import check_handover
from padd_ds.engine.ranks import Ranks, barrier, gather_objects, on_main, together
from padd_ds.engine.student import Student
from padd_ds.engine.weights import local_tensors
from padd_ds.errors import OneRankError, UserError
from padd_ds.files import DISK_FULL_HINT, disk_full_is_user_error, give_usual_modes, replace_folder, sha256_of


def save_checkpoint(
    student: Student,
    run_dir: Path,
    step: int,
    stage_state: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
) -> Path:
    """Write `checkpoints/step_{step}` from all ranks; it appears under its name only when all have written.

    UserError when the disk is full; a OneRankError where the other ranks wait in DeepSpeed's own part: the process
    has to end then, and its launcher ends theirs.
    """
    final = run_dir / "checkpoints" / f"step_{step}"
    staged = final.with_name(f".{final.name}.partial")
    ranks = student.ranks
    together(lambda: _fresh_folder(staged) if ranks.is_main else None, ranks)
    try:
        for label, tensors in local_tensors(student):
            path = staged / WEIGHTS / f"{label}.rank_{ranks.rank:05d}.safetensors"
            together(partial(_write_tensors, tensors, path), ranks)
        own = dict(stage_state) | {PROBE: student.probe()}
        together(lambda: _write_tensors(own, staged / STAGE_STATE) if ranks.is_main else None, ranks)
        _write_deepspeed_files(student, staged)
        # Each rank is sure to see its own files; those of other nodes may not be listed to it yet.
        names = sorted(set().union(*gather_objects(_file_names(staged), ranks)))
        hashes = together(lambda: _hashes(staged, names[ranks.rank :: ranks.world]), ranks)
        gathered = gather_objects(hashes, ranks)
        files = {name: entry for part in gathered for name, entry in part.items()}
        manifest = {"step": step, **facts, **size_facts(student), "files": files}
        together(lambda: _seal(staged, final, manifest) if ranks.is_main else None, ranks)
    except UserError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return final


def load_checkpoint(
    student: Student, checkpoint: Checkpoint, load_state: Callable[[Mapping[str, torch.Tensor]], None]
) -> None:
    """Put the student back to where `checkpoint` left it, and give the stage what it remembered.

    Another number of ranks, expert-parallel size or ZeRO stage than its own goes by DeepSpeed's universal format;
    UserError where that is not possible; HandoverError if the student does not compute what was saved. Learning rate,
    weight decay and betas stay the student's.
    """
    same = all(checkpoint.facts[name] == value for name, value in size_facts(student).items())
    with _own_optimizer_settings(student.engine), _trusted_deepspeed_types():
        if same:
            student.engine.load_checkpoint(str(checkpoint.folder), tag=DEEPSPEED_TAG)
        else:
            check_resizable(checkpoint, student.zero_stage)
            load_resized(student.engine, checkpoint, student.ranks)
    stage_state = load_file(checkpoint.folder / STAGE_STATE)
    expected_TV = stage_state.pop(PROBE)
    load_state(stage_state)
    check_handover(student.probe(), expected_TV, student.precision, str(checkpoint.folder), student.ranks)


def size_facts(student: Student) -> dict[str, int]:
    """What DeepSpeed's own files depend on."""
    return {
        "world": student.ranks.world,
        "expert_parallel": student.expert_parallel_size,
        "zero_stage": student.zero_stage,
    }


def last_whole_checkpoint(
    run_dir: Path, ranks: Ranks, skip_damaged: bool, say: Callable[[str], None]
) -> Checkpoint | None:
    """The newest checkpoint of a run, every file compared with its checksum; None where there is none. Collective.

    UserError for a damaged one, on all ranks; with `skip_damaged` it is named, renamed, and the one before it is taken.
    """
    for folder in reversed(on_main(lambda: checkpoint_folders(run_dir), ranks)):
        try:
            checkpoint: Checkpoint = on_main(partial(read_checkpoint, folder), ranks)
            together(partial(_verify, checkpoint, ranks), ranks)
            return checkpoint
        except UserError as error:
            if not skip_damaged:
                raise
            # Out of the way of the rotation, which would keep it in place of a whole one.
            aside = folder.with_name(f"damaged_{folder.name}")
            together(partial(replace_folder, folder, aside) if ranks.is_main else lambda: None, ranks)
            if ranks.is_main:
                say(f"skipped, and renamed to {aside.name}: {error}")
    return None


def _verify(checkpoint: Checkpoint, ranks: Ranks) -> None:
    check_sizes(checkpoint)
    checkpoint.verify(checkpoint.files()[ranks.rank :: ranks.world])


def rotate_checkpoints(run_dir: Path, keep: int, ranks: Ranks) -> None:
    """Delete all but the newest `keep` whole checkpoints, on rank 0."""
    if ranks.is_main:
        for folder in checkpoint_folders(run_dir)[:-keep]:
            shutil.rmtree(folder)
    barrier()


def _fresh_folder(staged: Path) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    (staged / WEIGHTS).mkdir(parents=True)


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """As a safetensors file; weights that are none of this rank's leave no file."""
    if tensors or path.name == STAGE_STATE:
        with disk_full_is_user_error(path, DISK_FULL_HINT):
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_deepspeed_files(student: Student, staged: Path) -> None:
    try:
        with disk_full_is_user_error(staged, DISK_FULL_HINT):
            student.engine.save_checkpoint(str(staged), tag=DEEPSPEED_TAG, save_latest=False)
    except UserError as error:
        raise OneRankError(str(error)) from error


def _file_names(staged: Path) -> list[str]:
    return [str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()]


def _hashes(staged: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files."""
    return {name: {"bytes": (staged / name).stat().st_size, "sha256": sha256_of(staged / name)} for name in names}


def _seal(staged: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    with disk_full_is_user_error(final, DISK_FULL_HINT):
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        give_usual_modes(staged)
        if final.exists():
            shutil.rmtree(final)
        os.rename(staged, final)


@contextmanager
def _own_optimizer_settings(engine: Any) -> Iterator[None]:
    """Keep the settings that the engine was built with, where loading would bring the checkpoint's."""
    scheduler, groups = engine.lr_scheduler, engine.optimizer.param_groups
    rates = list(scheduler.base_lrs)
    settings = [{name: group[name] for name in ("initial_lr", "betas", "weight_decay")} for group in groups]
    yield
    scheduler.base_lrs = rates
    scheduler._last_lr = [
        rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
    ]
    for group, own, rate in zip(engine.optimizer.param_groups, settings, scheduler._last_lr, strict=True):
        group.update(own, lr=rate)


@contextmanager
def _trusted_deepspeed_types() -> Iterator[None]:
    """Let DeepSpeed's loader read tensors and plain values only, plus the few classes that it saves itself."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        trusted = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
        # Python 3.11.0 to 3.11.3 pickle a member of an enum as a call of getattr.
        with torch.serialization.safe_globals([*trusted, (_enum_member, "builtins.getattr")]):
            yield
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _enum_member(owner: Any, name: str) -> Any:
    """What `getattr` in a checkpoint may do: name a member of an enum that is trusted."""
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise pickle.UnpicklingError(f"getattr of {owner!r} is not allowed in a checkpoint")
    return owner[name]
