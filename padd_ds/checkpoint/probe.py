"""Logits of fixed tokens, by which a model is known again after it was handed over.

Legend: T tokens, V vocabulary.
"""

import torch

PROBE = "probe_logits"
"""In a checkpoint's stage.safetensors, beside what the stage remembers: [T, V] of the live model when it was saved."""
TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Mean difference of logits over their mean size. fp32: far above rounding. bf16: a GPU rounds otherwise than the CPU
that the first logits come from, and a token near a tie takes another expert; 0.08 was seen on an H200, with random
weights in four layers of Qwen2.5-7B's size."""


def probe_tokens(vocabulary: int) -> torch.Tensor:
    """[T]: ids that follow from the vocabulary's size alone."""
    return torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0))


def deviation(found_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """Mean difference over the mean size of what was expected; NaN where there is one in either."""
    return float((found_TV - expected_TV).abs().mean() / expected_TV.abs().mean())
