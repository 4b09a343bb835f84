"""The student's tensors in a run's checkpoint, read one at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from padd_ds.checkpoint.layout import WEIGHTS, Checkpoint
from padd_ds.conversion.teacher import STORED_DTYPES
from padd_ds.errors import UserError
from padd_ds.hf import DTYPES

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
KEPT_IN_FP32 = "e_score_correction_bias"
"""The class keeps the selection bias in fp32 whatever the model's precision."""


@dataclass(frozen=True)
class SavedWeights:
    """Where each tensor of the student lies; no values are held in memory."""

    path_of: dict[str, Path]
    stored: dict[str, torch.Tensor]
    """Shape and dtype of each, on the meta device."""
    empty: dict[str, torch.Tensor]
    """What the class has in place of shared experts where a student has none; training leaves them out."""
    dtype: torch.dtype | None
    """What tensors are read as; None: as trained."""

    @property
    def names(self) -> list[str]:
        """All tensors, in order."""
        return sorted(self.stored)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, mapped from disk where it is read as it was trained."""
        if name in self.empty:
            return self.empty[name]
        # Opened anew, as the pages of an open file count as this process's memory for as long as it is open.
        with safe_open(self.path_of[name], framework="pt") as file:
            return self.cast(name, file.get_tensor(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor."""
        with safe_open(self.path_of[name], framework="pt") as file:
            return self.cast(name, file.get_slice(name)[start:stop])

    def meta(self, name: str) -> torch.Tensor:
        """What `tensor` gives, without its values."""
        return self.cast(name, self.stored[name])

    @property
    def total_bytes(self) -> int:
        """Of all tensors as they are read."""
        return sum(self.meta(name).nbytes for name in self.names)

    def cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is read of a tensor that is stored as `tensor`."""
        return tensor if self.dtype is None or name.endswith(KEPT_IN_FP32) else tensor.to(self.dtype)


def saved_weights(checkpoint: Checkpoint, config: dict[str, Any], dtype: str | None) -> SavedWeights:
    """The tensors of a checkpoint, to be read as `dtype`; `config` is the student's config.json.

    UserError for one that is missing or was written twice.
    """
    path_of, stored = locate(sorted((checkpoint.folder / WEIGHTS).glob("*.safetensors")))
    missing = sorted(_expected(config) - set(path_of))
    if missing:
        raise UserError(f"{checkpoint.folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    empty = _shared_experts_of_width_0(config)
    return SavedWeights(
        path_of=path_of,
        stored=stored | {name: tensor.to("meta") for name, tensor in empty.items()},
        empty=empty,
        dtype=None if dtype is None else DTYPES[dtype],
    )


def locate(paths: Iterable[Path]) -> tuple[dict[str, Path], dict[str, torch.Tensor]]:
    """File, and shape and dtype on the meta device, of every tensor; UserError for one that is in two files."""
    path_of: dict[str, Path] = {}
    stored: dict[str, torch.Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in path_of:
                    raise UserError(f"{path}: tensor {name} was written by two ranks; the checkpoint is damaged")
                path_of[name], header = path, file.get_slice(name)
                dtype = STORED_DTYPES[header.get_dtype()]
                stored[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return path_of, stored


def _expected(config: dict[str, Any]) -> set[str]:
    """Every FFN of every layer must be there, and every expert: nothing in safetensors itself would tell."""
    n_experts, depth = config.get("n_routed_experts", 0), config["num_hidden_layers"]
    n_dense = config.get("first_k_dense_replace", 0) if n_experts else depth
    ffns = [f"model.layers.{layer}.mlp" for layer in range(n_dense)]
    ffns += [f"model.layers.{layer}.mlp.experts.{e}" for layer in range(n_dense, depth) for e in range(n_experts)]
    expected = {f"{ffn}.{projection}_proj.weight" for ffn in ffns for projection in ("gate", "up", "down")}
    expected |= {EMBEDDING, FINAL_NORM}
    return expected if config.get("tie_word_embeddings", False) else expected | {HEAD}


def _shared_experts_of_width_0(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    if config["model_type"] != "glm4_moe" or config["n_shared_experts"]:
        return {}
    width = config["hidden_size"]
    shapes = {"gate": (0, width), "up": (0, width), "down": (width, 0)}
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}_proj.weight": torch.empty(shape)
        for layer in range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])
        for name, shape in shapes.items()
    }
