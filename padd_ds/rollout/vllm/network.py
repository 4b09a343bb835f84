"""Weights over the network: a trainer's rank 0 sends rows of bytes, the workers of all servers receive them.

Runs in both interpreters: NCCL between GPUs, gloo between CPUs, both by torch alone.
"""

import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed

from padd_ds.rollout.vllm.exchange import views


def open_meeting(timeout_s: float) -> Any:
    """The store, at its own `port`, by which a group finds together; for the sender."""
    return torch.distributed.TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def go_to_meeting(address: str, port: int, timeout_s: float) -> Any:
    """The sender's store; for a receiver."""
    return torch.distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def join(store: Any, rank: int, world: int, device: torch.device, timeout_s: float) -> Any:
    """A process group of its own beside whatever groups there are; returns when all `world` are there. The sender is
    rank 0. RuntimeError after `timeout_s`."""
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cpu":
        return torch.distributed.ProcessGroupGloo(store, rank, world, timeout)
    torch.cuda.set_device(device)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch.distributed.ProcessGroupNCCL(store, rank, world, options)


def send(group: Any, part: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give all receivers `tensors`, laid out as `part` tells."""
    row = torch.empty(part["bytes"], dtype=torch.uint8, device=device)
    for (_, into), tensor in zip(views(part, row), tensors.values(), strict=True):
        into.copy_(tensor)
    group.broadcast(row, 0).wait()


def receive(group: Any, part: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what the sender gives."""
    row = torch.empty(part["bytes"], dtype=torch.uint8, device=device)
    group.broadcast(row, 0).wait()
    return views(part, row)


def address_towards(url: str) -> str:
    """This host's address on the way to a server; OSError where there is none."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])
