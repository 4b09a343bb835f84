"""The sizes of a model that memory, communication and computation follow from."""

from dataclasses import dataclass
from typing import Any

from padd_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only model; without experts a dense one. Widths and counts as in its Hugging Face config."""

    layers: int
    dense_layers: int
    """Layers whose FFN is dense: all of a dense model's, the first few of a student's."""
    width: int
    """D."""
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    """Whether embedding and head are one matrix."""
    ffn_width: int
    """Of a dense FFN."""
    experts: int = 0
    """E: routed experts per layer."""
    top_k: int = 0
    """K: routed experts per token."""
    expert_width: int = 0
    """F: of one routed expert."""
    shared_width: int = 0
    """Of all shared experts together."""
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def attention_width(self) -> int:
        """All query heads together."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """All key heads together, or all value heads."""
        return self.kv_heads * self.head_width

    @property
    def attention_parameters(self) -> int:
        """Of one layer, without norms."""
        projections = self.width * (2 * self.attention_width + 2 * self.kv_width)
        bias = self.attention_width + 2 * self.kv_width if self.qkv_bias else 0
        return projections + bias + (2 * self.head_width if self.qk_norm else 0)

    @property
    def expert_parameters(self) -> int:
        """Routed experts of all layers."""
        return self.moe_layers * self.experts * self.one_expert

    @property
    def one_expert(self) -> int:
        return 3 * self.width * self.expert_width

    @property
    def shared_parameters(self) -> int:
        """Shared experts of all layers."""
        return self.moe_layers * 3 * self.width * self.shared_width

    @property
    def ffn_parameters(self) -> int:
        """Dense FFNs of all layers."""
        return self.dense_layers * 3 * self.width * self.ffn_width

    @property
    def dense_parameters(self) -> int:
        """All but the routed experts: what every rank has, whatever the expert-parallel size."""
        layers = self.layers * (self.attention_parameters + 2 * self.width)
        router = self.moe_layers * self.experts * self.width
        vocabulary = (1 if self.tied else 2) * self.vocabulary * self.width
        return layers + router + self.shared_parameters + self.ffn_parameters + vocabulary + self.width

    @property
    def parameters(self) -> int:
        return self.dense_parameters + self.expert_parameters

    @property
    def active_ffn_width(self) -> int:
        """Neurons that one token goes through, in a layer with experts if there are any."""
        return self.top_k * self.expert_width + self.shared_width if self.experts else self.ffn_width

    @property
    def active_parameters(self) -> int:
        """Parameters that one token goes through, embedding included."""
        return self.dense_parameters + self.moe_layers * self.top_k * self.one_expert


def shape_of(config: Any, source: str) -> ModelShape:
    """The shape in a Hugging Face config: Llama, Qwen2, Qwen3, Mistral, glm4_moe, qwen3_moe.

    UserError for a class that has not been counted: a plan for it would be a guess.
    """
    if config.model_type not in _READERS:
        known = ", ".join(_READERS)
        raise UserError(f"{source}: model class {config.model_type} cannot be planned for; known: {known}")
    common = {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_width": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "ffn_width": config.intermediate_size,
    }
    return ModelShape(**common | _READERS[config.model_type](config))


def _dense(**facts: bool) -> Any:
    return lambda config: {"dense_layers": config.num_hidden_layers, **facts}


def _llama(config: Any) -> dict[str, Any]:
    if config.attention_bias or config.mlp_bias:
        raise UserError("a Llama model with biases (attention_bias, mlp_bias) cannot be planned for")
    return {"dense_layers": config.num_hidden_layers}


def _glm4_moe(config: Any) -> dict[str, Any]:
    return {
        "dense_layers": config.first_k_dense_replace,
        "experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "expert_width": config.moe_intermediate_size,
        "shared_width": config.n_shared_experts * config.moe_intermediate_size,
        "qkv_bias": bool(config.attention_bias),
        "qk_norm": bool(config.use_qk_norm),
    }


def _qwen3_moe(config: Any) -> dict[str, Any]:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UserError("a qwen3_moe model with dense layers (mlp_only_layers, decoder_sparse_step) cannot be planned")
    return {
        "dense_layers": 0,
        "experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "expert_width": config.moe_intermediate_size,
        "qk_norm": True,
    }


_READERS = {
    "llama": _llama,
    "mistral": _dense(),
    "qwen2": _dense(qkv_bias=True),
    "qwen3": _dense(qk_norm=True),
    "glm4_moe": _glm4_moe,
    "qwen3_moe": _qwen3_moe,
}
