"""Adaptive distillation of a dense teacher into the student (PADD, Stage II).

Shapes: B responses, T tokens in a sequence, C tokens of one chunk, R of them unmasked, V vocabulary,
Q outcomes that are compared (V, or top-k + 1).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from padd_ds.losses.tokens import CHUNK_TOKENS, compute_dtype, map_token_chunks

LOG_ZERO = -1e4
"""Stands for log 0: exp(LOG_ZERO) is 0 in float64 too, while products and gradients stay finite."""

TEMPERATURE_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "confident": lambda scaled_B: 1 - torch.tanh(scaled_B),
    "literal": lambda scaled_B: 1 + torch.tanh(scaled_B),
    "fixed": torch.ones_like,
}


def distillation_temperature(
    advantage_B: Tensor,
    *,
    rule: str = "confident",
    slope: float = 0.5,
    base: float = 1.0,
    floor: float = 0.25,
    ceiling: float = 2.0,
) -> Tensor:
    """The teacher's temperature for each response, base * Phi(A) within floor and ceiling, [B] (tau and Phi, Stage II).

    slope is kappa, base is tau. Choice: rule `confident` is Phi = 1 - tanh(kappa A), a lower temperature on
    good paths as the paper's words have it; `literal` is its printed 1 + tanh(kappa A); `fixed` is 1.
    Choice: the floor, because groups of 8 can push either form to 0.13. Choice: the ceiling; at 2 neither form meets
    it, at 1 the teacher is sharpened on good paths and left as it is on bad ones.
    """
    advantage_B = advantage_B.to(compute_dtype(advantage_B))
    return base * TEMPERATURE_RULES[rule](slope * advantage_B).clamp(min=floor, max=ceiling)


def distillation_sum(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    mask_BT: Tensor,
    temperature_B: Tensor,
    *,
    direction: str = "forward",
    teacher_top_k: int | None = None,
    weight_B: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Divergence of the student from the tempered teacher, summed over unmasked tokens, nats, scalar.

    With `weight_B` a sum weighted by response.

    p = softmax(teacher / temperature), q = softmax(student); only the teacher is tempered (Stage II). The
    teacher and the temperature get no gradient. Choice: direction `forward` is KL(p || q), `reverse` is
    KL(q || p), `jsd` is their mean against (p + q) / 2. Choice: with `teacher_top_k` both sides are reduced
    to the teacher's k likeliest tokens and one bucket for the rest, a lower bound of the full divergence.
    ValueError when the two vocabularies differ.
    """
    if student_logits_BTV.shape != teacher_logits_BTV.shape:
        shapes = f"{tuple(student_logits_BTV.shape)} and {tuple(teacher_logits_BTV.shape)}"
        raise ValueError(f"student and teacher logits differ in shape: {shapes}")
    divergence = DIVERGENCES[direction]

    def chunk_sum(
        student_CV: Tensor, teacher_CV: Tensor, mask_C: Tensor, temperature_C: Tensor, weight_C: Tensor
    ) -> Tensor:
        log_q_RQ = _log_softmax(student_CV[mask_C])
        log_p_RQ = _log_softmax(teacher_CV[mask_C], temperature_C[mask_C])
        if teacher_top_k is not None:
            top_RK = log_p_RQ.topk(min(teacher_top_k, log_p_RQ.shape[-1])).indices
            log_p_RQ, log_q_RQ = _with_tail(log_p_RQ, top_RK), _with_tail(log_q_RQ, top_RK)
        return (divergence(log_p_RQ, log_q_RQ) * weight_C[mask_C]).sum()

    if weight_B is None:
        weight_B = torch.ones_like(temperature_B)
    flat = (
        student_logits_BTV.flatten(0, 1),
        teacher_logits_BTV.detach().flatten(0, 1),
        mask_BT.bool().flatten(),
        *(of_B.detach()[:, None].expand(mask_BT.shape).flatten() for of_B in (temperature_B, weight_B)),
    )
    return torch.stack(map_token_chunks(chunk_sum, *flat, chunk_tokens=chunk_tokens)).sum()


def recorded_distillation_sum(
    student_logits_BTV: Tensor,
    top_ids_BTK: Tensor,
    logprobs_BTQ: Tensor,
    mask_BT: Tensor,
    *,
    direction: str = "forward",
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """What `distillation_sum` gives with `teacher_top_k` and temperature 1, from outcomes of `top_outcomes`, scalar.

    So the teacher need not be there; its likelihoods come from a file.
    """
    divergence = DIVERGENCES[direction]

    def chunk_sum(student_CV: Tensor, top_ids_CK: Tensor, logprobs_CQ: Tensor, mask_C: Tensor) -> Tensor:
        log_q_RQ = _with_tail(_log_softmax(student_CV[mask_C]), top_ids_CK[mask_C])
        return divergence(logprobs_CQ[mask_C].to(log_q_RQ.dtype), log_q_RQ).sum()

    flat = (
        student_logits_BTV.flatten(0, 1),
        top_ids_BTK.flatten(0, 1),
        logprobs_BTQ.flatten(0, 1),
        mask_BT.bool().flatten(),
    )
    return torch.stack(map_token_chunks(chunk_sum, *flat, chunk_tokens=chunk_tokens)).sum()


def top_outcomes(logits_RV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` likeliest tokens of each row [R, K], and the log-probabilities of them and of all others [R, K + 1].

    nats, float32 or better; K is V where the vocabulary is smaller than `top_k`.
    """
    log_p_RV = _log_softmax(logits_RV)
    top_RK = log_p_RV.topk(min(top_k, log_p_RV.shape[-1])).indices
    return top_RK, _with_tail(log_p_RV, top_RK)


def _log_softmax(logits_RV: Tensor, temperature_R: Tensor | None = None) -> Tensor:
    logits_RV = logits_RV.to(compute_dtype(logits_RV))
    if temperature_R is not None:
        logits_RV = logits_RV / temperature_R[:, None].to(logits_RV.dtype)
    return logits_RV.log_softmax(-1).clamp(min=LOG_ZERO)


def _with_tail(log_p_RV: Tensor, top_RK: Tensor) -> Tensor:
    """[R, K + 1]: the log-probabilities at top_RK, then the log of what all other tokens have together."""
    # summed in logs, since 1 - sum(top) would lose a small tail to rounding
    tail_R1 = log_p_RV.scatter(-1, top_RK, LOG_ZERO).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_RV.gather(-1, top_RK), tail_R1], dim=-1)


def _kl(log_p_RQ: Tensor, log_q_RQ: Tensor) -> Tensor:
    """[R]"""
    return (log_p_RQ.exp() * (log_p_RQ - log_q_RQ)).sum(-1)


def _jsd(log_p_RQ: Tensor, log_q_RQ: Tensor) -> Tensor:
    """[R]"""
    log_m_RQ = torch.logaddexp(log_p_RQ, log_q_RQ) - math.log(2)
    return 0.5 * (_kl(log_p_RQ, log_m_RQ) + _kl(log_q_RQ, log_m_RQ))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": _kl,
    "reverse": lambda log_p_RQ, log_q_RQ: _kl(log_q_RQ, log_p_RQ),
    "jsd": _jsd,
}
