"""What a run's rollout servers need of their GPUs, of the training's, and of the nodes' memory."""

from dataclasses import dataclass

from padd_ds.config.schema import RunConfig
from padd_ds.errors import UserError
from padd_ds.planning.cluster import Cluster
from padd_ds.planning.shape import ModelShape
from padd_ds.planning.workload import ServerShare


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """Servers that are all alike; bytes of one GPU (on a CPU of one rank's share), but for `exchanged`."""

    servers: int
    nodes: int
    """Of their own; 0 where they stand on the training's GPUs."""
    tensor_parallel: int
    weights: float
    longest: float
    """Keys and values of one sequence of the longest length; nothing can be answered with less."""
    room: float
    """For both."""
    sleep: bool
    exchanged: float
    """Of each training node's memory: the weights that servers read there."""

    @property
    def fits(self) -> bool:
        return self.weights + self.longest <= self.room

    @property
    def share(self) -> ServerShare:
        """Of a GPU on which a rank trains too."""
        if self.nodes:
            return ServerShare(awake=0, asleep=0)
        return ServerShare(awake=self.room, asleep=0 if self.sleep else self.room)


def plan_servers(
    config: RunConfig, student: ModelShape, cluster: Cluster, value_bytes: int, server_nodes: int | None
) -> ServerPlan | None:
    """None where the run uses none; UserError for numbers that do not go together.

    `server_nodes`: beside the cluster's, each of as many devices; for servers of their own, 1 by default.
    """
    options = config.vllm
    own = config.uses_vllm and options.servers is not None
    if server_nodes is not None and not own:
        raise UserError("--server-nodes is for rollout.engine=vllm with vllm.servers; give both, or leave it out")
    if not config.uses_vllm:
        return None
    nodes = (server_nodes or 1) if own else 0
    if own and cluster.devices_per_node % options.tensor_parallel:
        raise UserError(
            f"vllm.tensor_parallel {options.tensor_parallel} does not divide the {cluster.devices_per_node} devices of "
            "a server's node"
        )
    per_node = cluster.devices_per_node // options.tensor_parallel
    servers = nodes * per_node if own else cluster.nodes * -(-cluster.devices_per_node // options.ranks_per_server)
    if servers > cluster.world:
        raise UserError(
            f"{nodes} nodes of {per_node} servers are more than the {cluster.world} ranks, each of which asks one: "
            "take fewer nodes, or raise vllm.tensor_parallel"
        )
    whole = student.parameters * value_bytes
    weights = whole / options.tensor_parallel
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    cache = 2 * student.kv_width * student.layers * value_bytes / min(options.tensor_parallel, student.kv_heads)
    given = None if options.cache_gib is None else weights + options.cache_gib * 2**30
    return ServerPlan(
        servers=servers,
        nodes=nodes,
        tensor_parallel=options.tensor_parallel,
        weights=weights,
        longest=tokens * cache,
        room=options.memory_share * cluster.memory_gib * 2**30 if given is None else given,
        sleep=cluster.kind != "cpu" if options.sleep is None else options.sleep,
        exchanged=0 if own or options.exchange is not None else whole,
    )
