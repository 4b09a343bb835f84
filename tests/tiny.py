"""Tiny random models for tests."""

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM


def tiny_student(
    n_experts: int = 4,
    top_k: int = 2,
    seed: int = 0,
    vocabulary: int = 64,
    shared: int = 1,
    head_dim: int = 8,
    dense_layers: int = 0,
    **attention: bool,
) -> Glm4MoeForCausalLM:
    """A random student as padd-convert writes it: untied head, one shared slice, experts that add up.

    `attention`: attention_bias, use_qk_norm.
    """
    config = Glm4MoeConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=(n_experts + 1) * 16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        n_routed_experts=n_experts,
        n_shared_experts=shared,
        num_experts_per_tok=top_k,
        routed_scaling_factor=float(top_k),
        first_k_dense_replace=dense_layers,
        norm_topk_prob=True,
        max_position_embeddings=128,
        num_nextn_predict_layers=0,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0},
        partial_rotary_factor=1.0,
        **attention,
    )
    torch.manual_seed(seed)
    model = Glm4MoeForCausalLM(config)
    for parameter in model.parameters():
        # Larger than the usual initialisation, so that logits and routing differ clearly between tokens.
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model.float().eval()
