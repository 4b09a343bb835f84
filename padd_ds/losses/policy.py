"""Policy objectives with one signature: GRPO, Dr. GRPO, GSPO, RSPO and PADD's PR-GRPO (Stage III).

Dr. GRPO (arXiv 2503.20783) is GRPO's clipped loss with `normalisation="constant"` and advantages that are not divided
by the spread of their group.

Shapes: B responses, T tokens in a sequence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from padd_ds.errors import UserError
from padd_ds.losses.tokens import compute_dtype

NORMALISATIONS = ("response", "token", "constant")
CLIPS = {"gspo": (3e-4, 4e-4)}
"""(clip_low, clip_high) of objectives that do not go by the defaults of PolicyOptions, from their papers."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Constants of the objectives."""

    clip_low: float = 0.2
    """A ratio below 1 - clip_low is clipped; 0 to 1. Choice: the paper gives no eps."""
    clip_high: float = 0.2
    """A ratio above 1 + clip_high is clipped; >= 0."""
    shift_penalty: float = 0.1
    """lambda, the weight of the router shift in PR-GRPO; >= 0."""
    shift_floor: float = 0.8
    """RSPO does not discount a ratio below this share of it; 0 to 1 (arXiv 2510.23027)."""
    normalisation: str = "response"
    """`response`: all responses count the same, by the mean over their tokens (the paper); `token`: all
    tokens do; `constant`: the sum over a response's tokens is divided by `constant_tokens` (Dr. GRPO)."""
    constant_tokens: int = 1
    """Divides a response's sum with `constant`; the longest response allowed, > 0."""

    def __post_init__(self) -> None:
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0 and self.shift_penalty >= 0):
            raise UserError(f"{self}: clip_low must be in [0, 1], clip_high and shift_penalty at least 0")
        if not (0 <= self.shift_floor <= 1 and self.constant_tokens > 0):
            raise UserError(f"{self}: shift_floor must be in [0, 1], constant_tokens above 0")
        if self.normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            raise UserError(f"normalisation: {self.normalisation!r} is not one of {known}")


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """A loss to be minimised, and detached diagnostics; all are sums, and the tokens are unmasked ones."""

    loss_sum: Tensor
    """To be divided by `loss_count` of the global batch."""
    ratio_deviation_sum: Tensor
    """|pi / pi_old - 1| over tokens, before any penalty."""
    used_ratio_sum: Tensor
    """The ratio that the advantage is multiplied by, before it is clipped, over tokens: rho_hat in PR-GRPO."""
    penalty_sum: Tensor
    """How strongly the router shift may discount, -log, over all tokens whatever their advantage (lambda * Gamma in
    PR-GRPO), to stand beside ratio_deviation_sum."""
    clipped_tokens: Tensor
    """Tokens whose clipped branch was the smaller one, so that they gave no gradient."""
    kl_old_sum: Tensor
    """Estimate of KL(pi_old || pi), nats, over tokens: ratio - 1 - log ratio."""
    tokens: Tensor


PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PolicyOptions], PolicyTerms]
"""Takes log-probabilities, the old policy's, advantages ([B], or [B, T] where tokens are weighted), mask and shift."""


def loss_count(mask_BT: Tensor, options: PolicyOptions) -> Tensor:
    """What `loss_sum` is divided by: responses that have a token, or tokens; scalar int64.

    Choice: a row without tokens is no response, so rows that only fill up a batch change nothing.
    """
    return mask_BT.bool().sum() if options.normalisation == "token" else mask_BT.bool().any(-1).sum()


RatioRule = Callable[[Tensor, Tensor, Tensor, Tensor, PolicyOptions], tuple[Tensor, Tensor]]
"""(log ratio [B, T], shift [B, T], advantage [B, 1 or T], mask [B, T], options) to (log of the ratio that is clipped,
penalty), both [B, T]. Log ratio, shift and results are 0 in padding."""


def _grpo(
    log_ratio_BT: Tensor, shift_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, options: PolicyOptions
) -> tuple[Tensor, Tensor]:
    """rho = pi / pi_old per token; the router shift is not looked at."""
    return log_ratio_BT, torch.zeros_like(log_ratio_BT)


def _gspo(
    log_ratio_BT: Tensor, shift_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, options: PolicyOptions
) -> tuple[Tensor, Tensor]:
    """One ratio per response, the geometric mean of its tokens' (arXiv 2507.18071, eq. 5 and 7).

    Its clip range is narrower by orders of magnitude: CLIPS. A clipped response counts with all its tokens.
    """
    mean_B1 = log_ratio_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return mean_B1.expand_as(log_ratio_BT).masked_fill(~mask_BT, 0.0), torch.zeros_like(log_ratio_BT)


def _rspo(
    log_ratio_BT: Tensor, shift_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, options: PolicyOptions
) -> tuple[Tensor, Tensor]:
    """rho * max(exp(-shift), shift_floor), whatever the advantage (arXiv 2510.23027).

    The shift is the mean of |log g - log g_old| over layers and the experts that the old policy chose.
    Choice: the discount is put on GRPO's ratios per token; the paper also puts it on those of GMPO.
    """
    largest = -math.log(options.shift_floor) if options.shift_floor else math.inf
    penalty_BT = shift_BT.clamp(max=largest)
    return log_ratio_BT - penalty_BT, penalty_BT


def _pr_grpo(
    log_ratio_BT: Tensor, shift_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, options: PolicyOptions
) -> tuple[Tensor, Tensor]:
    """rho * exp(-lambda Gamma 1[A < 0]) (PADD, Stage III); Gamma is the shift: how far a token's routing has moved."""
    penalty_BT = options.shift_penalty * shift_BT
    return log_ratio_BT - penalty_BT * (advantage_BT < 0), penalty_BT


def _objective(rule: RatioRule) -> PolicyLoss:
    """-min(rho A, clip(rho) A), with the ratios that `rule` makes of pi / pi_old."""

    def policy_sum(
        logprobs_BT: Tensor,
        old_logprobs_BT: Tensor,
        advantage: Tensor,
        mask_BT: Tensor,
        shift_BT: Tensor,
        options: PolicyOptions,
    ) -> PolicyTerms:
        mask_BT = mask_BT.bool()
        log_ratio_BT = _masked_log_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
        shift_BT = shift_BT.detach().to(log_ratio_BT.dtype).masked_fill(~mask_BT, 0.0)
        advantage_BT = (advantage if advantage.dim() == 2 else advantage[:, None]).detach().to(log_ratio_BT.dtype)
        used_log_BT, penalty_BT = rule(log_ratio_BT, shift_BT, advantage_BT, mask_BT, options)
        return _clipped_terms(log_ratio_BT, used_log_BT, penalty_BT, advantage_BT, mask_BT, options)

    policy_sum.__doc__ = f"{_objective.__doc__}\n\n{rule.__doc__}"
    return policy_sum


grpo_sum, gspo_sum, rspo_sum, pr_grpo_sum = map(_objective, (_grpo, _gspo, _rspo, _pr_grpo))
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": grpo_sum,
    "dr_grpo": grpo_sum,
    "gspo": gspo_sum,
    "rspo": rspo_sum,
    "pr_grpo": pr_grpo_sum,
}


def importance_weights(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_rollout, cap) per token, 1 in padding, [B, T], without gradient.

    Corrects for a rollout that draws from another distribution than the one that training computes from the same
    weights: multiplied onto the advantages (truncated importance sampling).
    """
    log_ratio_BT = _masked_log_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT.bool())
    return log_ratio_BT.exp().clamp(max=cap).detach()


def reference_kl_sum(
    logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor, options: PolicyOptions
) -> Tensor:
    """KL(pi || reference) as GRPO estimates it, q - log q - 1 with q = reference / pi, nats (arXiv 2402.03300, eq. 4).

    A sum over tokens with the weights of the policy loss, to be divided by `loss_count`; scalar.
    """
    mask_BT = mask_BT.bool()
    log_q_BT = -_masked_log_ratio(logprobs_BT, reference_logprobs_BT, mask_BT)
    return ((log_q_BT.exp() - log_q_BT - 1) * _token_weights(mask_BT, options, log_q_BT.dtype)).sum()


def _masked_log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    dtype = compute_dtype(logprobs_BT, old_logprobs_BT)
    difference_BT = logprobs_BT.to(dtype) - old_logprobs_BT.detach().to(dtype)
    # before exp, so that whatever stands in padding neither overflows nor reaches a gradient
    return difference_BT.masked_fill(~mask_BT, 0.0)


def _clipped_terms(
    log_ratio_BT: Tensor,
    used_log_BT: Tensor,
    penalty_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    options: PolicyOptions,
) -> PolicyTerms:
    """The clipped loss of the ratios exp(used_log), and diagnostics of log_ratio and penalty; all 0 in padding."""
    ratio_BT = used_log_BT.exp()
    free_BT = ratio_BT * advantage_BT
    clipped_BT = ratio_BT.clamp(1 - options.clip_low, 1 + options.clip_high) * advantage_BT
    weight_BT = _token_weights(mask_BT, options, ratio_BT.dtype)
    loss_sum = -(torch.minimum(free_BT, clipped_BT) * weight_BT).sum()
    with torch.no_grad():
        token_ratio_BT = log_ratio_BT.exp()
        return PolicyTerms(
            loss_sum=loss_sum,
            ratio_deviation_sum=(token_ratio_BT - 1).abs().sum(),
            used_ratio_sum=(ratio_BT * mask_BT).sum(),
            penalty_sum=penalty_BT.sum(),
            clipped_tokens=((clipped_BT < free_BT) & mask_BT).sum(),
            kl_old_sum=(token_ratio_BT - 1 - log_ratio_BT).sum(),
            tokens=mask_BT.sum(),
        )


def _token_weights(mask_BT: Tensor, options: PolicyOptions, dtype: torch.dtype) -> Tensor:
    mask_BT = mask_BT.to(dtype)
    if options.normalisation == "token":
        return mask_BT
    if options.normalisation == "constant":
        return mask_BT / options.constant_tokens
    return mask_BT / mask_BT.sum(-1, keepdim=True).clamp(min=1)
