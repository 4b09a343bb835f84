"""Weights in files that the trainer and a rollout server both map: written in place, and read from there."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_ALIGNED_BYTES = 64
"""Where a tensor of a file begins is a multiple of it."""


class WeightBoard:
    """The files of one rank, one for each label; `folder` is in memory (/dev/shm) or on a disk that the server sees.

    A label's tensors have the same names, shapes and types every time, so its file is laid out once and only filled
    again. Room is taken when it is laid out: OSError for a full device then, and no signal later.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._parts: dict[str, dict[str, Any]] = {}
        self._mapped: dict[str, torch.Tensor] = {}

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What a server needs in order to read them, as plain values."""
        return list(self._parts.values())

    def write(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the values of `tensors` where readers see them."""
        if not tensors:
            return
        if label not in self._parts:
            self._lay_out(label, tensors)
        for (_, into), tensor in zip(_views(self._parts[label], self._mapped[label]), tensors.values(), strict=True):
            into.copy_(tensor)

    def _lay_out(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        entries, end = [], 0
        for name, tensor in tensors.items():
            entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), end])
            end += -(-tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        path = self._folder / f"rank{self._rank:05d}-{label}.weights"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, end)
        self._parts[label] = {"path": str(path), "bytes": end, "tensors": entries}
        self._mapped[label] = _map(path, end)


def read_part(part: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a board's file, where they lie: values change when the trainer writes again."""
    return _views(part, _map(Path(part["path"]), part["bytes"]))


def _views(part: Mapping[str, Any], mapped: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype_name, shape, start in part["tensors"]:
        dtype = getattr(torch, dtype_name)
        n_bytes = dtype.itemsize * torch.Size(shape).numel()
        yield name, mapped[start : start + n_bytes].view(dtype).view(shape)


def _map(path: Path, n_bytes: int) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=n_bytes, dtype=torch.uint8)
