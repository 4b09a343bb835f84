"""The warm-up loss (PADD, Stage I b).

Shapes: E experts.
"""

import torch
from torch import Tensor

from padd_ds.losses.tokens import compute_dtype


def init_kl(student_prior_E: Tensor, teacher_prior_E: Tensor) -> Tensor:
    """L_init = sum_j p_S,j log(p_S,j / p_T,j), nats, scalar; the teacher's prior gets no gradient.

    Leading dimensions (layers) are summed too. A zero probability on either side counts as the smallest
    normal number inside the logarithm, so value and gradient stay finite.
    """
    dtype = compute_dtype(student_prior_E, teacher_prior_E)
    tiny = torch.finfo(dtype).tiny
    student_prior_E = student_prior_E.to(dtype)
    log_student_E = student_prior_E.clamp(min=tiny).log()
    log_teacher_E = teacher_prior_E.detach().to(dtype).clamp(min=tiny).log()
    return (student_prior_E * (log_student_E - log_teacher_E)).sum()
