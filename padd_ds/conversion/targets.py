"""What a conversion leaves for the training: `padd_targets.safetensors` in the student's folder.

Shapes: L student layers, F neurons of the teacher's FFN, E routed experts.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from padd_ds.errors import UserError

FILE_NAME = "padd_targets.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "padd_targets"


@dataclass(frozen=True, kw_only=True)
class LayerTargets:
    """One layer: `assignment_F` (expert of every neuron: routed 0..E-1, shared E..N-1), centroids, hbar, p_T."""

    assignment_F: torch.Tensor
    centroids_EC: torch.Tensor
    activation_mean_E: torch.Tensor | None
    expert_prior_E: torch.Tensor | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is, by the names that `layer_targets` takes."""
        return {name: value for name, value in vars(self).items() if value is not None}


def layer_targets(tensors: dict[str, torch.Tensor]) -> LayerTargets:
    """The targets that gave `tensors`."""
    return LayerTargets(
        assignment_F=tensors["assignment_F"],
        centroids_EC=tensors["centroids_EC"],
        activation_mean_E=tensors.get("activation_mean_E"),
        expert_prior_E=tensors.get("expert_prior_E"),
    )


@dataclass(frozen=True, kw_only=True)
class ConversionTargets:
    """All layers. Prior and activation mean are None where the conversion had no calibration data.

    expert_prior_LE: p_T over the routed experts (PADD eq. 2), fp32, rows sum to 1.
    activation_mean_LE: hbar over the routed experts, mean 1 per layer, fp32.
    assignment_LF: int32, expert of every teacher neuron: routed 0..E-1, shared slices E..N-1.
    centroids: one fp32 tensor [E, features] per layer.
    layer_map_L: int32, teacher layer of every student layer.
    prior_temperature: xi.
    """

    expert_prior_LE: torch.Tensor | None
    activation_mean_LE: torch.Tensor | None
    assignment_LF: torch.Tensor
    centroids: tuple[torch.Tensor, ...]
    layer_map_L: torch.Tensor
    prior_temperature: float
    cluster: str
    router: str


def save_targets(
    folder: Path,
    layers: list[LayerTargets],
    layer_map: list[int],
    *,
    prior_temperature: float,
    cluster: str,
    router: str,
) -> None:
    """Write the targets of all layers to `folder`."""
    tensors = {"layer_map": torch.tensor(layer_map, dtype=torch.int32)}
    for index, layer in enumerate(layers):
        tensors[f"layers.{index}.assignment"] = layer.assignment_F.int()
        tensors[f"layers.{index}.centroids"] = layer.centroids_EC.float()
        if layer.activation_mean_E is not None and layer.expert_prior_E is not None:
            tensors[f"layers.{index}.activation_mean"] = layer.activation_mean_E.float()
            tensors[f"layers.{index}.expert_prior"] = layer.expert_prior_E.float()
    metadata = {
        "format_version": FORMAT_VERSION,
        "prior_temperature": prior_temperature,
        "cluster": cluster,
        "router": router,
    }
    # One entry: safetensors writes several in an order that changes from run to run.
    packed = {METADATA_KEY: json.dumps(metadata)}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / FILE_NAME, packed)


def load_targets(folder: Path) -> ConversionTargets:
    """The targets in a student's folder; UserError where the file is absent, damaged or of another version."""
    path = folder.expanduser() / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; {folder} must be written by padd-convert")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if metadata.get("format_version") != FORMAT_VERSION:
            version = metadata.get("format_version")
            raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}; convert the teacher again")
        layer_map_L = tensors["layer_map"]
        n_layers = len(layer_map_L)
        return ConversionTargets(
            expert_prior_LE=_stacked(tensors, "expert_prior", n_layers),
            activation_mean_LE=_stacked(tensors, "activation_mean", n_layers),
            assignment_LF=torch.stack([tensors[f"layers.{index}.assignment"] for index in range(n_layers)]),
            centroids=tuple(tensors[f"layers.{index}.centroids"] for index in range(n_layers)),
            layer_map_L=layer_map_L,
            prior_temperature=float(metadata["prior_temperature"]),
            cluster=metadata["cluster"],
            router=metadata["router"],
        )
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); convert the teacher again") from error


def _stacked(tensors: dict[str, torch.Tensor], name: str, n_layers: int) -> torch.Tensor | None:
    if f"layers.0.{name}" not in tensors:
        return None
    return torch.stack([tensors[f"layers.{index}.{name}"] for index in range(n_layers)])
