"""What one training step asks of one rank: rows, tokens and settings, from a run's configuration.

Legend: P prompts, G responses per prompt, B rows of a micro-batch, T prompt tokens, R response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from padd_ds.config.schema import RunConfig

DEFAULT_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size and allgather_bucket_size where the JSON names none."""
DEFAULT_GROUP = 1_000_000_000
"""Elements that ZeRO-3 updates at once."""
DEFAULT_LIVE = 1_000_000_000
"""Elements of gathered parameters that ZeRO-3 lets live."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How weights, gradients and optimizer are laid out over the ranks."""

    world: int
    zero_stage: int
    expert_parallel: int
    """Ranks that share the experts."""
    value_bytes: int
    """Of a weight, gradient or activation: 2 in bf16, 4 in fp32."""
    reduce_bucket: int = DEFAULT_BUCKET
    """Elements."""
    overlapped: bool = False
    """Whether gradients are reduced while the backward pass goes on, from a second bucket."""
    live_parameters: int = DEFAULT_LIVE
    update_group: int = DEFAULT_GROUP
    offloads_optimizer: bool = False
    offloads_weights: bool = False

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // self.expert_parallel


def layout_of(tree: Mapping[str, Any], world: int, expert_parallel: int) -> Layout:
    """The layout that a DeepSpeed JSON asks for. `expert_parallel`: 1 for a dense model."""
    zero = tree.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    on_cpu = {name: zero.get(name, {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")}
    return Layout(
        world=world,
        zero_stage=stage,
        expert_parallel=expert_parallel,
        value_bytes=2 if tree.get("bf16", {}).get("enabled", False) else 4,
        reduce_bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
        # DeepSpeed's default: only stage 3 overlaps.
        overlapped=bool(zero.get("overlap_comm", stage == 3)),
        live_parameters=int(zero.get("stage3_max_live_parameters", DEFAULT_LIVE)),
        update_group=int(zero.get("sub_group_size", DEFAULT_GROUP)),
        offloads_optimizer=on_cpu["offload_optimizer"],
        offloads_weights=on_cpu["offload_param"],
    )


@dataclass(frozen=True, kw_only=True)
class ServerShare:
    """Bytes that a rollout server takes of a training rank's device."""

    awake: float
    """In the rollout."""
    asleep: float
    """While the student is trained."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step of one rank."""

    stage: str
    """As in the run's configuration."""
    prompt_tokens: int
    """T."""
    response_tokens: int
    """R; in the warm-up the target's."""
    rows: int
    """Sequences that the rank trains on in a step, over all updates."""
    updates: int
    """Optimiser steps."""
    micro_batch: int
    """B."""
    group: int
    """G; 0 without rollout."""
    prompts_at_once: int
    """P whose responses are generated together; 0 without rollout."""
    checkpointing: bool
    distils: bool
    """Whether the teacher computes logits in this step."""
    trains_all: bool
    """Every weight, or the experts alone."""
    teacher_placement: str = "replicated"
    masked: bool = False
    """Whether a rank runs all its experts on every token that it gets."""
    served: ServerShare | None = None
    """Where servers draw the responses instead of the ranks."""

    @property
    def sequence(self) -> int:
        """Tokens of a row."""
        return self.prompt_tokens + self.response_tokens

    @property
    def micro_batches(self) -> int:
        """Of one update."""
        return -(-self.rows // self.updates // self.micro_batch)

    @property
    def prompts(self) -> int:
        """Of the rank's rollout."""
        return self.rows // self.group if self.group else 0


def workload_of(
    config: RunConfig, world: int, prompt_tokens: int | None = None, response_tokens: int | None = None
) -> Workload:
    """What a step of `config` asks of one of `world` ranks; lengths default to the largest that are allowed."""
    updates = config.policy.updates_per_rollout if config.has_rollouts else 1
    prompts = config.rollout.prompts // world if config.has_rollouts else 0
    rows = prompts * config.rollout.group_size if config.has_rollouts else config.warmup.batch_size // world
    longest_prompt, longest_response = _longest(config)
    return Workload(
        stage=config.stage,
        prompt_tokens=longest_prompt if prompt_tokens is None else prompt_tokens,
        response_tokens=longest_response if response_tokens is None else response_tokens,
        rows=rows,
        updates=updates,
        micro_batch=min(config.micro_batch_size, rows // updates),
        group=config.rollout.group_size if config.has_rollouts else 0,
        prompts_at_once=min(prompts, config.rollout.prompts_per_batch or prompts),
        checkpointing=config.activation_checkpointing,
        distils=config.needs_teacher,
        trains_all=config.stage != "warmup",
        teacher_placement=config.model.teacher_placement,
        masked=config.model.expert_compute == "masked",
    )


def _longest(config: RunConfig) -> tuple[int, int]:
    """Tokens of the longest prompt and response, or target, that the run allows."""
    if config.reads_corpora:
        return 1, config.warmup.sequence_length - 1
    if config.has_rollouts:
        return config.data.max_prompt_tokens, config.rollout.max_new_tokens
    return config.data.max_prompt_tokens, config.data.max_target_tokens
