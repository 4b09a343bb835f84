"""Regrouping of neurons by what a router can foresee.

Shapes: S tokens, D model width, F neurons, N slices, E of them routed and K of those chosen per token.
"""

import torch
from torch.nn import functional

from padd_ds.conversion.clustering import balanced_assignment
from padd_ds.conversion.router import CalibratedRouter


def regroup(
    energy_SF: torch.Tensor,
    slice_F: torch.Tensor,
    x_SD: torch.Tensor,
    *,
    n_routed: int,
    n_slices: int,
    top_k: int,
    rounds: int,
) -> torch.Tensor:
    """[F] int64: slices of equal size under which a router's choices keep more of the neurons' energy.

    Each round fits a router to the experts' contributions (root of the summed energies), takes its `top_k` experts of
    every token, and moves neurons, with all sizes kept, to where they are active when they are needed: maximises
    sum_t sum_{k active} energy_tk. Slices from `n_routed` on are shared, active on every token.
    """
    router = CalibratedRouter(x_SD)
    for _ in range(rounds):
        per_slice_SN = energy_SF @ functional.one_hot(slice_F, n_slices).float()
        weight_ED, intercept_E = router.fit(per_slice_SN[:, :n_routed].sqrt())
        scores_SE = x_SD @ weight_ED.T + intercept_E
        active_SN = torch.ones_like(per_slice_SN)
        active_SN[:, :n_routed] = 0
        active_SN.scatter_(1, scores_SE.topk(top_k, dim=1).indices, 1.0)
        slice_F = balanced_assignment(-(energy_SF.T @ active_SN), slice_F)
    return slice_F
