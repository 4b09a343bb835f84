"""The live student's weights under the names of its Hugging Face checkpoint.

Legend: E experts on this rank, F expert width, D model width.
"""

from collections.abc import Iterator

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups

from padd_ds.engine.student import Student

EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""DeepSpeed's stacked expert weights and the checkpoint's per-expert names."""


def local_tensors(student: Student) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that this rank is to write: its experts, and on rank 0 everything else.

    Over all ranks every tensor of the checkpoint comes up exactly once. Expert-data-parallel
    replicas keep silent.
    """
    writes_experts = _is_first_replica(student)
    for prefix, module in student.model.named_modules():
        if isinstance(module, AutoEPMoELayer) and writes_experts:
            yield from _expert_tensors(prefix, module)
    if student.ranks.is_main:
        tied = set(student.model.all_tied_weights_keys)  # the same tensor stands under another name too
        for name, tensor in student.model.state_dict().items():
            if checkpoint_name(name) is not None and name not in tied:
                yield checkpoint_name(name), tensor.detach()  # type: ignore[misc]


def checkpoint_name(name: str) -> str | None:
    """The checkpoint's name of a tensor of the live model; None for stacked experts and training aids."""
    if name.endswith(("mlp.experts.w1", "mlp.experts.w2", "mlp.experts.w3", "mlp.router.logit_bias")):
        return None
    name = name.replace(".mlp.router.gate.weight", ".mlp.gate.weight")
    return name.replace(".mlp.router.e_score_correction_bias", ".mlp.gate.e_score_correction_bias")


def _expert_tensors(prefix: str, layer: AutoEPMoELayer) -> Iterator[tuple[str, torch.Tensor]]:
    first = layer.ep_rank * layer.num_local_experts
    for stacked, projection in EXPERT_NAMES.items():
        for offset, tensor in enumerate(getattr(layer.experts, stacked).detach()):
            yield f"{prefix}.experts.{first + offset}.{projection}.weight", tensor


def _is_first_replica(student: Student) -> bool:
    if student.ranks.world == 1 or not student.layers:
        return True
    group = groups._get_expert_data_parallel_group(student.layers[0].ep_group_name)
    return bool(dist.get_rank(group=group) == 0)
