"""Tiny random mixtures of experts of several families."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NARROW = {"moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_NARROW, "num_experts": 4, "norm_topk_prob": True},
    "qwen2_moe": {**_NARROW, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "glm4_moe": {**_NARROW, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {
        **_NARROW,
        **{"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        **{"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
}
SIGMOID = {"glm4_moe", "deepseek_v3"}


def routed_model(family: str, vocabulary: int, **more: Any) -> Any:
    """In fp32, with weights large enough that tokens differ in their routing."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], "vocab_size": vocabulary, **more})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model
