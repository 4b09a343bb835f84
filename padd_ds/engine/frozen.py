"""A frozen model on all ranks: whole on each, spread over them, or kept in their host memory."""

from typing import Any, Literal

import deepspeed
import torch

from padd_ds.engine.ranks import Ranks

Placement = Literal["replicated", "sharded", "offloaded"]
PERSISTENT_ELEMENTS = 10_000
"""Parameters as small as norms stay whole on every rank of a model that is spread."""


def place_frozen(model: Any, placement: Placement, dtype: torch.dtype, ranks: Ranks) -> Any:
    """`model`, ready for forward passes; collective ones unless it is `replicated`, so all ranks must make as many.

    `sharded`: ZeRO-3 gathers each layer when it runs. `offloaded`: from the ranks' host memory, likewise.
    """
    model = model.requires_grad_(False).eval()
    if placement == "replicated":
        return model.to(ranks.device)
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS}
    if placement == "offloaded":
        zero["offload_param"] = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
    tree = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=model, config=tree)
    return engine.module.eval()
