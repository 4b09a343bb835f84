"""Token accounting: sums over the tokens that count, in chunks that bound memory.

Shapes: B batch, T tokens in a sequence, S = B * T flattened tokens, C tokens of one chunk, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where any of `tensors` already is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def map_token_chunks(function: Callable[..., Tensor], *tensors_S: Tensor, chunk_tokens: int) -> list[Tensor]:
    """`function` of each run of `chunk_tokens` tokens; backward computes a chunk again instead of keeping it.

    All tensors have the tokens as their first dimension. `split`, because its backward joins the chunks'
    gradients once, where slicing would add one full-size gradient per chunk.
    """
    chunks = zip(*(tensor_S.split(chunk_tokens) for tensor_S in tensors_S), strict=True)
    if not (torch.is_grad_enabled() and any(tensor_S.requires_grad for tensor_S in tensors_S)):
        return [function(*chunk) for chunk in chunks]
    return [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]


def token_logprobs(
    logits_BTV: Tensor, targets_BT: Tensor, temperature: float = 1.0, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """log softmax(logits / temperature) at the targets, [B, T], nats, in float32 or better.

    Targets must be valid ids everywhere, padding included. Give the whole logits with shifted targets rather
    than `logits[:, :-1]`, which costs a copy of (tokens x vocabulary).
    """

    def logprobs(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        scaled_CV = logits_CV.to(compute_dtype(logits_CV)) / temperature
        target_C = scaled_CV.gather(-1, targets_C[:, None]).squeeze(-1)
        return target_C - scaled_CV.logsumexp(-1)

    flat = (logits_BTV.flatten(0, 1), targets_BT.flatten())
    chunks = map_token_chunks(logprobs, *flat, chunk_tokens=chunk_tokens)
    return torch.cat(chunks).view(targets_BT.shape)


def cross_entropy_sum(
    logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of -log softmax(logits) at the targets over the tokens where the mask is set, nats, scalar.

    What stands in the other tokens (logits or targets) is never read.
    """

    def cross_entropy(logits_CV: Tensor, targets_C: Tensor, mask_C: Tensor) -> Tensor:
        rows_RV = logits_CV[mask_C].to(compute_dtype(logits_CV))
        target_R = rows_RV.gather(-1, targets_C[mask_C][:, None]).squeeze(-1)
        return (rows_RV.logsumexp(-1) - target_R).sum()

    flat = (logits_BTV.flatten(0, 1), targets_BT.flatten(), mask_BT.bool().flatten())
    return torch.stack(map_token_chunks(cross_entropy, *flat, chunk_tokens=chunk_tokens)).sum()


def global_mean(local_sum: Tensor, global_count: Tensor | int, world_size: int) -> Tensor:
    """The only division of a loss: what each rank must backpropagate, scalar.

    `global_count` is the number of tokens (or responses) of the whole batch: all ranks, all accumulation
    steps. Gradients are averaged over `world_size` ranks afterwards, hence the factor. A batch without any
    token gives 0.
    """
    count = global_count.clamp(min=1) if isinstance(global_count, Tensor) else max(global_count, 1)
    return local_sum * world_size / count
