"""Which dense teachers can become a `Glm4MoeForCausalLM` student."""

from dataclasses import dataclass
from typing import Any

from transformers import Glm4MoeConfig

from padd_ds.conversion.options import Slicing
from padd_ds.errors import UserError

# Rotary variants whose frequencies do not depend on the sequence length, so that a check on a
# short sequence proves them.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FFN_TENSORS = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a teacher family apart: biases on the query, key, value projections; norms on query, key."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}


def check_supported(config: Any, source: str) -> Family:
    """The family of a teacher; UserError naming what the student class cannot express."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"{source}: model type {config.model_type} is not supported; use one of {', '.join(FAMILIES)}")
    refusals = [
        _refuse_quantised(config),
        _refuse_activation(config),
        _refuse_biases(config),
        _refuse_rope(config),
        _refuse_sliding_window(config),
    ]
    for refusal in filter(None, refusals):
        raise UserError(f"{source}: {refusal}; this teacher cannot be converted")
    return family


def _refuse_quantised(config: Any) -> str | None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation:
        method = dict(quantisation).get("quant_method", "unknown")
        return f"quantization_config is set ({method}), and slices are cut out of plain weights only"
    return None


def _refuse_activation(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}, and the student class is used with silu only"
    return None


def _refuse_biases(config: Any) -> str | None:
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            return f"{key} is true, and the student class has no bias on the output or FFN projections"
    return None


def _refuse_rope(config: Any) -> str | None:
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        return f"rope type is {rope_type}, which is not proven equal (proven: {', '.join(ROPE_TYPES)})"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor is {rope['partial_rotary_factor']}, and only 1.0 is supported"
    return None


def _refuse_sliding_window(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    if window is not None and _slides(config) and window < config.max_position_embeddings:
        return (
            f"sliding_window is {window}, below max_position_embeddings {config.max_position_embeddings}, and the "
            "student class attends to everything (if no text is longer than the window, set sliding_window to null)"
        )
    return None


def _slides(config: Any) -> bool:
    """Whether any layer heeds the window: Mistral's all do, whatever its layer_types say, and Llama's never do."""
    return config.model_type == "mistral" or "sliding_attention" in (getattr(config, "layer_types", None) or [])


def student_config(
    config: Any, family: Family, slicing: Slicing, dtype_name: str, dense_layers: int = 0
) -> Glm4MoeConfig:
    """The student's config: same model with every FFN behind the first `dense_layers` as shared and routed slices.

    `routed_scaling_factor` is top_k, so that the normalised weights of the chosen experts are about 1
    each, and exactly 1 where all are chosen with equal scores.
    """
    settings = {name: getattr(config, name) for name in COPIED_FIELDS}
    settings.update(
        head_dim=head_dim_of(config),
        attention_bias=family.qkv_bias,
        use_qk_norm=family.qk_norm,
        # The class would rotate half of each head; both places are read by its loaders.
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0},
        partial_rotary_factor=1.0,
        tie_word_embeddings=False,
        moe_intermediate_size=slicing.slice_width,
        n_routed_experts=slicing.routed,
        n_shared_experts=slicing.shared,
        num_experts_per_tok=slicing.top_k,
        routed_scaling_factor=float(slicing.top_k),
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=dense_layers,
        num_nextn_predict_layers=0,
        architectures=["Glm4MoeForCausalLM"],
        dtype=dtype_name,
    )
    return Glm4MoeConfig(**settings)


def head_dim_of(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher layer of every student layer: floor(l * L_T / L_S)."""
    return [layer * teacher_layers // student_layers for layer in range(student_layers)]


def copied_layer_tensors(family: Family) -> list[str]:
    """Names within a layer of the tensors that the student takes over as they are."""
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    if family.qkv_bias:
        names += [f"self_attn.{part}_proj.bias" for part in "qkv"]
    if family.qk_norm:
        names += [f"self_attn.{part}_norm.weight" for part in "qk"]
    return names


def layer_tensors(family: Family) -> list[str]:
    """Names within a layer of all the tensors that a teacher must have."""
    return [*copied_layer_tensors(family), *FFN_TENSORS]


def teacher_tensors(config: Any, family: Family) -> list[str]:
    """Names of all the tensors that a teacher must have."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config.tie_word_embeddings:
        names.append("lm_head.weight")
    layers = range(config.num_hidden_layers)
    return names + [f"model.layers.{layer}.{name}" for layer in layers for name in layer_tensors(family)]
