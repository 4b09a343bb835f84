"""A plan from the files that a run is started with."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from padd_ds.config.deepspeed_json import check_batches, check_parallelism, load_deepspeed_json
from padd_ds.config.load import load_run_config
from padd_ds.hf import read_config
from padd_ds.planning.choices import Choice, Question, all_choices, recommended
from padd_ds.planning.cluster import load_cluster
from padd_ds.planning.report import render
from padd_ds.planning.servers import plan_servers
from padd_ds.planning.shape import shape_of
from padd_ds.planning.workload import layout_of, workload_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What padd-plan tells."""

    text: str
    fits: bool
    """Whether the run as configured does."""
    facts: dict[str, Any]
    """The same numbers, for programs: bytes, seconds, FLOPs."""


def make_plan(
    run: Path,
    overrides: list[str],
    cluster_file: Path,
    *,
    nodes: int | None = None,
    devices_per_node: int | None = None,
    mean_prompt: int | None = None,
    mean_response: int | None = None,
    server_nodes: int | None = None,
) -> Plan:
    """Read the run, the models' shapes and the cluster, and plan; UserError on the first thing that is wrong."""
    config, cluster = load_run_config(run, overrides), load_cluster(cluster_file, nodes, devices_per_node)
    path = Path(config.deepspeed)
    tree = load_deepspeed_json(path)
    trust = config.model.trust_remote_code
    student = shape_of(
        read_config(config.model.student, trust_remote_code=trust), f"model.student {config.model.student}"
    )
    teacher = None
    if config.needs_teacher and config.model.teacher is not None:
        read = read_config(config.model.teacher, trust_remote_code=trust)
        teacher = shape_of(read, f"model.teacher {config.model.teacher}")
    size = check_parallelism(path, tree, cluster.world, student.experts or None, config.model.expert_compute)
    check_batches(config, cluster.world)
    layout = layout_of(tree, cluster.world, size)
    servers = plan_servers(config, student, cluster, layout.value_bytes, server_nodes)
    served = None if servers is None else servers.share
    question = Question(
        student=student,
        teacher=teacher,
        longest=replace(workload_of(config, cluster.world), served=served),
        mean=replace(workload_of(config, cluster.world, mean_prompt, mean_response), served=served),
        cluster=cluster,
        servers=servers,
    )
    asked = question.answer(layout)
    choices = all_choices(question, asked.layout)
    best, changes = recommended(question, choices)
    text = render(question, asked, choices, best, changes)
    facts: dict[str, Any] = {
        "asked": facts_of(asked),
        "recommended": None if best is None else facts_of(best) | {"changes": changes},
    }
    if servers is not None:
        facts["servers"] = asdict(servers) | {"fits": servers.fits}
    return Plan(text=text, fits=asked.fits, facts=facts)


def facts_of(choice: Choice) -> dict[str, Any]:
    """Numbers of one choice as plain values."""
    estimate = choice.estimate
    return {
        "zero_stage": choice.layout.zero_stage,
        "autoep_size": choice.layout.expert_parallel,
        "fits": choice.fits,
        "memory_bytes": choice.memory.moments,
        "host_memory_bytes": choice.memory.host,
        "sent_bytes": [
            {"kind": one.kind, "phase": one.phase, "what": one.what, "ranks": one.ranks, "bytes": one.sent}
            for one in estimate.transfers
        ],
        "flops": estimate.flops,
        "computing_s": estimate.computing_s,
        "communicating_s": estimate.communicating_s,
        "step_s": estimate.step_s,
        "mfu": estimate.mfu,
    }
