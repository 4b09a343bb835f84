"""Bytes that the collectives of one training step move, by kind.

Counted as DeepSpeed 0.19.8 makes them, held against counts of real steps (docs/planning.md): dispatch and combine of
tokens to experts, gradients, updated weights, and at ZeRO-3 the weights of every pass.
Legend: B rows, T prompt tokens, R response tokens, S = B * (T + R), P prompts, G responses per prompt, D width,
K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from padd_ds.planning.compute import copies_of_a_token
from padd_ds.planning.shape import ModelShape
from padd_ds.planning.workload import Layout, Workload


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What one kind of collective moves in a step."""

    kind: str
    """all_to_all, all_reduce, all_gather, reduce_scatter."""
    phase: str
    """rollout, scoring, update."""
    what: str
    ranks: int
    """Size of the group."""
    moved: float
    """Bytes: of an all-to-all what a rank gives, of an all-gather what it gets, otherwise the tensor that is reduced.
    Means over ranks, since routing deals tokens unevenly."""
    calls: int
    """Collectives one behind the other."""

    @property
    def sent(self) -> float:
        """Bytes that leave a rank: a ring's all-reduce passes everything on twice, the others once."""
        share = (self.ranks - 1) / self.ranks
        return self.moved * share * (2 if self.kind == "all_reduce" else 1)


def step_transfers(student: ModelShape, teacher: ModelShape | None, layout: Layout, work: Workload) -> list[Transfer]:
    """Everything that one step moves between ranks; a group of one rank moves nothing."""
    transfers = [*_tokens(student, layout, work), *_gradients(student, layout, work)]
    transfers += _weights(student, layout, work)
    if teacher is not None and work.distils and work.teacher_placement != "replicated":
        passes = work.updates * work.micro_batches + (1 if work.group else 0)
        moved = passes * teacher.parameters * layout.value_bytes
        calls = passes * teacher.layers
        transfers.append(_transfer("all_gather", "update", "teacher's weights", layout.world, moved, calls))
    return [transfer for transfer in transfers if transfer.ranks > 1 and transfer.moved > 0]


def _transfer(kind: str, phase: str, what: str, ranks: int, moved: float, calls: int) -> Transfer:
    return Transfer(kind=kind, phase=phase, what=what, ranks=ranks, moved=moved, calls=calls)


def token_passes(work: Workload) -> Iterator[tuple[str, int, int, int]]:
    """(phase, tokens of a pass, passes, backward passes) of the student's layers in one step."""
    if work.group:
        at_once = work.prompts_at_once
        batches = -(-work.prompts // at_once)
        if work.served is not None:
            yield "rollout", 0, 1, 0  # each layer's weights are made whole for the servers
        else:
            # Each prompt once, all but its last token behind one of padding; then a token of each response at a time.
            yield "rollout", at_once * work.prompt_tokens, batches, 0
            yield "rollout", at_once * work.group, batches * work.response_tokens, 0
        yield "scoring", work.micro_batch * work.sequence, work.updates * work.micro_batches, 0
    trained = work.updates * work.micro_batches
    yield "update", work.micro_batch * work.sequence, trained, trained


def _tokens(student: ModelShape, layout: Layout, work: Workload) -> Iterator[Transfer]:
    """Dispatch to the experts and combine, twice as often in a backward pass, and again where it recomputes."""
    for phase, tokens, passes, backward in token_passes(work):
        forward = passes + (backward if work.checkpointing else 0)
        exchanges = student.moe_layers * 2 * (forward + backward)
        if backward and not work.trains_all and layout.zero_stage < 3 and not work.checkpointing:
            exchanges -= backward  # nothing below the first layer's experts learns
        # Masked, the weights of a rank's experts go with the token, one way of two.
        row = student.width + (student.experts / layout.expert_parallel / 2 if work.masked else 0)
        moved = exchanges * tokens * copies_of_a_token(student, layout, work) * row * layout.value_bytes
        what = "tokens to experts and back"
        yield _transfer("all_to_all", phase, what, layout.expert_parallel, moved, exchanges)


def trained_parameters(student: ModelShape, work: Workload) -> tuple[int, int]:
    """(of those that every rank has, of the routed experts of all ranks)."""
    if work.trains_all:
        return student.dense_parameters, student.expert_parameters
    if not student.experts:
        return student.ffn_parameters, 0
    return student.shared_parameters, student.expert_parameters


def _gradients(student: ModelShape, layout: Layout, work: Workload) -> Iterator[Transfer]:
    """ZeRO 0 and 1 reduce once per update, 2 and 3 after every micro-batch."""
    dense, experts = trained_parameters(student, work)
    times = work.updates * (work.micro_batches if layout.zero_stage >= 2 else 1)
    kind = "reduce_scatter" if layout.zero_stage == 3 else "all_reduce"
    groups = ((dense, layout.world), (experts / layout.expert_parallel, layout.expert_replicas))
    for count, ranks in groups:
        moved = times * count * layout.value_bytes
        calls = times * max(1, -(-int(count) // layout.reduce_bucket))
        yield _transfer(kind, "update", "gradients", ranks, moved, calls)


def _weights(student: ModelShape, layout: Layout, work: Workload) -> Iterator[Transfer]:
    """ZeRO 1 and 2 gather what an update changed, 3 the weights of every pass."""
    if layout.zero_stage == 0:
        return
    if layout.zero_stage < 3:
        dense, experts = trained_parameters(student, work)
        passes = [("update", "updated weights", work.updates, 1)]
    else:
        dense, experts = student.dense_parameters, student.expert_parameters
        # Gathered for the forward pass, let go, and gathered again for the backward pass.
        passes = [(phase, "weights", n + backward, student.layers) for phase, _, n, backward in token_passes(work)]
    groups = ((dense, layout.world), (experts / layout.expert_parallel, layout.expert_replicas))
    for phase, what, times, calls in passes:
        for count, ranks in groups:
            yield _transfer("all_gather", phase, what, ranks, times * count * layout.value_bytes, times * calls)
