"""Checks on the DeepSpeed JSON that DeepSpeed itself leaves out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from padd_ds.config.load import nearest
from padd_ds.config.schema import RunConfig
from padd_ds.errors import UserError

OWNED_BY_RUN_YAML = {
    "train_batch_size": "warmup.batch_size or rollout.prompts",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "activation_checkpointing": "activation_checkpointing, true or false",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
    "zero_force_ds_cpu_optimizer": "optimizer.*, which is torch's AdamW wherever it runs",
}
"""Keys that must not stand in the JSON, and the run option that sets each."""

TOP_LEVEL_KEYS = frozenset(
    """
    aio amp autotuning bf16 checkpoint comms_logger communication_data_type
    compression_training csv_monitor data_efficiency data_types disable_allgather dump_state elasticity eigenvalue
    expert_parallel flops_profiler fp16 gradient_clipping gradient_predivide_factor memory_breakdown
    prescale_gradients seq_parallel_communication_data_type sparse_gradients timers torch_autocast
    use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)

EXPERT_PARALLEL_KEYS = frozenset(
    """
    enabled autoep_size preset_model moe_layer_pattern expert_pattern router_pattern use_grouped_mm
    disable_triton_grouped_mm route_norm route_scale score_apply combine_impl row_weighting_impl gate_up_impl
    comm_backend comm_num_sm comm_qp_margin comm_max_tokens_per_rank num_expert_groups num_limited_groups
    score_func top_k routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr
    has_shared_experts shared_experts_pattern shared_experts_gate_pattern expert_activation async_split_plan
    expert_tensor_parallel_size validate_folding_routing
    """.split()
)
"""DeepSpeed reads this section key by key and ignores the rest in silence."""

SUPPORTED_ZERO_STAGES = (0, 1, 2, 3)


def precision(tree: Mapping[str, Any]) -> Literal["bfloat16", "float32"]:
    """What the JSON asks for; it owns that choice. UserError for fp16."""
    if tree.get("fp16", {}).get("enabled", False):
        raise UserError("the DeepSpeed JSON enables fp16, which is not supported; use bf16 or neither")
    return "bfloat16" if tree.get("bf16", {}).get("enabled", False) else "float32"


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """The JSON at `path`; UserError on unknown keys, "auto", or what the run YAML owns."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; the run's option deepspeed names a JSON, for example one of ds_configs/"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a mapping, found {type(tree).__name__}")
    for key, option in OWNED_BY_RUN_YAML.items():
        if key in tree:
            raise UserError(f"{path}: {key} is set by the run configuration ({option}); take it out of the JSON")
    if "tensor_parallel" in tree:
        raise UserError(
            f"{path}: tensor_parallel is not supported; expert_parallel and zero_optimization spread models"
        )
    _refuse_unknown(path, tree, TOP_LEVEL_KEYS, "")
    _refuse_unknown(path, tree.get("expert_parallel", {}), EXPERT_PARALLEL_KEYS, "expert_parallel.")
    _refuse_auto(path, tree, "")
    return tree


def check_parallelism(
    path: Path, tree: Mapping[str, Any], world_size: int, n_experts: int | None, expert_compute: str = "dispatched"
) -> int:
    """The expert-parallel size; UserError where ranks, experts and sizes do not fit.

    n_experts: None for a dense model, for which the section on expert parallelism means nothing. expert_compute: as
    model.expert_compute.
    """
    stage = tree.get("zero_optimization", {}).get("stage", 0)
    if stage not in SUPPORTED_ZERO_STAGES:
        allowed = ", ".join(map(str, SUPPORTED_ZERO_STAGES))
        raise UserError(f"{path}: zero_optimization.stage {stage} is not supported; use one of {allowed}")
    _check_offload(path, tree.get("zero_optimization", {}), stage)
    if n_experts is None:
        return 1
    expert_parallel = tree.get("expert_parallel", {})
    if not expert_parallel.get("enabled", False):
        raise UserError(f'{path}: expert_parallel is missing; add {{"enabled": true, "autoep_size": 1}} or more')
    size = expert_parallel.get("autoep_size", 1)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: expert_parallel.autoep_size = {size!r} must be a positive integer")
    if world_size % size:
        raise UserError(f"{path}: {world_size} ranks cannot be split into groups of autoep_size {size}; change either")
    if n_experts % size:
        raise UserError(f"{path}: {n_experts} routed experts cannot be split over autoep_size {size} ranks")
    if expert_compute == "masked" and expert_parallel.get("comm_backend", "comm") != "comm":
        raise UserError(
            f"{path}: expert_parallel.comm_backend is {expert_parallel['comm_backend']}, but "
            "model.expert_compute=masked sends tokens by the collectives of the run; take it out, or set "
            "model.expert_compute=dispatched"
        )
    return size


def check_grouped_products(path: Path, tree: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    """UserError where use_grouped_mm, DeepSpeed's default, meets widths that torch's grouped product refuses.

    Rows must be whole multiples of 16 bytes. `widths`: elements, by the name in the model's config.
    """
    if not tree["expert_parallel"].get("use_grouped_mm", True):
        return
    multiple = 16 // {"bfloat16": 2, "float32": 4}[precision(tree)]
    for name, width in widths.items():
        if width % multiple:
            raise UserError(
                f"{path}: expert_parallel.use_grouped_mm takes widths that are multiples of {multiple}, but the "
                f"student's {name} is {width}; set use_grouped_mm to false"
            )


def _check_offload(path: Path, zero: Mapping[str, Any], stage: int) -> None:
    """UserError where weights or optimizer are to go where DeepSpeed or this trainer does not take them."""
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"{path}: zero_optimization.{key}.device {device} is not supported; use cpu")
        if device == "cpu" and stage < lowest:
            raise UserError(
                f"{path}: zero_optimization.{key} needs ZeRO stage {lowest} or higher, and it is {stage}; "
                "raise the stage, or take it out"
            )


def check_batches(config: RunConfig, world_size: int) -> None:
    """UserError where a global batch cannot be dealt out evenly to the ranks."""
    if config.stage == "warmup":
        _check_dealt("warmup.batch_size", config.warmup.batch_size, world_size)
    if config.has_rollouts:
        _check_dealt("rollout.prompts", config.rollout.prompts, world_size)
    responses = config.rollout.prompts * config.rollout.group_size // world_size
    if config.has_rollouts and responses % config.policy.updates_per_rollout:
        raise UserError(
            f"policy.updates_per_rollout {config.policy.updates_per_rollout} does not divide the {responses} responses "
            "of a rank (rollout.prompts * rollout.group_size / ranks)"
        )


def _check_dealt(key: str, number: int, world_size: int) -> None:
    if number % world_size:
        fitting = -(-number // world_size) * world_size
        raise UserError(
            f"{key} {number} is not divisible by {world_size} ranks; set {key}={fitting}, or take a number of ranks "
            f"that divides {number}"
        )


def _refuse_unknown(path: Path, tree: Any, known: frozenset[str], prefix: str) -> None:
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {prefix.rstrip('.')} must be a mapping, found {tree!r}")
    for key in tree:
        if key not in known:
            raise UserError(f"{path}: unknown key {prefix}{key}{nearest(key, set(known))}")


def _refuse_auto(path: Path, node: Any, prefix: str) -> None:
    if node == "auto":
        raise UserError(f'{path}: {prefix} is "auto", which nothing fills in here; write the value')
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_auto(path, value, f"{prefix}.{key}" if prefix else key)
