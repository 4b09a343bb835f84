"""The folder that a conversion works in: it survives an interruption and becomes the output at the end."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from padd_ds.errors import UserError
from padd_ds.files import (
    check_output_free,
    delete_unfinished_tensors,
    disk_full_is_user_error,
    give_usual_modes,
    replace_folder,
)

RESULT, FINGERPRINT, LOCK = "result", "fingerprint.json", "lock"
METADATA_KEY = "padd_layer"


class WorkFolder:
    """Results so far (`result`, which becomes the output), and for every layer a record and the states after it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.result = folder / RESULT

    def layers_done(self) -> int:
        """How many layers, from the first on, have been finished."""
        done = 0
        while self._record(done).is_file():
            done += 1
        return done

    def finish_layer(
        self,
        layer: int,
        states: Mapping[str, torch.Tensor],
        record: Mapping[str, torch.Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Mark `layer` as finished: the states after it first, then its record, then the old states go."""
        save_tensors(self._states(layer), states)
        save_tensors(self._record(layer), record, {METADATA_KEY: json.dumps(facts)})
        self._states(layer - 1).unlink(missing_ok=True)

    def states_after(self, layer: int) -> dict[str, torch.Tensor]:
        """What `finish_layer` was given as states, for the last finished layer only."""
        return _load(self._states(layer))[0]

    def record_of(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `finish_layer` was given as record and facts."""
        tensors, metadata = _load(self._record(layer))
        return tensors, json.loads(metadata[METADATA_KEY])

    def _states(self, layer: int) -> Path:
        return self._folder / f"states-{layer:05d}.safetensors"

    def _record(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.safetensors"


@contextmanager
def work_folder(output: Path, fingerprint: Mapping[str, Any], overwrite: bool = False) -> Iterator[WorkFolder]:
    """Yield the work folder of `output`; its `result` becomes `output` when the block ends without error.

    The folder lies beside `output` as `.NAME.partial`. What an interrupted run with the same `fingerprint`
    left there is taken up, anything else is deleted first. A UserError in the block deletes the folder;
    after any other end (a kill, a full disk) it stays, and `output` is as it was. UserError where another
    process works in it.
    """
    check_output_free(output, overwrite)
    folder = partial_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        _take(lock, output)
        _keep_or_empty(folder, fingerprint)
        work = WorkFolder(folder)
        try:
            work.result.mkdir(exist_ok=True)
            yield work
        except UserError:
            shutil.rmtree(folder)
            raise
        except Exception as error:
            hint = f"what is finished stays in {folder}: free some space and run the same command again, or delete it"
            with disk_full_is_user_error(output, hint):
                raise error
        give_usual_modes(work.result)
        replace_folder(work.result, output)
        shutil.rmtree(folder)


def partial_folder(output: Path) -> Path:
    """Where the conversion to `output` works."""
    return output.absolute().parent / f".{output.name}.partial"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is whole under its name, whatever happens meanwhile."""
    aside = path.with_name(f"{path.name}.part")
    contiguous = {name: _own(tensor.detach().cpu()) for name, tensor in tensors.items()}
    save_file(contiguous, aside, {"format": "pt", **(metadata or {})})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.rename(path)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor with a storage of its own, as safetensors wants it."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if whole or not tensor.is_contiguous() else tensor.clone()


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        # Copies, because the file is deleted while its tensors are in use.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


def _take(lock: IO[str], output: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{output}: another process is writing it; wait for it or choose another output") from error


def _keep_or_empty(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    text = json.dumps(fingerprint, indent=2, sort_keys=True) + "\n"
    path = folder / FINGERPRINT
    # Without a result the folder is what a kill left of a finished conversion, after the result had been moved.
    if (folder / RESULT).is_dir() and path.is_file() and path.read_text(encoding="utf-8") == text:
        delete_unfinished_tensors(folder)
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    aside = folder / f"{FINGERPRINT}.part"
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)
