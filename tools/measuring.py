"""Time and memory, as the benchmarks take them."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(action: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What `action` gives, and the seconds until `device` was done with it."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    started_s = time.perf_counter()
    result = action()
    wait()
    return result, time.perf_counter() - started_s


def peak_mib(device: torch.device) -> float:
    """The most memory that this process has held: of a GPU, what its allocator handed out; else what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_own_process(name: str) -> float:
    """The number that this script prints last when it is called again with `--only NAME`."""
    own = subprocess.run([sys.executable, *sys.argv, "--only", name], stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(own.stdout.splitlines()[-1]))
