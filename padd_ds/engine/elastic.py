"""Checkpoints that come back at another number of ranks, expert-parallel size or ZeRO stage.

DeepSpeed's universal format holds every parameter and moment whole; each rank then reads its own share.
"""

import argparse
import contextlib
import io
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from padd_ds.checkpoint.layout import DEEPSPEED_TAG, Checkpoint
from padd_ds.engine.ranks import Ranks, barrier, together
from padd_ds.errors import UserError
from padd_ds.files import disk_full_is_user_error

TAG = "universal"
_POLL_S = 0.2


def check_resizable(checkpoint: Checkpoint, zero_stage: int) -> None:
    """UserError where a checkpoint of one ZeRO stage cannot be continued at another."""
    there = checkpoint.facts["zero_stage"]
    if (there == 3) != (zero_stage == 3) or 0 in (there, zero_stage):
        near = {0: "0, with as many ranks and the same autoep_size", 3: "3"}.get(there, "1 or 2")
        raise UserError(
            f"{checkpoint.folder}: written at ZeRO stage {there}, resumed at {zero_stage}, and DeepSpeed cannot "
            f"convert between them; set zero_optimization.stage to {near}, or export the student and start a new run"
        )


def load_resized(engine: Any, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Put an engine of any size to where `checkpoint` left off. Collective; call it where only safe types are loaded.

    Needs as much disk beside the checkpoint as the checkpoint itself, for as long as it takes.
    """
    folder = checkpoint.folder.with_name(f".{checkpoint.folder.name}.universal")
    _convert_on_main(checkpoint.folder / DEEPSPEED_TAG, folder, ranks)
    # A rank that fails from here on ends alone, and the launcher ends the others; the next attempt clears the folder.
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(folder), tag=TAG)
    engine._config.load_universal_checkpoint = False
    _separate_steps(engine)
    barrier()
    if ranks.is_main:
        shutil.rmtree(folder)


def _convert_on_main(source: Path, folder: Path, ranks: Ranks) -> None:
    """Convert on rank 0; the others look for the end of it on disk, as it may take longer than a collective waits."""
    done = folder / "done"
    if ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    together(lambda: folder.mkdir() if ranks.is_main else None, ranks)
    failure: Exception | None = None
    if ranks.is_main:
        try:
            with disk_full_is_user_error(folder, "the checkpoint is as it was; free as much as it takes once more"):
                _convert(source, folder / TAG)
        except Exception as error:
            failure = error
            shutil.rmtree(folder / TAG, ignore_errors=True)
        done.touch()
    while not done.exists():
        time.sleep(_POLL_S)

    def tell() -> None:
        if failure is not None:
            raise failure

    together(tell, ranks)


def _convert(source: Path, output: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(output),
        # In this process, where only safe types are loaded.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def _separate_steps(engine: Any) -> None:
    """Give each group of parameters a step count of its own.

    At ZeRO-3 the loader gives all groups one tensor, which torch's AdamW would count up once per group and step.
    """
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
