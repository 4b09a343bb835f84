"""What the training loop knows of a stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from padd_ds.engine.ranks import Ranks, sum_over_ranks
from padd_ds.engine.student import Student


class TrainingDiverged(RuntimeError):
    """A loss is not finite; raised on all ranks before the weights change."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step tells: the same numbers on every rank."""

    metrics: Mapping[str, float]
    """Scalars by name, units in the name."""
    routing: Mapping[str, Any] = field(default_factory=dict)
    """Lists per layer (and expert), for routing/routing.jsonl."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """A few responses of this rank, to read."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage, ready to run."""

    student: Student
    step: Callable[[int], StepReport]
    """Train step `n` (from 0): a function of the weights and of `n` alone, so that resuming needs no more."""
    state: Callable[[], dict[str, torch.Tensor]] = dict
    """What the stage itself remembers between steps."""
    load_state: Callable[[Mapping[str, torch.Tensor]], None] = lambda tensors: None


class MetricSums:
    """Sums and their counts, added up over micro-batches and then over ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1) -> None:
        """Add `total` over `count` things; every rank must add the same names."""
        values = [torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in (total, count)]
        self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack(values)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Sum over all ranks divided by count over all ranks; 0 where nothing was counted. Collective."""
        stacked = torch.stack([self._sums[name] for name in sorted(self._sums)]).to(ranks.device)
        totals = sum_over_ranks(stacked).cpu()
        return {
            name: float(total / count) if count else 0.0
            for name, (total, count) in zip(sorted(self._sums), totals, strict=True)
        }
