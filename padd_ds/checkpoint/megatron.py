"""Writing of a student as a distributed checkpoint of megatron-core, one layer in memory at a time."""

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.futures import Future
from tqdm import tqdm

from padd_ds.checkpoint.megatron_layout import Piece, extra_states
from padd_ds.checkpoint.weights import SavedWeights
from padd_ds.errors import UserError

with warnings.catch_warnings():
    # Of Transformer Engine and Apex, which play no part in writing.
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
    from megatron.core.dist_checkpointing.strategies.checkpointable import (
        CheckpointableShardedTensor,
        LocalShardsContainer,
    )

COMMON = {"checkpoint_version": 3.0, "iteration": 0}
"""What Megatron-LM reads before the tensors; below version 2 it would put query, key and value in another order."""


def write_checkpoint(folder: Path, pieces: list[Piece], weights: SavedWeights) -> None:
    """Write `pieces` into an empty folder, as `megatron.core.dist_checkpointing.load` reads them."""
    state: dict[str, Any] = dict(COMMON)
    for piece in pieces:
        # On the meta device: the values are read when they are written.
        part = piece.build(*(weights.meta(name) for name in piece.sources))
        state[f"{piece.key}{piece.offsets}"] = ShardedTensor.from_rank_offsets(piece.key, part, *piece.offsets)
    for key, (count,) in extra_states(pieces).items():
        for place in range(count):
            state[f"{key}{place}"] = ShardedObject(key, None, (count,), (place,))
    with _lone_rank():
        dist_checkpointing.save(state, str(folder), sharded_strategy=_SaveByLayer(pieces, weights))


def check_written(folder: Path, pieces: list[Piece], weights: SavedWeights) -> None:
    """UserError unless each part, read back from `folder`, holds the values that it was made of."""
    layers = [list(group) for _, group in groupby(pieces, key=lambda piece: _file_of(piece.key))]
    with _lone_rank():
        for layer in tqdm(layers, desc="reading back", unit="layer", dynamic_ncols=True):
            _check_layer(folder, layer, weights)


def _check_layer(folder: Path, layer: list[Piece], weights: SavedWeights) -> None:
    parts = [piece.build(*(weights.tensor(name) for name in piece.sources)) for piece in layer]
    wholes = {
        piece.key: torch.empty(piece.whole_shape(part), dtype=part.dtype)
        for piece, part in zip(layer, parts, strict=True)
    }
    dcp.load(wholes, storage_reader=dcp.FileSystemReader(folder))
    for piece, part in zip(layer, parts, strict=True):
        if not torch.equal(wholes[piece.key][piece.slices(part)], part):
            raise UserError(
                f"{folder.parent}: {piece.key} does not hold {piece.sources[0]} as it was written; nothing was "
                "kept, check the disk"
            )


class _SaveByLayer(SaveShardedStrategy):
    """Megatron-core's own strategy keeps the whole model in memory; this one writes the same format."""

    can_handle_sharded_objects = True

    def __init__(self, pieces: Iterable[Piece], weights: SavedWeights) -> None:
        super().__init__("torch_dist", 1)
        self._planner = _ReadWhenWritten(pieces, weights)

    def save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str) -> None:
        parts: dict[str, list[CheckpointableShardedTensor]] = defaultdict(list)
        state: dict[str, Any] = {}
        for one in sharded_state_dict.values():
            if isinstance(one, ShardedObject):
                state[one.unique_key] = [one.data]
            else:
                parts[one.key].append(CheckpointableShardedTensor.from_sh_ten(one))
        state |= {key: LocalShardsContainer(shards) for key, shards in parts.items()}
        dcp.save(state, storage_writer=_FilePerLayer(checkpoint_dir), planner=self._planner)


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Gives each part its values at the moment at which it is written."""

    def __init__(self, pieces: Iterable[Piece], weights: SavedWeights) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights = weights
        self._pieces: dict[tuple[str, tuple[int, ...]], Piece] = {}
        for piece in pieces:
            part = piece.build(*(weights.meta(name) for name in piece.sources))
            self._pieces[piece.key, tuple(place.start for place in piece.slices(part))] = piece

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.offset is None:
            return super().lookup_object(index)
        piece = self._pieces[index.fqn, tuple(index.offset)]
        return piece.build(*(self._weights.tensor(name) for name in piece.sources))


class _FilePerLayer(dcp.FileSystemWriter):
    """Writes a file for each layer, since torch keeps what it has written to a file until the file is done."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[Any]]:
        by_file: dict[str, list[Any]] = defaultdict(list)
        for item in plan.items:
            by_file[_file_of(item.index.fqn)].append(item)
        results: list[Any] = []
        for number, items in enumerate(tqdm(by_file.values(), desc="writing", unit="layer", dynamic_ncols=True)):
            names = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = dataclasses.replace(plan, items=items, storage_data=names)
            results += super().write_data(part, planner).wait()
        done: Future[list[Any]] = Future()
        done.set_result(results)
        return done


def _file_of(key: str) -> str:
    """Layers have a file each, and so has what is outside of them."""
    head, _, tail = key.partition("decoder.layers.")
    return tail.split(".")[0] if tail else head


@contextmanager
def _lone_rank() -> Iterator[None]:
    """Inside, torch.distributed has one rank, without a port and without environment variables."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
