"""The live student's weights under the names of its Hugging Face checkpoint.

Legend: E experts on this rank, F expert width, D model width.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups

from padd_ds.engine.ranks import gather_objects, together
from padd_ds.engine.student import Student
from padd_ds.errors import UserError

EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""DeepSpeed's stacked expert weights and the checkpoint's per-expert names."""
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(w[123])")
_LAYER = re.compile(r".*?\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What of the weights a rank gives out."""

    experts: bool
    """Those that it holds."""
    rest: bool


def share_among(student: Student, group: Sequence[int]) -> Share:
    """This rank's share where the ranks of `group`, itself among them, give out every tensor once. Collective.

    UserError, on all ranks, if some group has not all experts.
    """
    own = student.layers[0].ep_rank if student.layers else 0
    expert_ranks = gather_objects(own, student.ranks)
    here = {expert_ranks[rank] for rank in group}
    missing = set(range(student.expert_parallel_size)) - here

    def check() -> None:
        if missing:
            raise UserError(
                f"ranks {min(group)} to {max(group)} of one node hold {len(here)} of {student.expert_parallel_size} "
                "parts of the experts, and its rollout servers need all; set vllm.exchange to a folder that all nodes "
                "see, or autoep_size to the ranks of a node at most"
            )

    together(check, student.ranks)
    me = student.ranks.rank
    return Share(experts=all(expert_ranks[rank] != own for rank in group if rank < me), rest=me == min(group))


def local_tensors(student: Student, share: Share | None = None) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(label, tensors by name) of this rank's share, by default of what all ranks together hold: then every tensor of
    the checkpoint comes up on exactly one rank, and replicas of experts keep silent.

    One layer at a time, whose tensors are there until the next one is asked for. Collective under ZeRO-3: every rank
    must go through all layers.
    """
    share = share or Share(experts=_is_first_replica(student), rest=student.ranks.is_main)
    firsts = {
        f"{prefix}.experts": layer.ep_rank * layer.num_local_experts
        for prefix, layer in student.model.named_modules()
        if isinstance(layer, AutoEPMoELayer)
    }
    for label, tensors in _layers(student):
        named: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            stacked = _STACKED.fullmatch(name)
            if stacked is not None and share.experts:
                named |= _each_expert(tensor, stacked[1], stacked[2], firsts[stacked[1]])
            elif share.rest and (plain := checkpoint_name(name)) is not None:
                named[plain] = tensor
        yield label, named


def whole_tensors(student: Student) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(label, tensors by name): on rank 0 every tensor of the checkpoint, on the others none.

    One layer at a time, so rank 0 needs room for one whole layer beside its own weights. Collective: every rank must
    go through all layers.
    """
    main = student.ranks.is_main
    group = groups._get_expert_parallel_group(student.layers[0].ep_group_name) if student.layers else None
    gives = group is not None and torch.distributed.get_process_group_ranks(group)[0] == 0
    for label, tensors in _layers(student):
        named: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            stacked = _STACKED.fullmatch(name)
            if stacked is not None and gives:
                for place, part_E in enumerate(_gather_on_main(tensor, group, main)):
                    named |= _each_expert(part_E, stacked[1], stacked[2], place * len(tensor))
            elif main and (plain := checkpoint_name(name)) is not None:
                named[plain] = tensor
        yield label, named


def _gather_on_main(tensor: torch.Tensor, group: Any, main: bool) -> list[torch.Tensor]:
    """The tensors of the ranks of a group, of equal shape, on rank 0, which is its first; elsewhere nothing."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group=group))] if main else []
    torch.distributed.gather(tensor.contiguous(), parts or None, dst=0, group=group)
    return parts


def _layers(student: Student) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(label, tensors by their live name) of one layer at a time, each whole but for the experts of other ranks."""
    tied = set(student.model.all_tied_weights_keys)  # the same tensor stands under another name too
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in student.model.state_dict(keep_vars=True).items():
        if name not in tied:
            layer = _LAYER.match(name)
            by_layer.setdefault(f"layer_{int(layer[1]):05d}" if layer else "rest", {})[name] = tensor
    for label, tensors in by_layer.items():
        with gathered(tensors.values()):
            yield label, {name: tensor.detach() for name, tensor in tensors.items()}


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
