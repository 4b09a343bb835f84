"""Which term of a loss drives the parameters."""

from collections.abc import Mapping, Sequence

import torch

from padd_ds.engine.student import Student
from padd_ds.seeds import derive_seed
from padd_ds.stages.stage import MetricSums


def measured_micro_batch(seed: int, step: int, count: int) -> int:
    """Which of a step's micro-batches is measured, the same on all ranks.

    Drawn, since they stand in order of length: the first one has the shortest responses.
    """
    return derive_seed(seed, step) % count


def add_gradient_norms(terms: Mapping[str, torch.Tensor], student: Student, sums: MetricSums) -> None:
    """Put the norm of each term's own gradient among the metrics, mean over ranks, as `grad_norm_NAME`.

    The terms must come from `student.model`: a backward pass through outputs of the engine would start its reduction.
    """
    for name, norm in term_gradient_norms(terms, student.trained_parameters).items():
        sums.add(f"grad_norm_{name}", norm)


def term_gradient_norms(
    terms: Mapping[str, torch.Tensor], parameters: Sequence[torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """L2 norm of each scalar term's own gradient over `parameters`, by name; 0 for a term without gradient.

    Keeps the graph, and leaves `.grad` and whatever hooks its accumulation alone. Under expert parallelism all ranks
    must call it on the same terms, since backward passes exchange tokens.
    """
    return {name: _norm(term, parameters) for name, term in terms.items()}


def _norm(term: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    if not term.requires_grad:
        return torch.zeros((), device=term.device)
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in found if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=term.device)
