"""Several copies of every routed expert: capacity that training can fill, at the same active size.

Shapes: S tokens, D model width, E routed experts = `copies` times the groups of neurons, F width of an expert.
"""

from collections.abc import Iterator

import torch

from padd_ds.conversion.clustering import balanced_kmeans
from padd_ds.conversion.router import CalibratedRouter, Router, logit_spread

COPY_SPREAD = 1.0  # of the logits that choose the copies, five times that of the logits that choose the groups
SIGMOID_SLOPE = 0.25


def route_copies(router: Router, x_SD: torch.Tensor, copies: int, generator: torch.Generator) -> Router:
    """A router over `copies` times as many experts, of which each set of copies serves its own kind of token.

    The tokens are cut into equal clusters by their input; a ridge regression to the clusters is added to the rows of
    the sets, strong enough that a token's `top_k` experts come from one set. Without that, copies would be
    chosen together and count twice.
    """
    if copies == 1:
        return router
    usable_SD = x_SD[: len(x_SD) // copies * copies]
    cluster_S = balanced_kmeans(usable_SD, copies, generator).assignment_P
    one_hot_SC = torch.nn.functional.one_hot(cluster_S, copies).float()
    weight_CD, intercept_C = CalibratedRouter(usable_SD).fit(one_hot_SC)
    scale = COPY_SPREAD / max(logit_spread(usable_SD @ weight_CD.T + intercept_C), 1e-12)
    weight_ED = (scale * weight_CD[:, None] + router.weight_ED).flatten(0, 1)
    bias_E = (scale * SIGMOID_SLOPE * intercept_C[:, None] + router.bias_E).flatten()
    return Router(weight_ED=weight_ED, bias_E=bias_E)


def reinitialised(name: str, tensor: torch.Tensor, neurons: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A copy of an expert's matrix with the values of some `neurons` drawn anew (Drop-Upcycling, arXiv 2502.19261).

    They are normal with the mean and standard deviation of the values that they replace.
    """
    drawn = tensor.clone()
    chosen = (slice(None), neurons) if name.endswith("down_proj.weight") else (neurons, slice(None))
    replaced = drawn[chosen].float()
    fresh = torch.randn(replaced.shape, generator=generator) * replaced.std() + replaced.mean()
    drawn[chosen] = fresh.to(tensor.dtype)
    return drawn


def reinitialise_copies(
    tensors: dict[str, torch.Tensor], groups: int, copies: int, share: float, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a student layer, with `share` of the neurons of every copy but the first drawn anew."""
    for expert in range(groups, groups * copies):
        names = [f"mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        width = len(tensors[names[0]])
        neurons = torch.randperm(width, generator=generator)[: round(share * width)]
        for name in names if len(neurons) else ():
            yield name, reinitialised(name, tensors[name], neurons, generator)
