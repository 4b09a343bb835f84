"""Reward-augmented load balancing of the router's bias (PADD, Stage IV).

Shapes: L layers, E experts. Inputs are sums over all ranks, so that every rank computes the same bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from padd_ds.errors import UserError
from padd_ds.moe.load import load_share

BALANCE_KINDS = ("reward_augmented", "loss_free")
BALANCE_SIGNS = {"corrective": -1.0, "literal": 1.0}
REWARD_BIASES = ("offset", "integrated")


@dataclass(frozen=True, kw_only=True)
class BalanceOptions:
    """Constants of Stage IV; rates and clamp are in units of the layer's spread of scores, if scaled."""

    kind: str = "reward_augmented"
    """`reward_augmented` is PADD's; `loss_free` moves the bias by load_rate up or down, and looks at no reward
    (arXiv 2408.15664)."""
    load_rate: float = 0.01
    """eta, how much an update moves the bias per unit of load share; >= 0."""
    reward_rate: float = 0.05
    """gamma, the weight of the averaged advantage; >= 0."""
    ema_weight: float = 0.2
    """lambda_ema, the weight of the newest advantage; in (0, 1]."""
    sign: str = "corrective"
    """Choice: `corrective` lowers overloaded experts; `literal` raises them, as printed (a control)."""
    reward_bias: str = "offset"
    """Choice: `offset` adds gamma * EMA to the integrated load term, so that it can fall again;
    `integrated` adds it to the integral at each update, as printed."""
    centred: bool = True
    """Choice: the EMA counts relative to its mean over the experts; false takes it whole, as printed."""
    clamp: float | None = 2.0
    """Choice: the largest |bias|; None for no limit, as printed. An even load needs a bias as large as the
    distance of an expert's mean score from the others': 2 spreads reach outliers, while a runaway stops."""
    scale_by_spread: bool = True
    """Choice: rates and clamp are multiplied by the spread; false takes them as they are, as printed."""

    def __post_init__(self) -> None:
        if self.load_rate < 0 or self.reward_rate < 0 or not 0 < self.ema_weight <= 1:
            raise UserError(f"{self}: load_rate and reward_rate must be at least 0, ema_weight in (0, 1]")
        if self.clamp is not None and self.clamp <= 0:
            raise UserError(f"clamp: {self.clamp} must be greater than 0; null turns the limit off")
        if self.kind not in BALANCE_KINDS:
            raise UserError(f"kind: {self.kind!r} is not one of {', '.join(BALANCE_KINDS)}")
        if self.sign not in BALANCE_SIGNS:
            raise UserError(f"sign: {self.sign!r} is not one of {', '.join(BALANCE_SIGNS)}")
        if self.reward_bias not in REWARD_BIASES:
            raise UserError(f"reward_bias: {self.reward_bias!r} is not one of {', '.join(REWARD_BIASES)}")


@dataclass(frozen=True, kw_only=True)
class BalanceState:
    """All that Stage IV remembers, for all layers at once."""

    bias_LE: Tensor
    """What the router adds, in units of its scores."""
    integral_LE: Tensor
    """The part of the bias that adds up over updates."""
    ema_LE: Tensor
    """Average advantage, started at 0 and not yet corrected for that."""
    updates_LE: Tensor
    """How often ema_LE was updated, int64."""

    @classmethod
    def start(cls, bias_LE: Tensor) -> "BalanceState":
        """From the bias that the student's checkpoint holds (zeros for a new one)."""
        bias_LE = bias_LE.to(torch.promote_types(bias_LE.dtype, torch.float32))
        return cls(
            bias_LE=bias_LE.clone(),
            integral_LE=bias_LE.clone(),
            ema_LE=torch.zeros_like(bias_LE),
            updates_LE=torch.zeros_like(bias_LE, dtype=torch.int64),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat dictionary for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "BalanceState":
        """The state that `to_tensors` gave; UserError where a tensor is missing."""
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in tensors]
        if missing:
            lacking = ", ".join(missing)
            raise UserError(f"the saved balance state lacks {lacking}; resume from another checkpoint")
        return cls(**{name: tensors[name] for name in names})


@torch.no_grad()
def update_balance(
    state: BalanceState,
    counts_LE: Tensor,
    advantage_sum_LE: Tensor,
    advantage_count_LE: Tensor,
    spread_L: Tensor,
    options: BalanceOptions,
) -> BalanceState:
    """The state after an optimiser step, its new bias included.

    counts_LE: routed slots per expert; advantage sum and count: over the response tokens routed to it;
    spread_L: how far router scores differ between experts. A layer without tokens stays as it was, and so
    does the EMA of an expert without advantages.
    """
    ema_LE, updates_LE = _updated_ema(state, advantage_sum_LE, advantage_count_LE, options.ema_weight)
    reward_LE = options.reward_rate * _reward_signal(ema_LE, updates_LE, options)
    load_LE = BALANCE_SIGNS[options.sign] * (load_share(counts_LE) - 1 / counts_LE.shape[-1])
    if options.kind == "loss_free":
        load_LE, reward_LE = load_LE.sign(), torch.zeros_like(reward_LE)
    unit_L = spread_L.to(ema_LE.dtype) if options.scale_by_spread else torch.ones_like(ema_LE[:, 0])
    unit_L1 = unit_L[:, None]

    integrated = options.reward_bias == "integrated"
    step_LE = options.load_rate * load_LE + (reward_LE if integrated else 0.0)
    limit_LE = _limit(state.integral_LE, unit_L1, options.clamp)
    integral_LE = _within(state.integral_LE + unit_L1 * step_LE, limit_LE)
    bias_LE = integral_LE if integrated else _within(integral_LE + unit_L1 * reward_LE, limit_LE)

    routed_L1 = counts_LE.sum(-1, keepdim=True) > 0
    return BalanceState(
        bias_LE=torch.where(routed_L1, bias_LE, state.bias_LE),
        integral_LE=torch.where(routed_L1, integral_LE, state.integral_LE),
        ema_LE=torch.where(routed_L1, ema_LE, state.ema_LE),
        updates_LE=torch.where(routed_L1, updates_LE, state.updates_LE),
    )


def _updated_ema(
    state: BalanceState, advantage_sum_LE: Tensor, advantage_count_LE: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    seen_LE = advantage_count_LE > 0
    mean_LE = advantage_sum_LE.to(state.ema_LE.dtype) / advantage_count_LE.clamp(min=1)
    ema_LE = torch.where(seen_LE, weight * mean_LE + (1 - weight) * state.ema_LE, state.ema_LE)
    return ema_LE, state.updates_LE + seen_LE


def _reward_signal(ema_LE: Tensor, updates_LE: Tensor, options: BalanceOptions) -> Tensor:
    """The EMA corrected for its start at 0 and centred; 0 for an expert that never had an advantage."""
    known_LE = updates_LE > 0
    weight_sum_LE = 1 - (1 - options.ema_weight) ** updates_LE.to(ema_LE.dtype)
    signal_LE = torch.where(known_LE, ema_LE / weight_sum_LE, 0.0)
    if not options.centred:
        return signal_LE
    # over the known experts alone: a 0 that only means "unknown" should neither shift the mean nor be shifted
    mean_L1 = signal_LE.sum(-1, keepdim=True) / known_LE.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(known_LE, signal_LE - mean_L1, 0.0)


def _limit(integral_LE: Tensor, unit_L1: Tensor, clamp: float | None) -> Tensor | None:
    # a limit stops growth but never cuts what is there: a checkpoint's own bias may be larger, and a spread
    # measured on few tokens may be smaller
    return None if clamp is None else torch.maximum(clamp * unit_L1, integral_LE.abs())


def _within(bias_LE: Tensor, limit_LE: Tensor | None) -> Tensor:
    return bias_LE if limit_LE is None else torch.minimum(torch.maximum(bias_LE, -limit_LE), limit_LE)
