"""A plan as text for a terminal."""

from collections.abc import Iterator

from padd_ds.planning.choices import Choice, Question
from padd_ds.planning.servers import ServerPlan

GIB = 2**30


def render(question: Question, asked: Choice, choices: list[Choice], best: Choice | None, changes: list[str]) -> str:
    """What was asked, what it needs, what else there is, and what to take."""
    parts = [_what(question, asked), _memory(question, asked)]
    if question.servers is not None:
        parts.append(_servers(question, question.servers))
    parts += [_traffic(asked), _time(question, asked)]
    parts += [_table(question, asked, choices), _verdict(question, asked, best, changes), _assumptions(question)]
    return "\n\n".join("\n".join(part) for part in parts)


def _what(question: Question, asked: Choice) -> Iterator[str]:
    cluster, work, student = question.cluster, asked.work, question.student
    yield f"{work.stage}: {cluster.nodes} nodes of {cluster.devices_per_node}, {cluster.world} ranks"
    yield (
        f"student  {student.parameters / 1e9:.2f}B parameters, {student.active_parameters / 1e9:.2f}B active, "
        f"{student.layers} layers, {student.experts} experts, top {student.top_k}"
    )
    if question.teacher is not None and work.distils:
        yield f"teacher  {question.teacher.parameters / 1e9:.2f}B parameters, {work.teacher_placement}"
    yield (
        f"a rank   {work.rows} sequences a step in {work.updates} updates of {work.micro_batches} micro-batches of "
        f"{work.micro_batch}; up to {work.prompt_tokens} + {work.response_tokens} tokens each, "
        f"{question.mean.prompt_tokens} + {question.mean.response_tokens} on the mean"
    )


def _memory(question: Question, asked: Choice) -> Iterator[str]:
    moments = asked.memory.moments
    names = list(dict.fromkeys(name for parts in moments.values() for name in parts))
    yield "Memory of a rank, GiB".ljust(26) + "".join(moment.rjust(11) for moment in moments)
    for name in names:
        sizes = [parts.get(name, 0) / GIB for parts in moments.values()]
        if any(size >= 0.005 for size in sizes):
            yield name.ljust(26) + "".join(f"{size:11.2f}" for size in sizes)
    yield "all".ljust(26) + "".join(f"{sum(parts.values()) / GIB:11.2f}" for parts in moments.values())
    yield f"the device has {question.cluster.usable_bytes / GIB:.1f} GiB for it"
    for name, size in asked.memory.host.items():
        yield f"in the node's memory: {name} {size * question.cluster.devices_per_node / GIB:.1f} GiB for all its ranks"


def _servers(question: Question, plan: ServerPlan) -> Iterator[str]:
    where = f"on {plan.nodes} nodes of their own" if plan.nodes else "on the ranks' GPUs"
    yield f"Rollout servers: {plan.servers} of {plan.tensor_parallel} GPUs each, {where}"
    yield (
        f"of each GPU {plan.room / GIB:.1f} GiB: weights {plan.weights / GIB:.2f}, the longest sequence "
        f"{plan.longest / GIB:.2f}, {'the rest for others' if plan.fits else 'which is too little'}"
    )
    if not plan.nodes:
        yield f"given back while the student is trained: {'yes' if plan.sleep else 'no'}"
    if plan.exchanged:
        yield (
            f"in each node's /dev/shm: weights {plan.exchanged / GIB:.1f} GiB, of "
            f"{question.cluster.host_memory_gib / 2:.0f} where it has half of the memory"
        )
    yield "how long they take for the responses is not estimated"


def _traffic(asked: Choice) -> Iterator[str]:
    yield "A rank sends per step".ljust(56) + "GiB".rjust(10) + "collectives".rjust(13) + "ranks".rjust(7)
    by_name: dict[tuple[str, int], tuple[float, int]] = {}
    for transfer in asked.estimate.transfers:
        key = (f"{transfer.kind}, {transfer.phase}: {transfer.what}", transfer.ranks)
        sent, calls = by_name.get(key, (0.0, 0))
        by_name[key] = (sent + transfer.sent, calls + transfer.calls)
    for (name, ranks), (sent, calls) in sorted(by_name.items(), key=lambda one: -one[1][0]):
        yield f"{name:56}{sent / GIB:10.2f}{calls:13d}{ranks:7d}"
    if not by_name:
        yield "nothing"


def _time(question: Question, asked: Choice) -> Iterator[str]:
    estimate = asked.estimate
    yield "A step, estimated".ljust(26) + "TFLOP".rjust(11) + "seconds".rjust(11)
    for phase, seconds in estimate.computing_s.items():
        yield f"{phase:26}{estimate.flops[phase] / 1e12:11.1f}{seconds:11.2f}"
    for kind, seconds in estimate.communicating_s.items():
        yield f"{kind:26}{'':11}{seconds:11.2f}"
    yield f"{'all':26}{sum(estimate.flops.values()) / 1e12:11.1f}{estimate.step_s:11.2f}"
    yield f"model FLOPs utilisation {estimate.mfu:.3f}"


def _table(question: Question, asked: Choice, choices: list[Choice]) -> Iterator[str]:
    yield (
        "ZeRO".rjust(4)
        + "experts over".rjust(14)
        + "GiB".rjust(10)
        + "fullest".rjust(12)
        + "fits".rjust(6)
        + "s/step".rjust(10)
    )
    for choice in choices:
        layout, peak = choice.layout, choice.memory.peak / GIB
        mark = "  <- as configured" if layout == asked.layout else ""
        yield (
            f"{layout.zero_stage:4d}{layout.expert_parallel:14d}{peak:10.2f}{choice.memory.fullest:>12}"
            f"{'yes' if choice.fits else 'no':>6}{choice.estimate.step_s:10.2f}{mark}"
        )


def _verdict(question: Question, asked: Choice, best: Choice | None, changes: list[str]) -> Iterator[str]:
    needed = f"{asked.memory.peak / GIB:.1f} GiB of {question.cluster.usable_bytes / GIB:.1f}"
    yield f"As configured it {'fits' if asked.fits else 'does not fit'}: {needed}."
    if question.servers is not None and not question.servers.fits:
        yield (
            "The student does not fit a rollout server: raise vllm.tensor_parallel, or vllm.memory_share and "
            "vllm.cache_gib."
        )
        return
    if best is None:
        yield f"Nothing here fits, not with {', '.join(changes)} either: take more or larger devices."
        return
    layout = best.layout
    settings = [f"zero_optimization.stage={layout.zero_stage}", f"expert_parallel.autoep_size={layout.expert_parallel}"]
    yield (
        f"Recommended: {', '.join([*settings, *changes])}: {best.memory.peak / GIB:.1f} GiB, "
        f"{best.estimate.step_s:.2f} s a step."
    )


def _assumptions(question: Question) -> Iterator[str]:
    cluster = question.cluster
    yield (
        f"Taken for granted: {cluster.tflops_share:.0%} of {cluster.tflops:g} TFLOP/s, {cluster.bandwidth_share:.0%} "
        f"of every bandwidth, {cluster.latency_us:g} us a collective, {cluster.layer_us:g} us a layer at least, "
        "nothing overlaps, routing is even; memory is for the longest sequences, time for the mean ones."
    )
