"""Weights in files, which the trainer writes and a rollout server maps."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_ALIGNED_BYTES = 64
"""Where a tensor of a file begins is a multiple of it."""


class WeightBoard:
    """The files of one rank, one for each label, in the memory (/dev/shm) of the node that the server stands on too.

    A label's tensors have the same names, shapes and types every time, so its file is laid out once and only filled
    again. Room is taken when it is laid out: OSError for a full device then, and no signal later.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self._rank = folder, rank
        self._parts: dict[str, dict[str, Any]] = {}
        self._mapped: dict[str, torch.Tensor] = {}

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What a server needs in order to read them, as plain values; the same after every writing."""
        return list(self._parts.values())

    @property
    def suffix(self) -> str:
        """What the paths in `parts` lack at the moment; the same on every rank that wrote as often."""
        return ""

    def write(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the values of `tensors` where readers see them."""
        if not tensors:
            return
        if label not in self._parts:
            self._lay_out(label, tensors)
        for (_, into), tensor in zip(views(self._parts[label], self._mapped[label]), tensors.values(), strict=True):
            into.copy_(tensor)

    def _lay_out(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        part = laid_out(tensors)
        path = _path(self.folder, self._rank, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, part["bytes"])
        self._parts[label] = part | {"path": str(path)}
        self._mapped[label] = _mapped(path, part["bytes"])


class WeightFiles:
    """As WeightBoard, in a folder that other nodes see.

    A network's file system keeps what was once read, and what a process has mapped, from others for longer than a
    rollout can wait: so every writing goes to a file of a new name, and is closed before anybody is told of it.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self._rank = folder, rank
        self._parts: dict[str, dict[str, Any]] = {}
        self._written: dict[str, int] = {}

    @property
    def parts(self) -> list[dict[str, Any]]:
        """See WeightBoard."""
        return list(self._parts.values())

    @property
    def suffix(self) -> str:
        """See WeightBoard."""
        return f".{max(self._written.values(), default=0)}"

    def write(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the values of `tensors` where readers see them, in place of those before; OSError for a full disk."""
        before = self._written.get(label, 0)
        self._written[label] = before + 1
        if not tensors:
            return
        part, path = laid_out(tensors), _path(self.folder, self._rank, label)
        self._parts[label] = part | {"path": str(path)}
        Path(f"{path}.{before}").unlink(missing_ok=True)
        with Path(f"{path}.{before + 1}").open("xb") as file:
            for (_, _, _, start), tensor in zip(part["tensors"], tensors.values(), strict=True):
                file.seek(start)
                file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            file.truncate(part["bytes"])


def laid_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Where each of `tensors` stands when all are one row of bytes: `bytes` of it, and `tensors` as lists of name,
    type, shape and first byte."""
    entries, end = [], 0
    for name, tensor in tensors.items():
        entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), end])
        end += -(-tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
    return {"bytes": end, "tensors": entries}


def read_part(part: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a board's file, where they lie: values change when the trainer writes again."""
    return views(part, _mapped(Path(part["path"]), part["bytes"]))


def views(part: Mapping[str, Any], row: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what is laid out in `row`, bytes; no copies."""
    for name, dtype_name, shape, start in part["tensors"]:
        dtype = getattr(torch, dtype_name)
        n_bytes = dtype.itemsize * torch.Size(shape).numel()
        yield name, row[start : start + n_bytes].view(dtype).view(shape)


def _path(folder: Path, rank: int, label: str) -> Path:
    return folder / f"rank{rank:05d}-{label}.weights"


def _mapped(path: Path, n_bytes: int) -> torch.Tensor:
    """The bytes of a file, where they lie."""
    return torch.from_file(str(path), shared=True, size=n_bytes, dtype=torch.uint8)
