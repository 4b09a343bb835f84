"""Which tensor of megatron-core's GPTModel each of the student's tensors becomes, or a part of.

Keys are those of `GPTModel.sharded_state_dict` of megatron-core 0.16, where a norm in front of a linear layer has the
name that Transformer Engine gives it. Legend: G groups of query heads.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from padd_ds.checkpoint.weights import EMBEDDING, FINAL_NORM, HEAD

Build = Callable[..., torch.Tensor]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a tensor of GPTModel.

    offsets: along each axis that the tensor is cut on, (axis, place of the part, number of parts).
    build: the part from `sources`, tensors of the student.
    """

    key: str
    sources: tuple[str, ...]
    offsets: tuple[tuple[int, int, int], ...] = ()
    build: Build = _same

    def slices(self, part: torch.Tensor) -> tuple[slice, ...]:
        """Where `part` stands in the whole tensor."""
        places = {axis: place * part.shape[axis] for axis, place, _ in self.offsets}
        return tuple(slice(places.get(axis, 0), places.get(axis, 0) + n) for axis, n in enumerate(part.shape))

    def whole_shape(self, part: torch.Tensor) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        counts = {axis: count for axis, _, count in self.offsets}
        return tuple(n * counts.get(axis, 1) for axis, n in enumerate(part.shape))


def megatron_pieces(config: Any, names: Iterable[str]) -> Iterator[Piece]:
    """All parts of GPTModel, layer by layer, for a student of `config` that has the tensors `names`."""
    present = set(names)
    yield Piece(key="embedding.word_embeddings.weight", sources=(EMBEDDING,))
    for layer in range(config.num_hidden_layers):
        own = {name for name in present if name.startswith(f"model.layers.{layer}.")}
        yield from _layer(f"decoder.layers.{layer}", f"model.layers.{layer}", own, config)
    yield Piece(key="decoder.final_layernorm.weight", sources=(FINAL_NORM,))
    if not config.tie_word_embeddings:
        yield Piece(key="output_layer.weight", sources=(HEAD,))


def extra_states(pieces: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """Key and number of the (empty) extra states that GPTModel asks for beside the weight of every linear layer."""
    found: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        module, _, kind = piece.key.rpartition(".")
        if kind == "weight" and ".linear_" in module:
            experts = next((count for axis, _, count in piece.offsets if ".experts." in module and axis == 0), 1)
            found[f"{module}._extra_state"] = (experts,)
    return found


def _layer(key: str, name: str, present: set[str], config: Any) -> Iterator[Piece]:
    attention, ffn = f"{key}.self_attention", f"{key}.mlp"
    yield Piece(key=f"{attention}.linear_qkv.layer_norm_weight", sources=(f"{name}.input_layernorm.weight",))
    for kind in ("weight", "bias"):
        sources = tuple(f"{name}.self_attn.{part}_proj.{kind}" for part in "qkv")
        if sources[0] in present:
            yield Piece(key=f"{attention}.linear_qkv.{kind}", sources=sources, build=_interleave(config))
    for part in "qk":
        if f"{name}.self_attn.{part}_norm.weight" in present:
            yield Piece(key=f"{attention}.{part}_layernorm.weight", sources=(f"{name}.self_attn.{part}_norm.weight",))
    yield Piece(key=f"{attention}.linear_proj.weight", sources=(f"{name}.self_attn.o_proj.weight",))
    norm = f"{name}.post_attention_layernorm.weight"
    yield Piece(key=f"{ffn}.linear_fc1.layer_norm_weight", sources=(norm,))
    if f"{name}.mlp.gate.weight" not in present:
        yield from _ffn(ffn, f"{name}.mlp")
        return
    # Local layers ask for the norm of an MoE layer under the name above too, those of Transformer Engine under this.
    yield Piece(key=f"{key}.pre_mlp_layernorm.weight", sources=(norm,))
    yield Piece(key=f"{ffn}.router.weight", sources=(f"{name}.mlp.gate.weight",))
    yield Piece(key=f"{ffn}.router.expert_bias", sources=(f"{name}.mlp.gate.e_score_correction_bias",))
    for expert in range(config.n_routed_experts):
        place = (0, expert, config.n_routed_experts)
        yield from _ffn(f"{ffn}.experts.experts", f"{name}.mlp.experts.{expert}", place)
    if config.n_shared_experts:
        yield from _ffn(f"{ffn}.shared_experts", f"{name}.mlp.shared_experts")


def _ffn(key: str, name: str, expert: tuple[int, int, int] | None = None) -> Iterator[Piece]:
    """Gate above up, and down; experts are stacked along an axis of their own in front."""
    first, build = ((), _same) if expert is None else ((expert,), _stacked)
    for half, projection in enumerate(("gate", "up")):
        yield Piece(
            key=f"{key}.linear_fc1.weight",
            sources=(f"{name}.{projection}_proj.weight",),
            offsets=(*first, (len(first), half, 2)),
            build=build,
        )
    yield Piece(key=f"{key}.linear_fc2.weight", sources=(f"{name}.down_proj.weight",), offsets=first, build=build)


def _stacked(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None]


def _interleave(config: Any) -> Build:
    """Rows of query, key and value in turn for each group: its query heads, its key head, its value head."""
    n_groups = config.num_key_value_heads

    def build(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        by_group = [part.unflatten(0, (n_groups, -1)) for part in (query, key, value)]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    return build
