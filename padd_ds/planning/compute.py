"""Floating-point operations of one rank in one training step, by phase, and the bytes that decoding reads.

A multiplication with its addition counts as two. Counted are the products that the model consists of: attention over
the whole context, without the half that a causal mask wastes being taken off, and no recomputation beyond what
activation checkpointing asks for.
Legend: T prompt tokens, R response tokens, P prompts, G responses per prompt, V vocabulary, D width.
"""

from dataclasses import replace
from math import comb

from padd_ds.planning.shape import ModelShape
from padd_ds.planning.workload import Layout, Workload


def copies_of_a_token(student: ModelShape, layout: Layout, work: Workload) -> float:
    """How often a token goes to experts: to each of its own, or masked to each rank that has some of them, the mean
    where all choices are as likely."""
    if not work.masked or not student.experts:
        return student.top_k
    ranks = layout.expert_parallel
    elsewhere = student.experts - student.experts // ranks
    return ranks * (1 - comb(elsewhere, student.top_k) / comb(student.experts, student.top_k))


def as_it_runs(student: ModelShape, layout: Layout, work: Workload) -> ModelShape:
    """The student with as many active experts as a token goes through."""
    if not work.masked or not student.experts:
        return student
    run = copies_of_a_token(student, layout, work) * student.experts / layout.expert_parallel
    return replace(student, top_k=round(run))


def forward_flops(model: ModelShape, tokens: float, context: float, with_logits: float) -> float:
    """Of a forward pass over `tokens` that attend to `context` tokens each; `with_logits` of them get logits."""
    ffn = 3 * model.width * (model.moe_layers * model.active_ffn_width if model.experts else 0)
    ffn += model.ffn_parameters
    router = model.moe_layers * model.experts * model.width
    per_token: float = 2 * (model.layers * model.attention_parameters + ffn + router)
    per_token += model.layers * 4 * model.attention_width * context
    return tokens * per_token + with_logits * 2 * model.vocabulary * model.width


def step_flops(student: ModelShape, teacher: ModelShape | None, work: Workload) -> dict[str, float]:
    """By phase: rollout, unless servers do it, scoring, teacher, update; of one rank."""
    rows, context = work.rows, work.sequence
    tokens, responses = rows * work.sequence, rows * work.response_tokens
    once = forward_flops(student, tokens, context, responses)
    flops = {}
    if work.group and work.served is None:
        prefill = forward_flops(student, work.prompts * work.prompt_tokens, work.prompt_tokens, 0)
        mean_context = work.prompt_tokens + work.response_tokens / 2
        flops["rollout"] = prefill + forward_flops(student, responses, mean_context, responses)
    if work.group:
        flops["scoring"] = once
    if teacher is not None and work.distils:
        prompts = work.prompts if work.group else rows
        flops["teacher"] = forward_flops(teacher, prompts * work.prompt_tokens, work.prompt_tokens, 0)
        flops["teacher"] += forward_flops(teacher, responses, context, responses)
    flops["update"] = once * (2 + (1 if work.checkpointing else 0)) + _weight_gradients(student, work, once)
    return flops


def _weight_gradients(student: ModelShape, work: Workload, forward: float) -> float:
    """As much as a forward pass where every weight is trained; the trained weights' share otherwise."""
    if work.trains_all:
        return forward
    trained = 3 * student.width * student.active_ffn_width * (student.moe_layers or student.dense_layers)
    return 2 * trained * work.rows * work.sequence


def decoding_bytes(student: ModelShape, layout: Layout, work: Workload) -> float:
    """That one decoding step of a rank reads: weights, of the experts those that a token goes to, and the caches."""
    responses = work.prompts_at_once * work.group
    here = student.experts / layout.expert_parallel if student.experts else 0
    # Tokens of all ranks of the group meet at an expert.
    reached = (
        1 - (1 - student.top_k / student.experts) ** (responses * layout.expert_parallel) if student.experts else 0
    )
    weights = student.dense_parameters + student.moe_layers * here * reached * student.one_expert
    context = work.prompt_tokens + work.response_tokens / 2
    caches = responses * context * 2 * student.kv_width * student.layers
    return (weights + caches) * layout.value_bytes
