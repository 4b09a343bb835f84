"""Writing of the student's weights: layer by layer, in shards, under the names that the Hub uses.

Shapes: N slices, G neurons of a slice, F = N * G, D model width, E routed experts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from padd_ds.conversion.families import Family, copied_layer_tensors
from padd_ds.conversion.teacher import TeacherWeights

SHARD_BYTES = 4 << 30


class ShardWriter:
    """Collects tensors and writes a shard whenever `shard_bytes` are reached; `close` writes the index."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it may be written at once."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the shards their final names, write the index."""
        self._flush()
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        save_file(self._pending, self._part(len(self._shards)), {"format": "pt"})
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"


def outer_tensors(weights: TeacherWeights, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Embedding, final norm and a head of its own, tied or not in the teacher."""
    embedding = weights.tensor("model.embed_tokens.weight")
    yield "model.embed_tokens.weight", embedding
    yield "model.norm.weight", weights.tensor("model.norm.weight")
    yield "lm_head.weight", embedding.clone() if tied else weights.tensor("lm_head.weight")


def attention_tensors(
    weights: TeacherWeights, family: Family, teacher_layer: int, student_layer: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a layer takes over as it is: attention and norms."""
    for name in copied_layer_tensors(family):
        yield f"model.layers.{student_layer}.{name}", weights.tensor(f"model.layers.{teacher_layer}.{name}")


def moe_tensors(
    layer: int,
    ffn: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    members_NG: torch.Tensor,
    router_ED: torch.Tensor,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Router, routed experts and the shared expert of a layer, cut out of the teacher's FFN.

    `ffn` is gate [F, D], up [F, D], down [D, F]; `members_NG` the neurons of every slice, the E
    routed ones (as many as `router_ED` has rows) first.
    """
    gate_FD, up_FD, down_DF = ffn
    prefix = f"model.layers.{layer}.mlp"
    n_routed = len(router_ED)
    yield f"{prefix}.gate.weight", router_ED
    yield f"{prefix}.gate.e_score_correction_bias", torch.zeros(n_routed)
    slices = {f"experts.{index}": members_NG[index] for index in range(n_routed)}
    slices["shared_experts"] = members_NG[n_routed:].flatten()
    for name, neurons in slices.items():
        yield f"{prefix}.{name}.gate_proj.weight", gate_FD[neurons]
        yield f"{prefix}.{name}.up_proj.weight", up_FD[neurons]
        yield f"{prefix}.{name}.down_proj.weight", down_DF[:, neurons]
