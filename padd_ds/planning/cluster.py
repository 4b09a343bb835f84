"""The machines that a run is planned for, from a YAML file."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from padd_ds.config.load import read_yaml, unknown_keys
from padd_ds.config.sections import Count, NonNegative, Positive, section
from padd_ds.errors import UserError

Share = Annotated[float, Field(gt=0, le=1)]


@section
class Cluster:
    """Nodes of equal devices. Speeds are what the maker states; the shares say how much of them a run reaches."""

    kind: Literal["gpu", "cpu"] = "gpu"
    """On a cpu memory that is asked for and never touched does not count."""
    nodes: Count = 1
    devices_per_node: Count = 8
    """Ranks of a node."""
    memory_gib: Positive
    """Of one device; of one rank's share on a cpu."""
    reserved_gib: NonNegative = 2.0
    """Of it, what the process takes beside its tensors: context, libraries, the network's buffers. One rank alone took
    0.95 on an H200; what several take for their network is an assumption."""
    host_memory_gib: Positive = 1000.0
    """Of one node; offloading uses it."""
    tflops: Positive
    """Of one device in the precision of the run, dense, in 1e12 floating-point operations a second."""
    memory_gb_per_s: Positive
    """Of one device's own memory."""
    within_node_gb_per_s: Positive
    """That one device sends to others of its node."""
    between_nodes_gb_per_s: Positive
    """That one device sends to other nodes."""
    latency_us: NonNegative = 20.0
    """Of one collective, whatever it moves."""
    layer_us: NonNegative = 4000.0
    """That one layer's forward pass takes at least, as its operations are started one by one: what small batches, such
    as a decoding step's, wait for. Measured once, on an H200 (docs/planning.md)."""
    tflops_share: Share = 0.2
    """Of `tflops` that a training step reaches; measured as `layer_us`."""
    bandwidth_share: Share = 0.7
    """Of every bandwidth."""

    @property
    def world(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def usable_bytes(self) -> float:
        """Of one device, for the run."""
        return (self.memory_gib - self.reserved_gib) * 2**30


def load_cluster(path: Path, nodes: int | None = None, devices_per_node: int | None = None) -> Cluster:
    """The cluster in `path`, of as many nodes and devices as are given; UserError names the key that is wrong."""
    tree = read_yaml(path, "a cluster file, for example one of ds_configs/clusters/")
    unknown = unknown_keys(tree, Cluster)
    if unknown:
        raise UserError(f"{path}: {unknown[0]}")
    try:
        given = {"nodes": nodes, "devices_per_node": devices_per_node}
        return TypeAdapter(Cluster).validate_python(tree | {key: n for key, n in given.items() if n is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
