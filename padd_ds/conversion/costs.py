"""Parameters and FLOPs per token of a dense teacher and of its student."""

from dataclasses import dataclass
from typing import Any

from padd_ds.conversion.families import Family, head_dim_of
from padd_ds.conversion.options import Slicing

ATTENTION_CONTEXT = 1024


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters held, parameters a token passes through, and the FLOPs of its forward pass.

    matmul_flops: 2 per active weight of a matrix product, the head included, the embedding not.
    attention_flops: scores and weighted sum of a token that attends to ATTENTION_CONTEXT tokens.
    head_flops: the part of matmul_flops that the head takes.
    """

    total_parameters: int
    active_parameters: int
    matmul_flops_per_token: int
    attention_flops_per_token: int
    head_flops_per_token: int

    @property
    def decode_flops_per_token(self) -> int:
        """Of a token generated after ATTENTION_CONTEXT others."""
        return self.matmul_flops_per_token + self.attention_flops_per_token

    @property
    def prefill_flops_per_token(self) -> int:
        """Mean over a prompt of ATTENTION_CONTEXT tokens, which attend to half of it; only the last needs the head."""
        head = self.head_flops_per_token - self.head_flops_per_token // ATTENTION_CONTEXT
        return self.matmul_flops_per_token - head + self.attention_flops_per_token // 2


def model_costs(config: Any, family: Family, slicing: Slicing, dense_layers: int = 0) -> tuple[Cost, Cost]:
    """(teacher, student) from the teacher's config. A tied head is held once but multiplied all the same."""
    ffn = 3 * config.hidden_size * slicing.width
    router = slicing.routed * config.hidden_size
    held = ffn * (slicing.shared + slicing.routed) // slicing.experts + router
    active = ffn * (slicing.shared + slicing.top_k) // slicing.experts + router
    layers, dense = config.num_hidden_layers, dense_layers * ffn
    sliced = layers - dense_layers
    teacher = dense_cost(config, family)
    student = _cost(config, family, dense + sliced * held, dense + sliced * active, n_tables=2)
    return teacher, student


def dense_cost(config: Any, family: Family) -> Cost:
    """Of a dense model."""
    ffn = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    return _cost(config, family, ffn, ffn, n_tables=1 if config.tie_word_embeddings else 2)


def _cost(config: Any, family: Family, held_ffn: int, active_ffn: int, n_tables: int) -> Cost:
    """From the FFN parameters of all layers, held and active."""
    layers, width = config.num_hidden_layers, config.hidden_size
    matrices, vectors = _attention_parameters(config, family)
    vectors += 2 * width
    table = config.vocab_size * width
    outside = layers * (matrices + vectors) + n_tables * table + width
    return Cost(
        total_parameters=held_ffn + outside,
        active_parameters=active_ffn + outside,
        matmul_flops_per_token=2 * (layers * matrices + active_ffn + table),
        head_flops_per_token=2 * table,
        attention_flops_per_token=4 * layers * ATTENTION_CONTEXT * config.num_attention_heads * head_dim_of(config),
    )


def _attention_parameters(config: Any, family: Family) -> tuple[int, int]:
    """Weights of the four projections of a layer, and of its biases and head norms."""
    head_dim = head_dim_of(config)
    query = config.num_attention_heads * head_dim
    key_value = 2 * config.num_key_value_heads * head_dim
    matrices = config.hidden_size * (2 * query + key_value)
    vectors = (query + key_value if family.qkv_bias else 0) + (2 * head_dim if family.qk_norm else 0)
    return matrices, vectors
