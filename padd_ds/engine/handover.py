"""Whether a model still computes what it did before it was handed over: to the engine, or through a checkpoint.

Legend: T tokens, V vocabulary.
"""

from typing import Any

import torch

from padd_ds.engine.ranks import OtherRankFailed, Ranks, together
from padd_ds.errors import HandoverError

TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Mean difference of logits over their mean size. fp32: far above rounding. bf16: a guess that should stop no sound
run, as a GPU rounds otherwise than the CPU that the first logits come from, and no GPU has been measured."""


@torch.no_grad()
def probe_logits(model: Any, vocabulary: int, device: torch.device) -> torch.Tensor:
    """[T, V] fp32 on the CPU: a model's or an engine's logits of tokens that follow from the vocabulary's size alone.

    Collective where the model's forward pass is.
    """
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(vocabulary, (TOKENS,), generator=generator).to(device)
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
        off = float((found_TV - expected_TV).abs().mean() / expected_TV.abs().mean())
        if not off <= TOLERANCE[precision]:
            raise HandoverError(
                f"{what}: logits are off by {off:.2g} of their mean size, more than {TOLERANCE[precision]:g}; "
                "it is not the model that it was, so nothing is trained"
            )

    try:
        together(compare, ranks)
    except OtherRankFailed as error:
        raise HandoverError(str(error)) from error
