"""The live student's weights under the names of its Hugging Face checkpoint.

Legend: E experts on this rank, F expert width, D model width.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups

from padd_ds.engine.student import Student

EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""DeepSpeed's stacked expert weights and the checkpoint's per-expert names."""
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(w[123])")
_LAYER = re.compile(r".*?\.layers\.(\d+)\.")


def local_tensors(student: Student) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(label, tensors by name) of all that this rank is to write: its experts, and on rank 0 everything else.

    One layer at a time, whose tensors are there until the next one is asked for. Over all ranks every tensor of the
    checkpoint comes up exactly once; replicas of experts keep silent. Collective under ZeRO-3: every rank must go
    through all layers.
    """
    tied = set(student.model.all_tied_weights_keys)  # the same tensor stands under another name too
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in student.model.state_dict(keep_vars=True).items():
        if name not in tied:
            layer = _LAYER.match(name)
            by_layer.setdefault(f"layer_{int(layer[1]):05d}" if layer else "rest", {})[name] = tensor
    firsts = {
        f"{prefix}.experts": layer.ep_rank * layer.num_local_experts
        for prefix, layer in student.model.named_modules()
        if isinstance(layer, AutoEPMoELayer)
    }
    writes_experts = _is_first_replica(student)
    for label, tensors in by_layer.items():
        with gathered(tensors.values()):
            named: dict[str, torch.Tensor] = {}
            for name, tensor in tensors.items():
                stacked = _STACKED.fullmatch(name)
                if stacked is not None and writes_experts:
                    named |= _each_expert(tensor.detach(), stacked[1], stacked[2], firsts[stacked[1]])
                elif student.ranks.is_main and (plain := checkpoint_name(name)) is not None:
                    named[plain] = tensor.detach()
            yield label, named


def gathered(tensors: Iterable[torch.Tensor]) -> AbstractContextManager[object]:
    """Inside, parameters that ZeRO-3 has spread over ranks are whole, to be read. Collective there."""
    spread = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    return deepspeed.zero.GatheredParameters(spread) if spread else nullcontext()


def checkpoint_name(name: str) -> str | None:
    """The checkpoint's name of a tensor of the live model; None for stacked experts and training aids."""
    if _STACKED.fullmatch(name) or name.endswith(".mlp.router.logit_bias"):
        return None
    name = name.replace(".mlp.router.gate.weight", ".mlp.gate.weight")
    return name.replace(".mlp.router.e_score_correction_bias", ".mlp.gate.e_score_correction_bias")


def _each_expert(stacked_E: torch.Tensor, prefix: str, name: str, first: int) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{first + offset}.{EXPERT_NAMES[name]}.weight": part for offset, part in enumerate(stacked_E)}


def _is_first_replica(student: Student) -> bool:
    if student.ranks.world == 1 or not student.layers:
        return True
    group = groups._get_expert_data_parallel_group(student.layers[0].ep_group_name)
    return bool(dist.get_rank(group=group) == 0)
