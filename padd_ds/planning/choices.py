"""The ZeRO stages and expert-parallel sizes that a cluster allows, and the one to take."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from padd_ds.planning.cluster import Cluster
from padd_ds.planning.estimate import Estimate, estimate_step
from padd_ds.planning.memory import MemoryPlan, plan_memory
from padd_ds.planning.servers import ServerPlan
from padd_ds.planning.shape import ModelShape
from padd_ds.planning.workload import Layout, Workload

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to lay a run out, and what it costs."""

    layout: Layout
    work: Workload
    memory: MemoryPlan
    estimate: Estimate
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is planned: the models, the longest step (for memory), the mean one (for time), and where it runs."""

    student: ModelShape
    teacher: ModelShape | None
    longest: Workload
    mean: Workload
    cluster: Cluster
    servers: ServerPlan | None = None
    """Of rollouts."""

    def answer(self, layout: Layout, **changed: Any) -> Choice:
        """The plan of one layout; `changed` replaces fields of the workload."""
        longest, mean = replace(self.longest, **changed), replace(self.mean, **changed)
        on_cpu = self.cluster.kind == "cpu"
        memory = plan_memory(self.student, self.teacher, layout, longest, on_cpu=on_cpu)
        host = sum(memory.host.values()) * self.cluster.devices_per_node
        fits = memory.peak <= self.cluster.usable_bytes and host <= self.cluster.host_memory_gib * 2**30
        if self.servers is not None:
            # Linux gives /dev/shm half of the memory.
            fits &= self.servers.fits and self.servers.exchanged <= self.cluster.host_memory_gib * 2**30 / 2
        estimate = estimate_step(self.student, self.teacher, layout, mean, self.cluster)
        return Choice(layout=layout, work=longest, memory=memory, estimate=estimate, fits=fits)


def all_choices(question: Question, like: Layout) -> list[Choice]:
    """Every ZeRO stage with every expert-parallel size that divides ranks and experts; the rest is as in `like`."""
    return [question.answer(layout) for layout in _layouts(question, like)]


def _layouts(question: Question, like: Layout) -> Iterator[Layout]:
    experts = question.student.experts
    sizes = [size for size in range(1, experts + 1) if experts % size == 0 and like.world % size == 0] or [1]
    for stage in ZERO_STAGES:
        for size in sizes:
            offloads = {
                "offloads_optimizer": like.offloads_optimizer and stage > 0,
                "offloads_weights": like.offloads_weights and stage == 3,
            }
            yield replace(like, zero_stage=stage, expert_parallel=size, **offloads)


def recommended(question: Question, choices: list[Choice]) -> tuple[Choice | None, list[str]]:
    """The fastest choice that fits, and what has to be changed for it beside ZeRO stage and expert-parallel size.

    As few changes as possible; of equally fast choices the one with the most memory left.
    """
    remedies = _remedies(question.longest, choices[0].layout)
    for count in range(len(remedies) + 1):
        fitting = []
        for changes in combinations(remedies, count):
            of_layout = {name: value for change in changes for name, value in change.layout.items()}
            of_work = {name: value for change in changes for name, value in change.work.items()}
            changed = [_changed(choice.layout, of_layout) for choice in choices]
            answers = [question.answer(layout, **of_work) for layout in changed if layout is not None]
            fitting += [(answer, [change.words for change in changes]) for answer in answers if answer.fits]
        if fitting:
            return min(fitting, key=lambda one: (round(one[0].estimate.step_s, 3), one[0].memory.peak))
    return None, [remedy.words for remedy in remedies]


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change that saves memory, at a price in time."""

    words: str
    """The option to set."""
    work: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)


def _remedies(work: Workload, layout: Layout) -> list[Remedy]:
    """Those that are not taken yet."""
    remedies = []
    if not work.checkpointing:
        remedies.append(Remedy(words="activation_checkpointing=true", work={"checkpointing": True}))
    if work.micro_batch > 1:
        remedies.append(Remedy(words="micro_batch_size=1", work={"micro_batch": 1}))
    if work.prompts_at_once > 1:
        remedies.append(Remedy(words="rollout.prompts_per_batch=1", work={"prompts_at_once": 1}))
    if work.distils and work.teacher_placement == "replicated":
        remedies.append(Remedy(words="model.teacher_placement=sharded", work={"teacher_placement": "sharded"}))
    if not layout.offloads_optimizer:
        words = "zero_optimization.offload_optimizer.device=cpu"
        remedies.append(Remedy(words=words, layout={"offloads_optimizer": True}))
    return remedies


def _changed(layout: Layout, changes: dict[str, Any]) -> Layout | None:
    """None where the stage cannot have the change."""
    return None if changes and layout.zero_stage == 0 else replace(layout, **changes)
