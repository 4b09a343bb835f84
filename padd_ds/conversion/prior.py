"""How much the neurons of each cluster fire on the calibration data (PADD eq. 2).

Shapes: S tokens, F neurons of the teacher's FFN, E routed experts, G neurons of an expert.
"""

import torch


def cluster_activation_means(hidden_SF: torch.Tensor, members_EG: torch.Tensor) -> torch.Tensor:
    """hbar_E: mean over tokens and over a cluster's neurons of |h|, divided by its mean over experts.

    The same number that `losses.prior.expert_activation_sums` gives for the experts cut out of the
    teacher, up to that division.
    """
    mean_E = hidden_SF.abs().float().mean(dim=0)[members_EG].mean(dim=1)
    return mean_E / mean_E.mean()
