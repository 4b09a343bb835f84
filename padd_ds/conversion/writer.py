"""Writing of the student's weights: one shard per layer, under the names that the Hub uses.

Shapes: N slices, G neurons of a slice, F = N * G, D model width, E routed experts.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from padd_ds.conversion.teacher import LENGTH_BYTES
from padd_ds.conversion.work import save_tensors

INDEX = "model.safetensors.index.json"


def shard_path(folder: Path, number: int, total: int) -> Path:
    """Shard `number`, from 1, of `total`."""
    return folder / f"model-{number:05d}-of-{total:05d}.safetensors"


def write_shard(folder: Path, number: int, total: int, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a shard, whole or not at all."""
    path = shard_path(folder, number, total)
    save_tensors(path, tensors)
    return path


def write_index(folder: Path, total: int) -> None:
    """Write the index of the `total` shards in `folder`, from what they hold."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number in range(1, total + 1):
        path = shard_path(folder, number, total)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        total_bytes += path.stat().st_size - LENGTH_BYTES - header_bytes
        weight_map.update(dict.fromkeys(names, path.name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def moe_tensors(
    ffn: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    members_NG: torch.Tensor,
    router_ED: torch.Tensor,
    bias_E: torch.Tensor,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Router, routed experts and the shared expert of a layer, cut out of the teacher's FFN, by name in the layer.

    `ffn` is gate [F, D], up [F, D], down [D, F]; `members_NG` the neurons of every slice, the E
    routed ones (as many as `router_ED` has rows) first; `bias_E` steers the selection and stays in fp32.
    """
    gate_FD, up_FD, down_DF = ffn
    n_routed = len(router_ED)
    yield "mlp.gate.weight", router_ED.to(gate_FD.dtype)
    yield "mlp.gate.e_score_correction_bias", bias_E.float()
    # All slices at once, because gathering columns one slice at a time reads the matrix once for each.
    order = members_NG.flatten()
    sizes = [members_NG.shape[1]] * n_routed + [members_NG[n_routed:].numel()]
    names = [*(f"experts.{index}" for index in range(n_routed)), "shared_experts"]
    gates, ups = (matrix_FD.index_select(0, order).split(sizes) for matrix_FD in (gate_FD, up_FD))
    downs = down_DF.index_select(1, order).split(sizes, dim=1)
    for name, gate_GD, up_GD, down_DG in zip(names, gates, ups, downs, strict=True):
        yield f"mlp.{name}.gate_proj.weight", gate_GD
        yield f"mlp.{name}.up_proj.weight", up_GD
        yield f"mlp.{name}.down_proj.weight", down_DG
