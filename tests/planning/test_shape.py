"""Shapes count the parameters of the classes themselves."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from padd_ds.errors import UserError
from padd_ds.planning.shape import shape_of

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mistral": MistralConfig(**COMMON, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**COMMON, tie_word_embeddings=False),
    "glm4_moe": Glm4MoeConfig(
        **COMMON, **EXPERTS, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, use_qk_norm=True
    ),
    "glm4_moe, bias": Glm4MoeConfig(
        **COMMON, **EXPERTS, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=0, attention_bias=True
    ),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, **EXPERTS, num_experts=8, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_class(name: str) -> None:
    config, shape = CONFIGS[name], shape_of(CONFIGS[name], name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    experts = [p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n]
    assert shape.expert_parameters == sum(experts)
    active = shape.parameters - sum(experts) * (shape.experts - shape.top_k) // max(shape.experts, 1)
    assert shape.active_parameters == active


def test_an_uncounted_class_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"model class gpt2 cannot be planned for; known: llama, mistral"):
        shape_of(GPT2Config(), "there")


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**COMMON, mlp_bias=True), Qwen3MoeConfig(**COMMON, **EXPERTS, num_experts=8, mlp_only_layers=[0])],
)
def test_variants_that_would_be_miscounted_are_refused(config: LlamaConfig) -> None:
    with pytest.raises(UserError, match="cannot be planned"):
        shape_of(config, "there")
