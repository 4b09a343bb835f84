"""How much the chosen experts tell of a row's subject, with its uncertainty and a control.

Shapes: N rows, L layers, E experts, C subjects, R repetitions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from padd_ds.moe.labels import esi, nmi

RESAMPLES, SHUFFLES = 1000, 200
_TAIL = 0.025


@dataclass(frozen=True, kw_only=True)
class Association:
    """A measure of association; the first numbers are of its mean over layers."""

    value: float
    interval_95: tuple[float, float]
    """Pivotal bootstrap over rows, at least 0. Choice: a plug-in estimate of information is too large, and
    resampling makes it larger by as much again, which this interval takes off and a percentile one would add."""
    shuffled_mean: float
    """With the subjects dealt out to the rows at random: what no association at all looks like in as many rows."""
    shuffled_95: float
    """95 of 100 shuffles are at most this."""
    p_value: float
    """Of the permutation test: (1 + shuffles at or above `value`) / (1 + shuffles)."""
    by_layer: list[float]
    interval_95_by_layer: list[tuple[float, float]]
    shuffled_mean_by_layer: list[float]


def specialisation(
    chosen_NLE: Tensor, labels_N: Tensor, seed: int = 0, resamples: int = RESAMPLES, shuffles: int = SHUFFLES
) -> dict[str, Association]:
    """`nmi` and `esi_nats` between expert and subject.

    chosen_NLE: slots that each expert got of a row's tokens; labels_N: 0 to C - 1. Rows are what is drawn, with all
    their tokens: those of one text are no independent observations.
    """
    rows, layers, experts = chosen_NLE.shape
    subjects = int(labels_N.max()) + 1
    flat_NX = chosen_NLE.flatten(1).double()
    generator = torch.Generator().manual_seed(seed)

    def measured(weight_CN: Tensor) -> Tensor:
        counts_LCE = (weight_CN @ flat_NX).view(subjects, layers, experts).transpose(0, 1)
        return torch.stack([nmi(counts_LCE), esi(counts_LCE)])

    def of_rows(drawn_N: Tensor, subject_N: Tensor) -> Tensor:
        weight_CN = torch.zeros(subjects, rows, dtype=torch.float64)
        return measured(
            weight_CN.index_put_((subject_N, drawn_N), torch.ones((), dtype=torch.float64), accumulate=True)
        )

    def resampled() -> Tensor:
        drawn_N = torch.randint(rows, (rows,), generator=generator)
        return of_rows(drawn_N, labels_N[drawn_N])

    def shuffled() -> Tensor:
        return of_rows(torch.arange(rows), labels_N[torch.randperm(rows, generator=generator)])

    value_2L = of_rows(torch.arange(rows), labels_N)
    drawn_R2L, shuffled_R2L = _repeated(resampled, resamples), _repeated(shuffled, shuffles)
    return {
        name: _association(value_2L[place], drawn_R2L[:, place], shuffled_R2L[:, place])
        for place, name in enumerate(("nmi", "esi_nats"))
    }


def _repeated(draw: Callable[[], Tensor], times: int) -> Tensor:
    return torch.stack([draw() for _ in range(times)])


def _association(value_L: Tensor, drawn_RL: Tensor, shuffled_RL: Tensor) -> Association:
    value, shuffled_R = float(value_L.mean()), shuffled_RL.mean(1)
    # The shuffles that leave the table as it is differ from it by rounding.
    reached = int((shuffled_R >= value - 1e-12).sum())
    return Association(
        value=value,
        interval_95=_pivotal(value_L.mean(), drawn_RL.mean(1)),
        shuffled_mean=float(shuffled_R.mean()),
        shuffled_95=float(shuffled_R.quantile(0.95)),
        p_value=(1 + reached) / (1 + len(shuffled_R)),
        by_layer=value_L.tolist(),
        interval_95_by_layer=[_pivotal(*layer) for layer in zip(value_L, drawn_RL.T, strict=True)],
        shuffled_mean_by_layer=shuffled_RL.mean(0).tolist(),
    )


def _pivotal(value: Tensor, drawn_R: Tensor) -> tuple[float, float]:
    low, high = drawn_R.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=drawn_R.dtype)).tolist()
    return max(0.0, 2 * float(value) - high), max(0.0, 2 * float(value) - low)
