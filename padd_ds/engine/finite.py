"""Losses and gradients that are not finite, noticed before the optimiser uses them."""

import torch

from padd_ds.engine.ranks import OtherRankFailed, Ranks, any_rank, together
from padd_ds.errors import TrainingDiverged

LOSS = "the loss"


class FiniteWatch:
    """Looks at every loss that it is shown, and at every gradient of a model's trained parameters.

    DeepSpeed looks at gradients in fp16 only; in bf16 and fp32 one that is not finite would make all weights so.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and _size(p) > 0]
        self._names = [LOSS, *(f"the gradient of {name}" for name, _ in trained)]
        # On the device, so that a backward pass need not wait for it.
        self._finite = torch.ones(len(self._names), dtype=torch.bool, device=device)
        for place, (_, parameter) in enumerate(trained, start=1):
            parameter.register_hook(lambda gradient, place=place: self._see(gradient, place))

    def see_loss(self, loss: torch.Tensor) -> None:
        self._see(loss.detach(), 0)

    def check(self, ranks: Ranks) -> None:
        """TrainingDiverged on all ranks if one of them saw something that is not finite since the last check."""
        if any_rank(not bool(self._finite.all()), ranks):
            try:
                together(self._tell, ranks)
            except OtherRankFailed as error:
                raise TrainingDiverged(str(error)) from error

    def _see(self, values: torch.Tensor, place: int) -> None:
        # One pass, no copy, and a nan anywhere is both; on a CPU many times faster than a norm to infinity.
        low, high = torch.aminmax(values)
        self._finite[place].logical_and_(low.isfinite() & high.isfinite())

    def _tell(self) -> None:
        bad = [name for name, finite in zip(self._names, self._finite.tolist(), strict=True) if not finite]
        if bad:
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise TrainingDiverged(f"{bad[0]}{more} is not finite; lower optimizer.learning_rate")


def _size(parameter: torch.nn.Parameter) -> int:
    """Its elements; under ZeRO-3 it holds none of them until it is gathered."""
    whole: int | None = getattr(parameter, "ds_numel", None)
    return parameter.numel() if whole is None else whole
