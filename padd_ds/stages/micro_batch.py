"""What a joint update works on: responses with the policy that made them, and the counts of the whole update.

Legend: B responses, R response tokens, L tokens of prompt and response, S = B * L, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch

from padd_ds.rollout.batch import RolloutBatch
from padd_ds.stages.teacher import TeacherOnPrompts


@dataclass(frozen=True, kw_only=True)
class OldPolicy:
    """What the student did before the updates of this rollout, for one micro-batch."""

    logprobs_BR: torch.Tensor
    reference_logprobs_BR: torch.Tensor | None
    """The reference model's; None where there is none."""
    scores_SE: list[torch.Tensor]
    """By layer, over all S = B * L positions."""
    selected_SK: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Responses that are trained on together, with the policy that made them."""

    batch: RolloutBatch
    prompt_B: torch.Tensor
    """Number of each response's prompt among those of the rank's rollout."""
    teacher: TeacherOnPrompts | None
    """None where there is no distillation."""
    kd_weight: float
    """Of the distillation loss at this step."""
    routing_seed: int
    old: OldPolicy


@dataclass(frozen=True)
class Counts:
    """Of an update, over all ranks and micro-batches."""

    response_tokens: torch.Tensor
    policy: torch.Tensor
    """What the policy loss is a mean over."""
    tokens: torch.Tensor
    """Prompts included."""


def layer_routes(batch: RolloutBatch) -> list[torch.Tensor] | None:
    """The rollout's routes as one [S, K] per layer."""
    if batch.routes_BLNK is None:
        return None
    return [routes_BLK.flatten(0, 1).long() for routes_BLK in batch.routes_BLNK.unbind(dim=2)]
