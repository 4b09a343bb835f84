"""Which of the clusters that a student's experts were cut from fire in its teacher.

Shapes: S flattened tokens, F neurons of the teacher's FFN, E clusters, which are the routed experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padd_ds.conversion.targets import ConversionTargets
from padd_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TeacherClusters:
    """A dense teacher, and the cluster of each of its neurons."""

    teacher: Any
    targets: ConversionTargets
    n_layers: int
    """Layers of the student with experts."""
    n_experts: int

    def __post_init__(self) -> None:
        """UserError unless teacher, targets and student go together."""
        neurons, layers = self.targets.assignment_LF.shape[1], self.targets.layer_map_L.tolist()
        config = self.teacher.config
        blocks = getattr(self.teacher.base_model, "layers", [])
        fits = all(layer < len(blocks) and hasattr(blocks[layer].mlp, "down_proj") for layer in layers)
        if not fits or config.intermediate_size != neurons or len(layers) != self.n_layers:
            raise UserError("the teacher is not the one that the student's padd_targets.safetensors was made from")
        routed = self.targets.assignment_LF < self.n_experts
        present = {len(row[kept].unique()) for row, kept in zip(self.targets.assignment_LF, routed, strict=True)}
        if present != {self.n_experts}:
            raise UserError(
                "padd_targets.safetensors does not hold one cluster for every routed expert, as with copies of "
                "experts; leave out the teacher"
            )

    @contextmanager
    def watching(self) -> Iterator[dict[int, Tensor]]:
        """By layer with experts, mean |h| over each routed cluster's neurons, [S, E], of the pass inside the block."""
        seen: dict[int, Tensor] = {}

        def keep(layer: int, membership_FE: Tensor) -> Any:
            def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
                hidden_SF = inputs[0].flatten(0, -2).abs().float()
                seen[layer] = hidden_SF @ membership_FE.to(hidden_SF.device)

            return hook

        handles = []
        for place, teacher_layer in enumerate(self.targets.layer_map_L.tolist()):
            down_proj = self.teacher.base_model.layers[teacher_layer].mlp.down_proj
            handles.append(down_proj.register_forward_pre_hook(keep(place, self._membership(place))))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _membership(self, place: int) -> Tensor:
        """[F, E]: 1 / size of the cluster where the neuron is in it."""
        expert_F = self.targets.assignment_LF[place].long()
        member_FE = torch.nn.functional.one_hot(expert_F, int(expert_F.max()) + 1)[:, : self.n_experts].float()
        return member_FE / member_FE.sum(0)
