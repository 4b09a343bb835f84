"""Whether a model still computes what it did before it was handed over: to the engine, or through a checkpoint.

Legend: T tokens, V vocabulary.
"""

from typing import Any

import torch

from padd_ds.checkpoint.probe import TOLERANCE, deviation, probe_tokens
from padd_ds.engine.ranks import OtherRankFailed, Ranks, together
from padd_ds.errors import HandoverError


@torch.no_grad()
def probe_logits(model: Any, vocabulary: int, device: torch.device) -> torch.Tensor:
    """[T, V] fp32 on the CPU: a model's or an engine's logits of tokens that follow from the vocabulary's size alone.

    Collective where the model's forward pass is.
    """
    ids_T = probe_tokens(vocabulary).to(device)
    training = model.training
    model.eval()
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float().cpu()
    model.train(training)
    return logits_TV


def check_handover(
    found_TV: torch.Tensor, expected_TV: torch.Tensor, precision: torch.dtype, what: str, ranks: Ranks
) -> None:
    """HandoverError, on all ranks, unless on each of them the logits agree as far as their precision goes."""

    def compare() -> None:
        off = deviation(found_TV, expected_TV)
        if not off <= TOLERANCE[precision]:
            raise HandoverError(
                f"{what}: logits are off by {off:.2g} of their mean size, more than {TOLERANCE[precision]:g}; "
                "it is not the model that it was, so nothing is trained"
            )

    try:
        together(compare, ranks)
    except OtherRankFailed as error:
        raise HandoverError(str(error)) from error
