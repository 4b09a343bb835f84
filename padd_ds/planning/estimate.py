"""How long a step takes, from operations, bytes and transfers, one behind the other.

Nothing is taken to overlap, so a run that overlaps its communication is faster than this.
"""

from dataclasses import dataclass

from padd_ds.planning.cluster import Cluster
from padd_ds.planning.compute import as_it_runs, decoding_bytes, step_flops
from padd_ds.planning.shape import ModelShape
from padd_ds.planning.traffic import Transfer, step_transfers
from padd_ds.planning.workload import Layout, Workload


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One step of one rank."""

    flops: dict[str, float]
    """By phase."""
    computing_s: dict[str, float]
    """By phase: what the device computes or waits for its own memory."""
    transfers: list[Transfer]
    communicating_s: dict[str, float]
    """By kind of collective."""
    peak_flops_per_s: float

    @property
    def step_s(self) -> float:
        return sum(self.computing_s.values()) + sum(self.communicating_s.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the step's operations over what the device could have done meanwhile."""
        return sum(self.flops.values()) / (self.step_s * self.peak_flops_per_s)


def estimate_step(
    student: ModelShape, teacher: ModelShape | None, layout: Layout, work: Workload, cluster: Cluster
) -> Estimate:
    runs = as_it_runs(student, layout, work)
    reached = cluster.tflops * 1e12 * cluster.tflops_share
    seconds = {phase: count / reached for phase, count in step_flops(runs, teacher, work).items()}
    if "rollout" in seconds:
        seconds["rollout"] = _rollout_s(runs, layout, work, cluster, seconds["rollout"])
    transfers = step_transfers(student, teacher, layout, work)
    communicating: dict[str, float] = {}
    for transfer in transfers:
        taken_s = transfer.sent / _bandwidth(transfer, layout, cluster) + transfer.calls * cluster.latency_us * 1e-6
        communicating[transfer.kind] = communicating.get(transfer.kind, 0) + taken_s
    return Estimate(
        flops=step_flops(student, teacher, work),
        computing_s=seconds,
        transfers=transfers,
        communicating_s=communicating,
        peak_flops_per_s=cluster.tflops * 1e12,
    )


def _rollout_s(student: ModelShape, layout: Layout, work: Workload, cluster: Cluster, computing_s: float) -> float:
    """Decoding steps wait for the longest of computing, reading the weights, and starting the operations."""
    steps = -(-work.prompts // work.prompts_at_once) * work.response_tokens
    reading_s = decoding_bytes(student, layout, work) / (cluster.memory_gb_per_s * 1e9 * cluster.bandwidth_share)
    starting_s = student.layers * cluster.layer_us * 1e-6
    return max(computing_s, steps * max(reading_s, starting_s))


def _bandwidth(transfer: Transfer, layout: Layout, cluster: Cluster) -> float:
    """Bytes per second. Ranks that share experts are neighbours; those with the same experts are that far apart."""
    span = transfer.ranks
    if transfer.ranks == layout.expert_replicas and transfer.kind != "all_to_all":
        span = layout.world
    inside = span <= cluster.devices_per_node
    speed = cluster.within_node_gb_per_s if inside else cluster.between_nodes_gb_per_s
    return speed * 1e9 * cluster.bandwidth_share
