"""Least-squares refit of down_proj to what the student's routing leaves active.

Shapes: S tokens, D model width, F neurons of the teacher's FFN, E routed experts, N slices, G neurons of a slice.
"""

import torch

REFIT_RIDGE = 0.3  # of the mean square sum of a neuron


def neuron_weights(weight_SE: torch.Tensor, members_NG: torch.Tensor, width: int) -> torch.Tensor:
    """[S, F]: what the routing multiplies every neuron with, summed over its copies; 1 for the shared slices."""
    n_slices, group = members_NG.shape
    shared_SN = torch.ones(len(weight_SE), n_slices - weight_SE.shape[1], device=weight_SE.device)
    per_slice_SN = torch.cat([weight_SE, shared_SN], dim=1)
    weights_SF = torch.zeros(len(weight_SE), width, device=weight_SE.device)
    return weights_SF.index_add_(1, members_NG.flatten(), per_slice_SN.repeat_interleave(group, dim=1))


def refit_down(
    active_SF: torch.Tensor,
    target_SD: torch.Tensor,
    down_DF: torch.Tensor,
    token_weight_S: torch.Tensor,
    ridge: float = REFIT_RIDGE,
) -> torch.Tensor:
    """[D, F]: min_W sum_t w_t ||W active_t - target_t||^2 + penalty ||W - down||^2.

    active_SF: hidden activations times `neuron_weights`. The penalty is `ridge` times the weighted square sum of a
    neuron, mean over neurons: it pulls to the teacher's own columns, which a neuron that is never active keeps. One
    penalty for all leaves the strongest neurons free, those of attention sinks among them.
    Solved over the smaller of S and F, in fp64; its sums over tokens are fp32, which the ridge forgives.
    """
    root_S1 = token_weight_S.sqrt()[:, None]
    residual_SD = (target_SD - active_SF @ down_DF.T) * root_S1
    active_SF = active_SF * root_S1
    n_tokens, width = active_SF.shape
    penalty = ridge * active_SF.square().sum() / width
    if width <= n_tokens:
        moment_FF = active_SF.T @ active_SF
        moment_FF.diagonal().add_(penalty)
        change_FD = _solve(moment_FF, active_SF.T @ residual_SD)
    else:
        scaled_SF = active_SF / penalty
        kernel_SS = scaled_SF @ active_SF.T
        kernel_SS.diagonal().add_(1.0)
        change_FD = scaled_SF.T @ _solve(kernel_SS, residual_SD)
    return down_DF + change_FD.T


def _solve(positive_XX: torch.Tensor, right_XD: torch.Tensor) -> torch.Tensor:
    factor_XX = torch.linalg.cholesky(positive_XX.double())
    return torch.cholesky_solve(right_XD.double(), factor_XX).float()


def reconstruction_error(target_SD: torch.Tensor, output_SD: torch.Tensor, token_weight_S: torch.Tensor) -> float:
    """sum_t w_t ||output_t - target_t||^2 / sum_t w_t ||target_t||^2."""
    errors_S, targets_S = (one_SD.square().sum(dim=1) for one_SD in (output_SD - target_SD, target_SD))
    return float((errors_S * token_weight_S).sum() / (targets_S * token_weight_S).sum())


def token_weights(stream_SD: torch.Tensor) -> torch.Tensor:
    """[S], mean 1: 1 / ||stream||^2 of the residual stream behind the layer.

    Choice: the next norm divides by that length, so an error counts as large as it is beside the stream.
    """
    weight_S = 1 / stream_SD.square().sum(dim=1).clamp(min=1e-12)
    return weight_S / weight_S.mean()
