"""Regrouping of neurons by what a router can foresee.

Shapes: S tokens, D model width, P routed neurons, E routed experts, K of them per token.
"""

import torch
from torch.nn import functional

from padd_ds.conversion.clustering import balanced_assignment
from padd_ds.conversion.router import CalibratedRouter


def regroup(
    contribution_SP: torch.Tensor,
    assignment_P: torch.Tensor,
    router: CalibratedRouter,
    x_SD: torch.Tensor,
    *,
    n_experts: int,
    top_k: int,
    rounds: int,
) -> torch.Tensor:
    """[P] int64: a balanced assignment under which a router's choices keep more of the contribution.

    Each round fits a router to the experts' contributions (root of the summed squares), takes its `top_k`
    experts of every token, and moves every neuron to the expert that is chosen on the tokens where the neuron
    contributes: maximises sum_t sum_{k: chosen} c_tk^2 with the sizes kept.
    """
    energy_SP = contribution_SP.square()
    for _ in range(rounds):
        one_hot_PE = functional.one_hot(assignment_P, n_experts).float()
        weight_ED, intercept_E = router.fit((energy_SP @ one_hot_PE).sqrt())
        scores_SE = x_SD @ weight_ED.T + intercept_E
        chosen_SE = torch.zeros_like(scores_SE).scatter(1, scores_SE.topk(top_k, dim=1).indices, 1.0)
        assignment_P = balanced_assignment(-(energy_SP.T @ chosen_SE), assignment_P)
    return assignment_P
