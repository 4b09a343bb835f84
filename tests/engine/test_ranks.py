"""How long ranks wait for each other."""

from datetime import timedelta

import torch

from padd_ds.engine.ranks import PATIENCE_S, Ranks
from tests.ranks import run_ranks


def patience(ranks: Ranks) -> float:
    group = torch.distributed.group.WORLD
    assert group is not None
    waits: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return waits.total_seconds()


def test_collectives_wait_longer_than_deepspeed_would() -> None:
    assert run_ranks(patience, 1) == [PATIENCE_S]
