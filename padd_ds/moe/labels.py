"""How well an expert tells the subdomain of a token, from a table of counts.

Shapes: C subdomains, E experts; `..` is any leading dimensions (layers). Everything is float64.
"""

import torch
from torch import Tensor


def nmi(counts_CE: Tensor) -> Tensor:
    """I(E; C) / sqrt(H(E) H(C)), [..] in [0, 1]; 0 where either side has one value only, or no counts."""
    joint_CE = _joint(counts_CE)
    entropy_C, entropy_E = _entropy(joint_CE.sum(-1)), _entropy(joint_CE.sum(-2))
    # I = H(C) + H(E) - H(E, C); rounding can take it below 0
    information = (entropy_C + entropy_E - _entropy(joint_CE.flatten(-2))).clamp(min=0.0)
    scale = (entropy_C * entropy_E).sqrt()
    return torch.where(scale > 0, information / scale, 0.0)


def esi(counts_CE: Tensor) -> Tensor:
    """sum_c p(c) KL(p(E|c) || p(E)), nats, [..]; 0 without counts. Equal to I(E; C) by its definition."""
    joint_CE = _joint(counts_CE)
    subdomain_C, expert_1E = joint_CE.sum(-1), joint_CE.sum(-2, keepdim=True)
    given_CE = joint_CE / subdomain_C[..., None].clamp(min=torch.finfo(joint_CE.dtype).tiny)
    kl_C = (torch.xlogy(given_CE, given_CE) - torch.xlogy(given_CE, expert_1E)).sum(-1)
    return (subdomain_C * kl_C).sum(-1)


def _joint(counts_CE: Tensor) -> Tensor:
    counts_CE = counts_CE.double()
    return counts_CE / counts_CE.sum((-2, -1), keepdim=True).clamp(min=1.0)


def _entropy(probability: Tensor) -> Tensor:
    return -torch.xlogy(probability, probability).sum(-1)
