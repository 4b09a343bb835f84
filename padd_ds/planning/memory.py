"""Memory of one rank by part, at the four moments of a step that can be its fullest.

Counted from what DeepSpeed 0.19.8, AutoEP and this trainer keep, held against the peaks of real ranks
(docs/planning.md). Bytes throughout.
Legend: B rows of a micro-batch, T prompt tokens, R response tokens, S = B * (T + R), P prompts, G responses per prompt,
D width, E experts on this rank, K experts per token, V vocabulary, F FFN width.
"""

from dataclasses import dataclass

from padd_ds.losses.tokens import CHUNK_TOKENS
from padd_ds.planning.compute import copies_of_a_token
from padd_ds.planning.shape import ModelShape
from padd_ds.planning.traffic import trained_parameters
from padd_ds.planning.workload import DEFAULT_LIVE, Layout, Workload

FP32 = 4
ROW_PADDING = 8
"""Rows of an expert are rounded up to this many."""
KEPT_BY_ADAMW = 2 * FP32
"""Two moments."""
Parts = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a rank, by moment and part."""

    moments: dict[str, Parts]
    """Moment of a step (loss, backward, optimizer, rollout) -> part -> bytes on the device."""
    host: Parts
    """What offloading puts in the node's memory, for this rank."""

    @property
    def fullest(self) -> str:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> float:
        return sum(self.moments[self.fullest].values())


def plan_memory(
    student: ModelShape, teacher: ModelShape | None, layout: Layout, work: Workload, *, on_cpu: bool = False
) -> MemoryPlan:
    """`on_cpu`: memory that is asked for and not touched does not count, where a GPU's allocator takes it all."""
    resting, host = _resting(student, teacher, layout, work)
    gathered = {"gathered weights": _gathered(student, layout)}
    gradients = {"gradients": _gradients(student, layout, work)}
    buckets = _buckets(student, layout, work, on_cpu)
    moments = {
        "loss": resting
        | gathered
        | {
            # Of the micro-batches before this one.
            "gradients": gradients["gradients"] if work.micro_batches > 1 or layout.zero_stage == 3 else 0,
            "reduction buckets": 0 if on_cpu else buckets["reduction buckets"],
            "activations": activations(student, layout, work),
            "logits": logits(student, layout, work),
        },
        "backward": resting
        | gathered
        | gradients
        | buckets
        | {"activations": activations(student, layout, work, left=_left_when_reduced(student, layout, work))},
        # The buckets are gone by now, but ZeRO-3's.
        "optimizer": resting
        | {
            "gradients": _gradients_when_updated(student, layout, work),
            "reduction buckets": buckets["reduction buckets"] if layout.zero_stage == 3 else 0,
            "update": _update(student, layout, work, on_cpu),
        },
    }
    if work.group:
        kept = gradients if layout.zero_stage == 3 else {}
        generating = _rollout(student, layout, work) if work.served is None else {}
        moments["rollout"] = resting | gathered | kept | generating
    if work.served is not None:
        for moment, parts in moments.items():
            parts["rollout server"] = work.served.awake if moment == "rollout" else work.served.asleep
    return MemoryPlan(moments=moments, host=host)


def _resting(student: ModelShape, teacher: ModelShape | None, layout: Layout, work: Workload) -> tuple[Parts, Parts]:
    """What is there all the time, on the device and on the host."""
    value, world = layout.value_bytes, layout.world
    dense, experts = student.dense_parameters, student.expert_parameters / layout.expert_parallel
    weights = (student.parameters / world if layout.zero_stage == 3 else dense + experts) * value
    shard = _optimizer_shard(student, layout, work)
    has_master = value != FP32 or layout.zero_stage > 0
    optimizer = shard * ((FP32 if has_master else 0) + KEPT_BY_ADAMW)
    device: Parts = {"weights": weights, "optimizer": optimizer}
    host: Parts = {}
    if layout.offloads_weights:
        host["weights"] = device.pop("weights")
    if layout.offloads_optimizer:
        host["optimizer"] = device.pop("optimizer") + shard * FP32  # with its gradient
    if teacher is not None and work.distils:
        whole = teacher.parameters * value
        if work.teacher_placement == "replicated":
            device["teacher"] = whole
        else:
            (host if work.teacher_placement == "offloaded" else device)["teacher"] = whole / world
            device["gathered teacher"] = min(teacher.parameters, DEFAULT_LIVE) * value
    return device, host


def _optimizer_shard(student: ModelShape, layout: Layout, work: Workload) -> float:
    """Parameters whose optimizer state this rank keeps."""
    dense, experts = trained_parameters(student, work)
    if layout.zero_stage == 0:
        return dense + experts / layout.expert_parallel
    return (dense + experts) / layout.world


def _update(student: ModelShape, layout: Layout, work: Workload, on_cpu: bool) -> float:
    """Of the group of parameters that is updated: its fp32 gradient and what AdamW makes on the way, an fp32 tensor or
    on a CPU two.

    Experts and the rest are a group each, at ZeRO-3 in groups of a limited size; at stage 0, without groups, it is one
    parameter after the other.
    """
    if layout.offloads_optimizer:
        return 0
    dense, experts = trained_parameters(student, work)
    temporary = (2 if on_cpu else 1) * FP32
    if layout.zero_stage == 0:
        embedding = student.vocabulary * student.width if work.trains_all else 0
        stack = student.experts / layout.expert_parallel * student.width * student.expert_width
        return temporary * max(embedding, stack)
    largest = max(dense, experts) / layout.world
    return (FP32 + temporary) * (min(largest, layout.update_group) if layout.zero_stage == 3 else largest)


def _gradients_when_updated(student: ModelShape, layout: Layout, work: Workload) -> float:
    """ZeRO 2 updates the experts last, and has let go of the gradients of what is updated and was before."""
    if layout.zero_stage != 2:
        return _gradients(student, layout, work)
    dense, experts = trained_parameters(student, work)
    return experts / layout.world * layout.value_bytes if dense > experts else 0


def _gradients(student: ModelShape, layout: Layout, work: Workload) -> float:
    dense, experts = trained_parameters(student, work)
    if layout.zero_stage >= 2:
        return (dense + experts) / layout.world * layout.value_bytes
    return (dense + experts / layout.expert_parallel) * layout.value_bytes


def _buckets(student: ModelShape, layout: Layout, work: Workload, on_cpu: bool) -> Parts:
    """Where gradients wait to be reduced, and the copy that is reduced, at ZeRO-3 with this rank's share of the sum."""
    if layout.zero_stage == 0:
        return {"reduction buckets": 0, "reduction": 0}
    most = _largest_flush(student, layout, work) if layout.zero_stage == 3 else _trained_here(student, layout, work)
    filled = min(layout.reduce_bucket, most) * layout.value_bytes
    asked_for = filled if on_cpu else layout.reduce_bucket * layout.value_bytes
    twice = layout.overlapped and layout.zero_stage < 3
    if layout.zero_stage == 3:
        reduction = filled * (1 + 1 / layout.world)
    elif work.micro_batches > 1 or _left_when_reduced(student, layout, work) > 0:
        reduction = filled
    else:  # gone when the rank's part of the gradients is kept
        reduction = max(0.0, filled - _gradients(student, layout, work))
    return {"reduction buckets": asked_for * (2 if twice else 1), "reduction": reduction}


def _largest_flush(student: ModelShape, layout: Layout, work: Workload) -> float:
    """Parameters that ZeRO-3 reduces at once: a bucket holds experts or others, and they take turns layer by layer."""
    dense, experts = trained_parameters(student, work)
    per_layer = max(dense, experts / layout.expert_parallel) / student.layers
    return max(per_layer, student.vocabulary * student.width if work.trains_all else 0)


def _trained_here(student: ModelShape, layout: Layout, work: Workload) -> float:
    """Trained parameters whose gradients this rank computes."""
    dense, experts = trained_parameters(student, work)
    return dense + experts / layout.expert_parallel


def _left_when_reduced(student: ModelShape, layout: Layout, work: Workload) -> float:
    """Share of the activations that is still there when the first full bucket is reduced."""
    if layout.zero_stage == 3:
        return 1 - 1 / student.layers
    return max(0.0, 1 - layout.reduce_bucket / _trained_here(student, layout, work))


def _gathered(student: ModelShape, layout: Layout) -> float:
    """Weights that ZeRO-3 holds whole at once, beside this rank's part of them."""
    if layout.zero_stage < 3:
        return 0
    local: float = student.dense_parameters
    if layout.expert_replicas > 1:  # a rank alone with its experts has them whole
        local += student.expert_parameters / layout.expert_parallel
    return min(local, layout.live_parameters) * layout.value_bytes


def activations(student: ModelShape, layout: Layout, work: Workload, left: float = 1) -> float:
    """What the forward pass of a micro-batch keeps for the backward pass.

    `left`: the share of layers whose backward pass is still to come, beside the one that it is in.
    """
    tokens = work.micro_batch * work.sequence
    per_layer = tokens * layer_activations(student, layout, work)
    if student.experts and work.masked:
        # A copy of the last weights, transposed for one product with all of them.
        rank_width = student.experts / layout.expert_parallel * student.expert_width
        per_layer += rank_width * student.width * layout.value_bytes
    elif student.experts:
        padding = student.experts / layout.expert_parallel * ROW_PADDING
        per_layer += padding * (student.width + 4 * student.expert_width) * layout.value_bytes
    kept = tokens * student.width * layout.value_bytes if work.checkpointing else per_layer
    in_work = per_layer if work.checkpointing or left < 1 else 0
    mask = work.micro_batch * work.sequence**2 * layout.value_bytes
    spared = 0.0
    if not work.trains_all and layout.zero_stage < 3 and not work.checkpointing:
        # Nothing below the first layer's experts learns.
        spared = tokens * _attention_activations(student, layout, work) * left
    return student.layers * kept * left + in_work + mask - spared


def layer_activations(student: ModelShape, layout: Layout, work: Workload) -> float:
    """Bytes that one layer keeps per token, without the padding of experts' rows.

    Norms keep their input in fp32; what only frozen weights would need is not kept.
    """
    value, width = layout.value_bytes, student.width
    attention = _attention_activations(student, layout, work)
    # The FFN's input, and what its norm's trained weight needs.
    given = width * value * (2 if work.trains_all else 1)
    if not student.experts:
        return attention + given + 4 * student.ffn_width * value
    router = 2 * student.experts * FP32 + (width * FP32 if value != FP32 and work.trains_all else 0)
    each: float = 2 * width + 4 * student.expert_width
    if work.masked:
        # What came, unless it is the layer's own input; of all experts of the rank, and of each the weighted product.
        here = student.experts / layout.expert_parallel
        each = (width + here if layout.expert_parallel > 1 else 0) + here * (5 * student.expert_width + 1)
    routed = copies_of_a_token(student, layout, work) * each * value
    return attention + given + router + routed + 4 * student.shared_width * value


def _attention_activations(student: ModelShape, layout: Layout, work: Workload) -> float:
    """Of the attention of one layer per token, and the input of the FFN's norm."""
    value, width, trained = layout.value_bytes, student.width, work.trains_all
    norms = 2 * width * FP32 + (2 * width * value if trained else 0)
    heads = student.attention_width
    attention = 4 * heads * value + student.heads * FP32 + (heads * value if trained else 0)
    if student.qk_norm:
        attention += (heads + student.kv_width) * (FP32 + (value if trained else 0))
    return norms + attention


def logits(student: ModelShape, layout: Layout, work: Workload) -> float:
    """Student's and teacher's logits of the responses, the gradient of one loss, and what a chunk of the other makes of
    them in fp32."""
    rows = work.micro_batch * work.response_tokens
    whole = rows * student.vocabulary * layout.value_bytes
    chunk = min(rows, CHUNK_TOKENS) * student.vocabulary * FP32
    return whole * (3 if work.distils else 2) + (5 if work.distils else 3) * chunk


def _rollout(student: ModelShape, layout: Layout, work: Workload) -> Parts:
    responses = work.prompts_at_once * work.group
    per_layer = responses * work.sequence * student.kv_width * 2 * layout.value_bytes
    # A layer's cache grows by a copy, and its heads are repeated for the attention of the grouped queries.
    repeated = per_layer * (1 + student.heads / student.kv_heads)
    sampling = responses * student.vocabulary * (layout.value_bytes + 3 * FP32)
    prefill = work.prompts_at_once * work.prompt_tokens * layer_activations(student, layout, work)
    return {"KV cache": student.layers * per_layer + repeated, "sampling": max(sampling, prefill)}
