"""How DeepSpeed's expert parallelism finds the parts of each student class."""

from typing import Any

from padd_ds.errors import UserError

GLM4_MOE_KEYS = {
    "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "num_experts_attr": "n_routed_experts",
    "top_k_attr": "num_experts_per_tok",
    "score_func": "sigmoid",
    "route_norm": True,
    "has_shared_experts": True,
    "shared_experts_pattern": "shared_experts",
}
"""DeepSpeed has no preset for glm4_moe, the class that padd-convert writes."""

EXPERT_PARALLEL_KEYS = {"glm4_moe": GLM4_MOE_KEYS}
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
"""How the configs of Hugging Face's MoE classes name their number of experts."""


def is_dense(model_config: Any) -> bool:
    """Whether a model has no experts."""
    return not any(getattr(model_config, name, None) for name in EXPERT_COUNTS)


def expert_parallel_keys(model_config: Any) -> dict[str, Any]:
    """The keys of DeepSpeed's expert_parallel section for a student; UserError for a class without them."""
    if model_config.model_type not in EXPERT_PARALLEL_KEYS:
        known = ", ".join(EXPERT_PARALLEL_KEYS)
        raise UserError(f"student class {model_config.model_type} cannot be trained yet; known: {known}")
    keys = EXPERT_PARALLEL_KEYS[model_config.model_type]
    if not model_config.n_shared_experts:
        # The class has them nevertheless, of width 0, which ZeRO-3 cannot spread.
        keys = {name: value for name, value in keys.items() if name != "shared_experts_pattern"}
        keys["has_shared_experts"] = False
    return keys | {"routed_scaling_factor": model_config.routed_scaling_factor}
