"""What megatron-core has to be told to build an exported student as its GPTModel."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from padd_ds.checkpoint.megatron_layout import megatron_pieces
from padd_ds.errors import UserError
from padd_ds.hf import read_config

SETTINGS = "megatron_config.json"
MODEL_TYPES = ("glm4_moe", "llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What GPTModel scales by where `rope_scaling` is set; only the factor can be chosen."""


def check_megatron(student: Path, names: Iterable[str]) -> None:
    """UserError where megatron-core is not installed, or its GPTModel cannot be the student in a folder.

    `names` are the tensors that have to find a place in it.
    """
    if importlib.util.find_spec("megatron") is None:
        raise UserError("--format megatron needs megatron-core: pip install 'megatron-core>=0.16,<0.17'")
    config = read_config(str(student))
    for refusal in filter(None, (_refuse_model(config), _refuse_rope(config), _refuse_routing(config))):
        raise UserError(f"{student / 'config.json'}: {refusal}; --format megatron cannot hold this model")
    placed = {name for piece in megatron_pieces(config, names) for name in piece.sources}
    homeless = sorted(set(names) - placed)
    if homeless:
        raise UserError(f"{student}: GPTModel has no place for tensor {homeless[0]}; use --format hf")


def write_settings(folder: Path, config: Any, dtype: torch.dtype) -> Path:
    """Write megatron_config.json and what Megatron-LM's --load reads; the folder that the weights belong into."""
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "transformer_config": transformer_settings(config)
        | {
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
        },
        "gpt_model": model_settings(config),
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n", encoding="utf-8")
    (folder / "release").mkdir()
    return folder / "release"


def transformer_settings(config: Any) -> dict[str, Any]:
    """Fields of TransformerConfig, but for the activation function (silu) and dtypes."""
    settings = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": has_qkv_bias(config),
        "qk_layernorm": has_qk_norm(config),
        "hidden_dropout": 0.0,
        "attention_dropout": config.attention_dropout,
        # A list, which also lets every layer have tensors of its own in the checkpoint.
        "moe_layer_freq": [int(layer >= n_dense_layers(config)) for layer in range(config.num_hidden_layers)],
    }
    return settings | (_moe_settings(config) if config.model_type == "glm4_moe" else {})


def _moe_settings(config: Any) -> dict[str, Any]:
    shared_width = config.moe_intermediate_size * config.n_shared_experts
    return {
        "num_moe_experts": config.n_routed_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": shared_width or None,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


def model_settings(config: Any) -> dict[str, Any]:
    """Arguments of GPTModel, but for its config and layers."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    return {
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "seq_len_interpolation_factor": rope["factor"] if kind == "linear" else None,
        "rope_scaling": kind == "llama3",
        "rope_scaling_factor": rope["factor"] if kind == "llama3" else 1.0,
    }


def has_qkv_bias(config: Any) -> bool:
    """Whether query, key and value have biases."""
    return config.model_type == "qwen2" or bool(config.model_type == "glm4_moe" and config.attention_bias)


def has_qk_norm(config: Any) -> bool:
    """Whether query and key are normalised per head."""
    return config.model_type == "qwen3" or bool(config.model_type == "glm4_moe" and config.use_qk_norm)


def n_dense_layers(config: Any) -> int:
    """How many layers, the first ones, have a dense FFN."""
    return config.first_k_dense_replace if config.model_type == "glm4_moe" else config.num_hidden_layers


def _refuse_model(config: Any) -> str | None:
    if config.model_type not in MODEL_TYPES:
        return f"model_type is {config.model_type}, and only {', '.join(MODEL_TYPES)} are written"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}, and only silu is written"
    if "sliding_attention" in (getattr(config, "layer_types", None) or []) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        return f"sliding_window is {config.sliding_window}, and GPTModel's layers are written to attend to everything"
    return None


def _refuse_rope(config: Any) -> str | None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return f"rope_type is {kind}, and TransformerConfig knows default, linear and llama3 only"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor is {rope['partial_rotary_factor']}, and only 1.0 is written"
    if kind == "llama3":
        for key, value in LLAMA3.items():
            if rope[key] != value:
                return f"{key} of rope_parameters is {rope[key]}, and GPTModel computes with {value:g}"
    return None


def _refuse_routing(config: Any) -> str | None:
    if config.model_type != "glm4_moe":
        return None
    if config.n_group != 1 or config.topk_group != 1:
        return f"n_group is {config.n_group} and topk_group {config.topk_group}, and only 1 is written"
    if not config.norm_topk_prob:
        return "norm_topk_prob is false, and GPTModel's sigmoid router normalises the weights of the chosen experts"
    if config.num_experts_per_tok < 2:
        return (
            "num_experts_per_tok is 1, where GPTModel's sigmoid router does not normalise weights and the student does"
        )
    return None
