"""What the training loop knows of a stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from padd_ds.engine.ranks import Ranks, max_over_ranks, sum_over_ranks
from padd_ds.engine.student import Student


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
    """Sums and their counts, and largest values, over micro-batches and then over ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._layer_sums: dict[str, torch.Tensor] = {}
        self._largest: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1) -> None:
        """Add `total` over `count` things; every rank must add the same names."""
        values = [torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in (total, count)]
        self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack(values)

    def add_largest(self, name: str, value: torch.Tensor) -> None:
        """Remember the largest `value` of a name; every rank must add the same names."""
        value = value.detach().double().cpu()
        self._largest[name] = torch.maximum(self._largest.get(name, value), value)

    def add_layers(self, name: str, totals_L: torch.Tensor, count: torch.Tensor | float) -> None:
        """Add the layers' totals, each over `count` things; every rank must add the same names."""
        totals_L = totals_L.detach().double().cpu()
        counted = torch.cat([totals_L, torch.as_tensor(count, dtype=torch.float64).detach().cpu()[None]])
        self._layer_sums[name] = self._layer_sums.get(name, torch.zeros_like(counted)) + counted

    def layer_means(self, ranks: Ranks) -> dict[str, list[float]]:
        """The mean of each layer over all ranks; 0 where nothing was counted. Collective if anything was added."""
        if not self._layer_sums:
            return {}
        names = sorted(self._layer_sums)
        totals = sum_over_ranks(torch.stack([self._layer_sums[name] for name in names]).to(ranks.device)).cpu()
        return {name: (row[:-1] / row[-1].clamp(min=1)).tolist() for name, row in zip(names, totals, strict=True)}

    def largest(self, ranks: Ranks) -> dict[str, float]:
        """The largest of each name over all ranks. Collective if anything was added."""
        if not self._largest:
            return {}
        names = sorted(self._largest)
        values = max_over_ranks(torch.stack([self._largest[name] for name in names]).to(ranks.device)).tolist()
        return dict(zip(names, values, strict=True))

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Sum over all ranks divided by count over all ranks; 0 where nothing was counted. Collective."""
        stacked = torch.stack([self._sums[name] for name in sorted(self._sums)]).to(ranks.device)
        totals = sum_over_ranks(stacked).cpu()
        return {
            name: float(total / count) if count else 0.0
            for name, (total, count) in zip(sorted(self._sums), totals, strict=True)
        }
