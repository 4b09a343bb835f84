"""Which GPUs a server takes of those that its rank sees."""

import os

import torch

from padd_ds.errors import UserError


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def gpus_of_server(rank: int, first: int, count: int) -> str:
    """CUDA_VISIBLE_DEVICES for `count` GPUs from number `first` of those visible on; UserError: there are too few."""
    names = visible_gpus()
    if first + count > len(names):
        raise UserError(
            f"vllm.tensor_parallel {count}: rank {rank} sees the GPUs {','.join(names)} and its server's first is "
            f"number {first} of them; give every rank of a node all its GPUs, or lower it"
        )
    return ",".join(names[first : first + count])
