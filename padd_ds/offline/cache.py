"""A teacher's likelihoods of targets on disk: the k likeliest tokens at every place, and the rest in one bucket.

A row is known by the token ids of its prompt and target, so what is found is right for what is asked.
Shapes: B rows of a batch, L tokens of prompt and target, R target tokens of the longest row, N rows and S target tokens
of a shard, K likeliest tokens, Q = K + 1 outcomes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from padd_ds.data.problems import Problem
from padd_ds.errors import UserError
from padd_ds.files import sha256_of
from padd_ds.launcher import launched_rank

INDEX_NAME, FORMAT = "cache.json", 2
KEY_BYTES = 32
REMEDY = "record it again with padd-cache"


@dataclass(frozen=True, kw_only=True)
class RecordedRow:
    """One target."""

    key: str
    """`row_key` of its prompt and target."""
    top_ids_RK: torch.Tensor
    """int32."""
    logprobs_RQ: torch.Tensor
    """fp32, nats: of those tokens, and of all others together."""


def row_key(ids: Sequence[int], n_target: int) -> str:
    """The name of a row: its token ids, and how many of them are the target."""
    return hashlib.sha256(json.dumps([list(ids), n_target]).encode()).hexdigest()


def write_shard(path: Path, rows: Sequence[RecordedRow], metadata: dict[str, str]) -> None:
    """Write `rows` to a safetensors file that is whole or absent."""
    keys = [list(bytes.fromhex(row.key)) for row in rows]
    tensors = {
        "keys": torch.tensor(keys, dtype=torch.uint8).view(len(rows), KEY_BYTES),
        "tokens": torch.tensor([len(row.top_ids_RK) for row in rows], dtype=torch.int64),
        "top_ids": torch.cat([row.top_ids_RK for row in rows]) if rows else torch.zeros(0, dtype=torch.int32),
        "logprobs": torch.cat([row.logprobs_RQ for row in rows]) if rows else torch.zeros(0),
    }
    staged = path.with_name(f".{path.name}.partial")
    save_file(tensors, staged, metadata)
    staged.rename(path)


def write_index(folder: Path, facts: dict[str, Any], responses: Path, shards: Sequence[Path]) -> None:
    """Write cache.json with the checksum of every other file; a folder without it is no cache."""

    def entry(path: Path) -> dict[str, str]:
        return {"file": path.name, "sha256": sha256_of(path)}

    document = {"format": FORMAT, **facts, "responses": entry(responses), "shards": [entry(shard) for shard in shards]}
    (folder / INDEX_NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def check_responses(source: str) -> None:
    """UserError where `source` is the responses of a cache and no longer what was recorded."""
    path = Path(source)
    if (path.parent / INDEX_NAME).is_file():
        entry = _read_index(path.parent)["responses"]
        if path.name == entry["file"]:
            _check_file(path, entry["sha256"])


def read_responses(folder: Path) -> list[Problem]:
    """The targets that padd-cache wrote to `folder`, a problem each; UserError unless they are what was recorded."""
    path = folder / _read_index(folder)["responses"]["file"]
    check_responses(str(path))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Problem(**row) for row in rows]


@dataclass(kw_only=True)
class TeacherCache:
    """A folder written by padd-cache; `open` checks every file against its SHA-256."""

    folder: Path
    facts: dict[str, Any]
    places: dict[str, tuple[int, int, int]]
    """Shard, first token and number of tokens of every row, by key."""
    _open: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "TeacherCache":
        """UserError: not a whole cache, or one of another format.

        Of several ranks the first alone computes checksums, once for all: call it within `together`, by which a file
        that is wrong stops every rank.
        """
        cache = cls(folder=folder, facts=_read_index(folder), places={})
        if launched_rank() in (None, 0):
            cache._check_files()
        for number in range(len(cache.facts["shards"])):
            shard = cache._shard(number)
            keys, tokens = shard.get_tensor("keys"), shard.get_tensor("tokens").tolist()
            first = 0
            for key, count in zip(keys.tolist(), tokens, strict=True):
                cache.places[bytes(key).hex()] = (number, first, count)
                first += count
        return cache

    @property
    def top_k(self) -> int:
        return self.facts["top_k"]

    def batch(
        self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor, target_mask_BR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(top_ids_BRK int64, logprobs_BRQ) of recorded rows, padded on the left; 0 where there is no target."""
        shape = target_mask_BR.shape
        keys = _row_keys(input_ids_BL, attention_mask_BL, target_mask_BR)
        top_ids_BRK = torch.zeros(*shape, self.top_k, dtype=torch.int64)
        logprobs_BRQ = torch.zeros(*shape, self.top_k + 1)
        for row, (key, n_target) in enumerate(keys):
            if n_target > 0:
                top_ids_BRK[row, -n_target:], logprobs_BRQ[row, -n_target:] = self._find(key)
        return top_ids_BRK, logprobs_BRQ

    def missing(self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor, target_mask_BR: torch.Tensor) -> int:
        """How many of such rows were not recorded."""
        keys = _row_keys(input_ids_BL, attention_mask_BL, target_mask_BR)
        return sum(n_target > 0 and key not in self.places for key, n_target in keys)

    def _find(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        number, first, count = self.places[key]
        shard, rows = self._shard(number), slice(first, first + count)
        return shard.get_slice("top_ids")[rows].long(), shard.get_slice("logprobs")[rows]

    def _check_files(self) -> None:
        for entry in [self.facts["responses"], *self.facts["shards"]]:
            _check_file(self.folder / entry["file"], entry["sha256"])

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self.folder / self.facts["shards"][number]["file"]
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}); {REMEDY}") from error
        return self._open[number]


def _row_keys(
    input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor, target_mask_BR: torch.Tensor
) -> list[tuple[str, int]]:
    """`row_key` of every row, and how many tokens its target has."""
    n_targets = target_mask_BR.sum(dim=1).tolist()
    rows = zip(input_ids_BL, attention_mask_BL.bool(), n_targets, strict=True)
    return [(row_key(ids[mask].tolist(), n_target), n_target) for ids, mask, n_target in rows]


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file() or sha256_of(path) != sha256:
        raise UserError(f"{path}: missing or changed since it was written; {REMEDY}")


def _read_index(folder: Path) -> dict[str, Any]:
    index = folder / INDEX_NAME
    if not index.is_file():
        raise UserError(f"{folder}: no {INDEX_NAME} in it, so no whole teacher cache; {REMEDY}")
    try:
        facts = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{index}: not readable as JSON ({error}); {REMEDY}") from error
    if facts.get("format") != FORMAT:
        raise UserError(f"{index}: format {facts.get('format')} is not {FORMAT}; {REMEDY}")
    return facts
