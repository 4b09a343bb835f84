"""The ranks of a run and the few collectives that decisions are made from."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from padd_ds.errors import UserError
from padd_ds.launcher import launched_world

DEFAULT_PORT = 29500
"""Where ranks meet unless MASTER_PORT names another port, as in torch and DeepSpeed."""


PATIENCE_S = 1800.0
"""How long a rank waits in a collective for others that load, write or check something alone."""


class OtherRankFailed(RuntimeError):
    """This rank is well, but another one is not."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: `rank` of `world`, `device` to compute on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_ranks(patience_s: float = PATIENCE_S) -> Ranks:
    """Join the process group that the launcher announced (deepspeed, torchrun, srun, mpirun), or run alone.

    patience_s: how long a collective waits for the other ranks.
    """
    accelerator = get_accelerator()
    # DeepSpeed compiles this op at start-up although only its inference kernels use it. Without it no
    # compiler is needed, and no build that was killed can leave a lock on which the next run waits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # On Hopper GPUs cuDNN's backward pass of masked attention can give NaN where the length is 64 more than a multiple
    # of 128 (pytorch issue 196678, torch 2.11 to 2.13).
    torch.backends.cuda.enable_cudnn_sdp(False)
    _adopt_slurm_variables()
    backend = "nccl" if accelerator.device_name() == "cuda" else "gloo"
    if launched_world() == 1:
        os.environ.update(RANK="0", WORLD_SIZE="1")
        os.environ.setdefault("LOCAL_RANK", "0")
        # DeepSpeed asks for both before it finds that torch needs neither.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(DEFAULT_PORT))
        if not torch.distributed.is_initialized():
            # By no port, which another run that starts on this machine could take first.
            torch.distributed.init_process_group(
                backend,
                store=torch.distributed.HashStore(),
                rank=0,
                world_size=1,
                timeout=timedelta(seconds=patience_s),
            )
    if not dist.is_initialized():
        # Under mpirun DeepSpeed takes the port from here alone.
        port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
        deepspeed.init_distributed(
            dist_backend=backend,
            verbose=False,
            distributed_port=port,
            timeout=timedelta(seconds=patience_s),
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    return Ranks(rank=dist.get_rank(), world=dist.get_world_size(), device=device)


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, in a new tensor."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of each element over all ranks, in a new tensor."""
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_over_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Tensors of equal shape from the ranks of `group`, concatenated along dimension 0; no gradient."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group=group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts)


def on_main(action: Callable[[], Any], ranks: Ranks) -> Any:
    """What `action` gives on rank 0, on every rank, as other nodes may see other files. Collective."""
    result = [together(lambda: action() if ranks.is_main else None, ranks)]
    if ranks.world > 1:  # see gather_objects
        torch.distributed.broadcast_object_list(result, src=0)
    return result[0]


def gather_objects(mine: Any, ranks: Ranks) -> list[Any]:
    """What every rank gave, in the order of ranks; small plain values. Collective."""
    if ranks.world == 1:
        # Gloo's thread would copy 32 KiB and more with OpenMP threads of its own. They stay, and where there are then
        # more than cores, libgomp has those of training sleep between two operations in place of spinning.
        return [mine]
    told: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(told, mine)
    return told


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def patient_barrier() -> Callable[[], None]:
    """A barrier for ranks that may be hours apart, where the group's own would give up. Collective."""
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    return lambda: torch.distributed.barrier(group)


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """True on every rank if it is true on one."""
    return bool(sum_over_ranks(torch.tensor([float(flag)], device=ranks.device)).item() > 0)


def together(action: Callable[[], Any], ranks: Ranks) -> Any:
    """Run `action` on every rank; if it fails on one, every rank raises instead of waiting for it.

    A UserError of any rank is a UserError on all, so that the rank that speaks can tell it.
    """
    failure: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as error:
        failure = error
    mine = None if failure is None else (isinstance(failure, UserError), str(failure) or repr(failure))
    told = gather_objects(mine, ranks)
    failed = [(rank, *told[rank]) for rank in range(ranks.world) if told[rank] is not None]
    if failure is not None:
        raise failure
    if failed:
        rank, is_user_error, message = failed[0]
        raise UserError(message) if is_user_error else OtherRankFailed(f"rank {rank} failed: {message}")
    return result


def _adopt_slurm_variables() -> None:
    """Under a bare srun, translate Slurm's variables into torch's."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
        return
    if "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ:
        return
    if int(os.environ["SLURM_NTASKS"]) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR is not set under srun; start through slurm/*.sbatch or set it to the first node")
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ.setdefault("MASTER_PORT", str(DEFAULT_PORT))
