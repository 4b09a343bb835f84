"""Run a function on several gloo ranks of this machine."""

import io
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
# The server imports once what ranks need, with what DeepSpeed imports when it is initialised; each rank is then a cheap
# fork of it.
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "tests.world",
        "padd_ds.run.loop",
        "deepspeed.module_inject.auto_ep",
        "deepspeed.moe.ep_kernels",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch.utils.tensorboard",
    ]
)


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 240) -> list[Any]:
    """`function(ranks, *arguments)` on `world` ranks; returns the results by rank.

    `function` must be importable. A rank that raises fails the test with its traceback; ranks that
    are not back after `timeout_s` are killed and reported.
    """
    port = free_port()
    results: Any = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_one_rank, args=(function, rank, world, port, arguments, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(results, world, timeout_s)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _collect(results: Any, world: int, timeout_s: float) -> list[Any]:
    by_rank: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(by_rank) < world:
        try:
            rank, value, failure = results.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            missing = sorted(set(range(world)) - set(by_rank))
            raise AssertionError(f"ranks {missing} did not finish within {timeout_s} s") from None
        assert failure is None, f"rank {rank} failed:\n{failure}"
        by_rank[rank] = torch.load(io.BytesIO(value), weights_only=True)
    return [by_rank[rank] for rank in range(world)]


def _one_rank(function: Callable[..., Any], rank: int, world: int, port: int, arguments: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from padd_ds.engine.ranks import start_ranks, stop_ranks

    torch.set_num_threads(1)
    try:
        # As bytes: a tensor in shared memory would be gone with its process.
        value = io.BytesIO()
        torch.save(function(start_ranks(), *arguments), value)
        results.put((rank, value.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        stop_ranks()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
