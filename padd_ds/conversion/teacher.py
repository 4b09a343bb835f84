"""Reading of a teacher's weights from safetensors, one tensor at a time."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from padd_ds.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "*.py"]
HASH_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TeacherWeights:
    """Where every tensor of a checkpoint folder lies; nothing is held in memory."""

    folder: Path
    file_of: dict[str, str]
    sha256: dict[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from disk, in the stored dtype."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor; no others are read."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return file.get_slice(name)[start:stop]

    def pick(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` of a tensor, which stays on disk but for their pages."""
        return self.tensor(name)[ids]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self.rows(name, 0, 1).dtype

    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return [self.folder / name for name in sorted(set(self.file_of.values()))]


def local_folder(source: str) -> Path:
    """The folder of a teacher: itself, or a snapshot of the hub repository."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{source}: could not be downloaded ({type(error).__name__}); give a local folder") from error


def open_weights(folder: Path, required: list[str]) -> TeacherWeights:
    """Index the weights of `folder` and check that they are whole.

    UserError for: no safetensors, a missing shard, a truncated file, a missing tensor of `required`,
    a tensor with NaN or infinity. Reads every tensor once.
    """
    names = _shard_names(folder)
    file_of: dict[str, str] = {}
    for name in names:
        file_of.update(dict.fromkeys(_checked_tensor_names(folder / name), name))
    for tensor in required:
        if tensor not in file_of:
            raise UserError(f"{folder}: tensor {tensor} is missing from its weights; the checkpoint is not complete")
    sha256 = {name: sha256_of(folder / name) for name in ["config.json", *names]}
    return TeacherWeights(folder=folder, file_of=file_of, sha256=sha256)


def _shard_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / INDEX}: damaged index ({error}); copy the checkpoint again") from error
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; save the teacher as safetensors")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: shard {name} is named in {INDEX} but missing; copy the checkpoint again")
    return names


def _checked_tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise UserError(f"{path}: tensor {name} holds NaN or infinite values; use a sound checkpoint")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged safetensors ({error}); copy the checkpoint again") from error
    return names


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
