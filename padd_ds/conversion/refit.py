"""Least-squares refit of down_proj to what the student's routing leaves active.

Shapes: S tokens, D model width, F neurons of the teacher's FFN, E routed experts, N slices, G neurons of a slice.
"""

import torch

REFIT_RIDGE = 1e-2  # of the mean square of an active neuron


def neuron_weights(weight_SE: torch.Tensor, members_NG: torch.Tensor, width: int) -> torch.Tensor:
    """[S, F]: what the routing multiplies every neuron with; 1 for the shared slices behind the E routed ones."""
    n_slices, group = members_NG.shape
    shared_SN = torch.ones(len(weight_SE), n_slices - weight_SE.shape[1], device=weight_SE.device)
    per_slice_SN = torch.cat([weight_SE, shared_SN], dim=1)
    weights_SF = torch.empty(len(weight_SE), width, device=weight_SE.device)
    weights_SF[:, members_NG.flatten()] = per_slice_SN.repeat_interleave(group, dim=1)
    return weights_SF


def refit_down(
    active_SF: torch.Tensor, target_SD: torch.Tensor, down_DF: torch.Tensor, ridge: float = REFIT_RIDGE
) -> torch.Tensor:
    """[D, F]: min_W ||active W^T - target||^2 + ridge * mean(active^2) * S * ||W - down||^2.

    active_SF: hidden activations times `neuron_weights`. The ridge pulls to the teacher's own matrix, so that
    a neuron that is never active keeps it. Solved over the smaller of S and F, in fp64 on the normal equations.
    """
    residual_SD = (target_SD - active_SF @ down_DF.T).double()
    active_SF = active_SF.double()
    n_tokens, width = active_SF.shape
    strength = ridge * float(active_SF.square().sum()) / width
    if width <= n_tokens:
        moment_FF = active_SF.T @ active_SF
        moment_FF.diagonal().add_(strength)
        change_FD = _solve(moment_FF, active_SF.T @ residual_SD)
    else:
        kernel_SS = active_SF @ active_SF.T
        kernel_SS.diagonal().add_(strength)
        change_FD = active_SF.T @ _solve(kernel_SS, residual_SD)
    return down_DF + change_FD.T.float()


def _solve(positive_XX: torch.Tensor, right_XD: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(right_XD, torch.linalg.cholesky(positive_XX))


def reconstruction_error(target_SD: torch.Tensor, output_SD: torch.Tensor) -> float:
    """||output - target||^2 / ||target||^2 over all tokens."""
    return float((output_SD - target_SD).square().sum() / target_SD.square().sum())
