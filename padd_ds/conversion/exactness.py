"""The proof that a written student is its teacher when all experts are active.

Shapes: B sequences, T tokens of a sequence, D model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from padd_ds.conversion.block import Block
from padd_ds.conversion.head import Head
from padd_ds.errors import UserError

BATCH, LENGTH = 2, 32
TOLERANCE = 1e-5
INDEPENDENT = 2**0.5  # two results with independent rounding errors of one size differ by that much of it
TEACHER, EXACT, OWN = "probe/teacher", "probe/teacher exact", "probe/teacher own"
STUDENT, STUDENT_OWN = "probe/student", "probe/student own"
COMPARED = (TEACHER, OWN, STUDENT, STUDENT_OWN)


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """Relative errors of a student with all experts active, computed in fp32.

    largest_error: of any layer given the teacher's input, worst token. logits_error: of the logits from
    end to end. The others exist below fp32, all of logits: the student's against the teacher's, both computed
    in the student's dtype; the teacher's in that dtype against its own in fp32; and the student's in that dtype
    against the teacher's in fp32.
    """

    largest_error: float
    logits_error: float
    student_rounding_error: float | None = None
    teacher_rounding_error: float | None = None
    student_distance_to_fp32: float | None = None


def probe_tokens(vocab_size: int) -> torch.Tensor:
    """[B, T] token ids spread over the vocabulary, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (BATCH, LENGTH), generator=generator)


def probe_states(embedding_BTD: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The states before the first layer, by name.

    Teacher and student compute in fp32 with weights rounded to `dtype`, teacher exact in fp32 with those stored
    (where that differs), the two others in `dtype` (where it is not fp32).
    """
    rounded_BTD = embedding_BTD.to(dtype)
    states = {TEACHER: rounded_BTD.float(), STUDENT: rounded_BTD.float()}
    if dtype not in (embedding_BTD.dtype, torch.float32):
        states[EXACT] = embedding_BTD.float()
    if dtype != torch.float32:
        states.update({OWN: rounded_BTD, STUDENT_OWN: rounded_BTD.clone()})
    return states


def advance_probes(
    states: dict[str, torch.Tensor], teacher: Block, student: Block, dtype: torch.dtype, layer: int
) -> float:
    """Run the probes of `states` through a layer; the student's relative error given the teacher's input.

    `teacher` holds the stored weights in fp32 and is left with weights rounded to `dtype`; `student` holds
    its own in `dtype` with all experts active. UserError where the error, of the worst token, is above TOLERANCE.
    """
    if EXACT in states:
        states[EXACT] = teacher.forward(states[EXACT])
    if OWN in states:
        states[OWN] = teacher.cast(dtype).forward(states[OWN])
        states[STUDENT_OWN] = student.forward(states[STUDENT_OWN])
    teacher.cast(torch.float32)
    student.cast(torch.float32)
    given_BTD = states[TEACHER]
    states[TEACHER] = teacher.forward(given_BTD)
    states[STUDENT] = student.forward(states[STUDENT])
    error = worst_token_error(states[TEACHER], student.forward(given_BTD))
    _demand(error, f"layer {layer}")
    return error


def conclude(
    states: dict[str, torch.Tensor],
    norm: Callable[[torch.Tensor, torch.dtype | None], torch.Tensor],
    exact_head: Head,
    rounded_head: Head,
    layer_error: float,
) -> Exactness:
    """Compare the logits after the last layer; UserError where the student's differ.

    `norm(states, rounding)` is the final norm with its weight as stored (None) or rounded, as the two heads are.
    Computed below fp32, the student's logits may be off the teacher's in that dtype by no more than INDEPENDENT
    times what those are off its own in fp32.
    """
    own = states[OWN].dtype if OWN in states else torch.float32
    logits = {name: rounded_head.logits(norm(states[name], own)) for name in states if name in COMPARED}
    error = relative_error(logits[TEACHER], logits[STUDENT])
    _demand(error, "logits")
    if OWN not in states:
        return Exactness(largest_error=layer_error, logits_error=error)
    exact = exact_head.logits(norm(states[EXACT], None)) if EXACT in states else logits[TEACHER]
    student_rounding = relative_error(logits[OWN], logits[STUDENT_OWN])
    teacher_rounding = relative_error(exact, logits[OWN])
    _check_rounding(student_rounding, teacher_rounding, own)
    return Exactness(
        largest_error=layer_error,
        logits_error=error,
        student_rounding_error=student_rounding,
        teacher_rounding_error=teacher_rounding,
        student_distance_to_fp32=relative_error(exact, logits[STUDENT_OWN]),
    )


def fully_active(n_routed: int, copies: int) -> dict[str, Any]:
    """Changes to a student's config under which every expert is chosen and, with equal scores, weighted 1 / copies."""
    return {"num_experts_per_tok": n_routed, "routed_scaling_factor": n_routed / copies}


def _demand(error: float, place: str) -> None:
    if not error <= TOLERANCE:  # written so that NaN fails
        raise UserError(
            f"exactness check failed: with all experts active the student first differs from its teacher at {place} "
            f"(relative error {error:.2e}, allowed {TOLERANCE:.0e}); nothing was written"
        )


def _check_rounding(student: float, teacher: float, dtype: torch.dtype) -> None:
    if not student <= INDEPENDENT * teacher:  # written so that NaN fails
        raise UserError(
            f"exactness check failed: in {dtype} the student's logits are off its teacher's by {student:.2e}, those "
            f"are off its own in fp32 by {teacher:.2e}; nothing was written (convert with --dtype float32)"
        )


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """||a - b|| / ||a||."""
    return float((expected - actual).norm() / expected.norm())


def worst_token_error(expected_BTD: torch.Tensor, actual_BTD: torch.Tensor) -> float:
    """max over tokens of ||a - b|| / ||a||."""
    return float(((expected_BTD - actual_BTD).norm(dim=-1) / expected_BTD.norm(dim=-1)).max())
