"""What a run's checkpoints hold, and which of them are whole.

A checkpoint is `checkpoints/step_N/`: `deepspeed/` (optimizer, schedule, model as DeepSpeed keeps it, for
resuming), `weights/` (the student under its Hugging Face names, one safetensors file per writing rank, for
padd-export), `stage.safetensors` (what the stage remembers), and `manifest.json`, written last.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padd_ds.errors import UserError
from padd_ds.files import sha256_of

MANIFEST = "manifest.json"
DEEPSPEED_TAG = "deepspeed"
WEIGHTS = "weights"
STAGE_STATE = "stage.safetensors"
STUDENT = "student"
"""Folder of a run with the student's config, tokenizer and conversion files: all of it but the weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    """Steps that were done when it was written; training goes on with this step."""
    facts: Mapping[str, Any]
    """The manifest: step, stage, world, expert_parallel, zero_stage, bias_target; bytes and SHA-256 of every file."""

    def files(self, folder: str = "") -> list[str]:
        """Names of its files, in order; of those in one folder of it if named."""
        return sorted(name for name in self.facts["files"] if name.startswith(folder))

    def verify(self, names: Iterable[str]) -> None:
        """UserError for a file that does not hold what was written."""
        for name in names:
            if sha256_of(self.folder / name) != self.facts["files"][name]["sha256"]:
                raise UserError(
                    f"{self.folder / name}: its checksum is not that of the manifest; the checkpoint is damaged, "
                    "see --skip-damaged of padd_ds/train.py, or take another step"
                )


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Where the checkpoints of a run are, oldest first; a folder without a manifest is none."""
    found = [path.parent for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}")]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first; UserError for an unreadable manifest."""
    return [read_checkpoint(folder) for folder in checkpoint_folders(run_dir)]


def check_sizes(checkpoint: Checkpoint) -> None:
    """UserError for a checkpoint whose files do not have the sizes of its manifest."""
    for name, entry in checkpoint.facts["files"].items():
        path, size = checkpoint.folder / name, entry["bytes"]
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(
                f"{path}: missing or not {size} bytes long; the checkpoint is damaged, "
                "see --skip-damaged of padd_ds/train.py, or take another step"
            )


def choose_checkpoint(run_dir: Path, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest; UserError if there is none, or if its files have other sizes."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    checkpoints = find_checkpoints(run_dir)
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints) or "none"
    chosen = [checkpoint for checkpoint in checkpoints if step in (None, checkpoint.step)]
    if not chosen:
        wanted = "a whole checkpoint" if step is None else f"a whole checkpoint of step {step}"
        raise UserError(f"{run_dir}: does not hold {wanted} (there are: {steps})")
    check_sizes(chosen[-1])
    return chosen[-1]


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; UserError for an unreadable manifest."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        facts["step"], facts["files"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder / MANIFEST}: not a readable manifest ({error}); the checkpoint is damaged, "
            "see --skip-damaged of padd_ds/train.py, or delete its folder"
        ) from error
    return Checkpoint(folder=folder, step=facts["step"], facts=facts)
