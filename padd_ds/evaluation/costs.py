"""What a token costs in any causal language model of transformers, counted on the loaded model."""

import json
from typing import Any

from padd_ds.conversion.costs import ATTENTION_CONTEXT
from padd_ds.conversion.families import head_dim_of
from padd_ds.errors import UserError
from padd_ds.evaluation.routers import Router, find_routers

Facts = dict[str, Any]


def model_facts(model: Any) -> Facts:
    """`config`, without what is the class's default, and `costs` of a loaded model, as plain values."""
    return {"config": json.loads(model.config.to_json_string(use_diff=True)), "costs": token_costs(model)}


def token_costs(model: Any) -> Facts:
    """Parameters held and parameters a token passes through, and the FLOPs of its forward pass.

    flops_per_token: of a token generated behind ATTENTION_CONTEXT others: 2 per active weight of a matrix product,
    the head included, the embedding not, and full attention over all of them. A tied head is held once. The same
    numbers as `conversion.costs` gives for the teachers and students that it knows.
    """
    idle = {
        id(value): _idle_share(model, router) for router in _routers(model) for value in router.experts.parameters()
    }
    values = dict(model.named_parameters())
    active = {name: value.numel() * (1 - idle.get(id(value), 0.0)) for name, value in values.items()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is table
    matrices = [name for name, value in values.items() if value.dim() >= 2 and not name.endswith("bias")]
    multiplied = sum(active[name] for name in matrices if tied or values[name] is not table)
    config = model.config
    attention = 4 * config.num_hidden_layers * ATTENTION_CONTEXT * config.num_attention_heads * head_dim_of(config)
    return {
        "total_parameters": sum(value.numel() for value in values.values()),
        "active_parameters": round(sum(active.values())),
        "flops_per_token": round(2 * multiplied) + attention,
        "attention_context_tokens": ATTENTION_CONTEXT,
    }


def decode_bytes_per_token(model: Any, batch: int, context: int) -> float:
    """Bytes of weights and caches that a decoding step reads, per token of its `batch` rows of `context` tokens each.

    Every weight but the embedding's is read once per step, of the routed experts those that a row goes to: the share
    1 - (1 - K / E)^batch of them if rows chose independently and evenly.
    """
    idle = {
        id(value): _idle_share(model, router) ** batch
        for router in _routers(model)
        for value in router.experts.parameters()
    }
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    values = [
        value for value in model.parameters() if value is not table or (head is not None and head.weight is table)
    ]
    weights = sum(value.numel() * value.element_size() * (1 - idle.get(id(value), 0.0)) for value in values)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim_of(config) * context * table.element_size()
    return weights / batch + cache


def _routers(model: Any) -> list[Router]:
    """None of a dense model."""
    try:
        return find_routers(model)
    except UserError:
        return []


def _idle_share(model: Any, router: Router) -> float:
    """The share of the routed experts that a token does not go to."""
    chosen: int = getattr(router.gate, "top_k", None) or model.config.num_experts_per_tok
    return 1 - chosen / router.n_experts
