"""Whether exported weights are those of the live student, and give the logits that it had when it was saved.

Legend: T tokens, V vocabulary, D model width.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from padd_ds.checkpoint.layout import STAGE_STATE, Checkpoint
from padd_ds.checkpoint.probe import PROBE, TOLERANCE, deviation, probe_tokens
from padd_ds.checkpoint.weights import EMBEDDING, FINAL_NORM, SavedWeights
from padd_ds.conversion.block import load_block
from padd_ds.conversion.families import FAMILIES
from padd_ds.conversion.head import Head, head_name
from padd_ds.errors import UserError
from padd_ds.hf import read_config

CHECKED = ("glm4_moe", *FAMILIES)
"""Classes whose model is its embedding, its layers one after the other, a norm and a head."""


class Weights(Protocol):
    """Tensors by their Hugging Face names."""

    @property
    def stored(self) -> Mapping[str, Any]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Compared:
    """The tensors as trained; UserError for one of which something else was written than `saved` reads."""

    saved: SavedWeights
    written: SavedWeights

    @property
    def stored(self) -> Mapping[str, Any]:
        return self.saved.stored

    def tensor(self, name: str) -> torch.Tensor:
        return self._same(name, trained(self.saved).tensor(name), self.written.tensor(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._same(name, trained(self.saved).rows(name, start, stop), self.written.rows(name, start, stop))

    def _same(self, name: str, as_trained: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        expected = self.saved.cast(name, as_trained)
        if written.dtype != expected.dtype or not torch.equal(written, expected):
            file = self.written.path_of[name].name
            raise UserError(f"{file}: {name} was not written as it was trained, so nothing was kept; check the disk")
        return as_trained


def trained(weights: SavedWeights) -> SavedWeights:
    """The same tensors in the precision that they were trained in."""
    return replace(weights, dtype=None)


def why_unchecked(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Why the model whose config is in `folder` cannot be compared with the live one; None where it can."""
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type not in CHECKED:
        return f"only {', '.join(CHECKED)} can be run layer by layer, not {model_type}"
    if PROBE not in load_file(checkpoint.folder / STAGE_STATE):
        return "the checkpoint is of a version that kept no logits of the live student"
    return None


def check_export(checkpoint: Checkpoint, folder: Path, weights: Weights) -> float:
    """How far the logits of `weights`, as trained and of the config in `folder`, are off those of the live student.

    Relative to their mean size; in fp32, one layer in memory at a time. UserError where it is more than rounding in
    the trained precision allows.
    """
    expected_TV = load_file(checkpoint.folder / STAGE_STATE)[PROBE]
    off = deviation(layerwise_logits(read_config(str(folder)), weights), expected_TV)
    tolerance = TOLERANCE[weights.stored[EMBEDDING].dtype]
    if not off <= tolerance:  # written so that NaN fails
        raise UserError(
            f"{checkpoint.folder}: logits of its weights are off those of the live student by {off:.2g} of their mean "
            f"size, more than {tolerance:g}; it is not the model that was saved, so nothing was written "
            "(--no-check writes it nevertheless)"
        )
    return off


def layerwise_logits(config: Any, weights: Weights) -> torch.Tensor:
    """[T, V] fp32: logits of the probe's tokens, each layer computed by the Hugging Face class."""
    states_BTD = weights.tensor(EMBEDDING)[probe_tokens(config.vocab_size)][None].float()
    norm_D = weights.tensor(FINAL_NORM)
    for layer in tqdm(range(config.num_hidden_layers), desc="checking", unit="layer", dynamic_ncols=True):
        prefix = f"model.layers.{layer}."
        tensors = {name[len(prefix) :]: weights.tensor(name) for name in weights.stored if name.startswith(prefix)}
        block = load_block(config, layer, tensors, norm_D, torch.float32, "cpu")
        states_BTD = block.forward(states_BTD)
    name = head_name(config)
    head = Head(lambda start, stop: weights.rows(name, start, stop), config.vocab_size, "cpu")
    return head.logits(block.normalise(states_BTD, None))[0]
