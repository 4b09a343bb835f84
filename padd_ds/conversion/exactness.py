"""The proof that a written student is its teacher when all experts are active.

Shapes: B sequences, T tokens of a sequence, D model width, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from padd_ds.errors import UserError

BATCH, LENGTH = 2, 32
TOLERANCE = 1e-5
# Rounding errors of two orders of summation differ by chance; their sizes over a whole batch do not.
ROUNDING_FACTOR = 1.25


@dataclass(frozen=True, kw_only=True)
class Reference:
    """States of the teacher: name and tensor after every layer, then the logits; all computed in fp32.

    exact: with the stored weights. rounded: with the weights rounded to the student's dtype.
    own: computed in the student's dtype. The last two are None for fp32.
    """

    tokens_BT: torch.Tensor
    exact: dict[str, torch.Tensor]
    rounded: dict[str, torch.Tensor] | None
    own: dict[str, torch.Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """Largest relative errors over all states, and of the logits.

    In a dtype below fp32 also the relative RMS errors of the logits against the fp32 teacher, of the
    student and of the teacher itself in that dtype.
    """

    largest_error: float
    logits_error: float
    student_rounding_rms: float | None = None
    teacher_rounding_rms: float | None = None


def probe_tokens(vocab_size: int) -> torch.Tensor:
    """[B, T] token ids spread over the vocabulary, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (BATCH, LENGTH), generator=generator)


@torch.no_grad()
def named_states(model: Any, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """fp32 CPU copies of the hidden state after every layer (the last after the final norm) and the logits."""
    output = model(tokens_BT.to(model.device), output_hidden_states=True, use_cache=False)
    states = {f"layer {index}": state for index, state in enumerate(output.hidden_states[1:])}
    states["logits"] = output.logits
    return {name: state.float().cpu() for name, state in states.items()}


def teacher_reference(model: Any, dtype: torch.dtype) -> Reference:
    """Run an fp32 teacher on the probe tokens. Leaves the model's weights rounded to `dtype`."""
    tokens_BT = probe_tokens(model.config.vocab_size)
    exact = named_states(model, tokens_BT)
    if dtype == torch.float32:
        return Reference(tokens_BT=tokens_BT, exact=exact, rounded=None, own=None)
    cast_parameters(model, dtype)
    own = named_states(model, tokens_BT)
    cast_parameters(model, torch.float32)
    return Reference(tokens_BT=tokens_BT, exact=exact, rounded=named_states(model, tokens_BT), own=own)


def check_student(folder: Path, reference: Reference, dtype: torch.dtype, device: str) -> Exactness:
    """Load the student with plain transformers and compare it with all its experts active.

    Computed in fp32, its states must equal those of the teacher with equally rounded weights to
    TOLERANCE. Computed in a lower `dtype`, the RMS error of its logits against the fp32 teacher must
    not exceed the teacher's own in that dtype by more than ROUNDING_FACTOR. UserError naming the
    first layer that differs.
    """
    model = load_fully_active(folder, dtype).to(device)
    student_rms = teacher_rms = None
    if reference.own is not None:
        student_states = named_states(model, reference.tokens_BT)
        student_rms = relative_rms(reference.exact["logits"], student_states["logits"])
        teacher_rms = relative_rms(reference.exact["logits"], reference.own["logits"])
    cast_parameters(model, torch.float32)
    states = named_states(model, reference.tokens_BT)
    errors = compare(reference.rounded or reference.exact, states)
    if student_rms is not None and teacher_rms is not None and not student_rms <= ROUNDING_FACTOR * teacher_rms:
        raise UserError(
            f"{folder}: the student's {dtype} logits are off by {student_rms:.2e} (RMS), the teacher's own by "
            f"{teacher_rms:.2e}; convert with --dtype float32"
        )
    return Exactness(
        largest_error=max(errors.values()),
        logits_error=errors["logits"],
        student_rounding_rms=student_rms,
        teacher_rounding_rms=teacher_rms,
    )


def load_fully_active(folder: Path, dtype: torch.dtype) -> Any:
    """The student with every expert chosen and weighted 1: equal scores, top_k and scale equal to E."""
    config = AutoConfig.from_pretrained(folder)
    config.num_experts_per_tok = config.n_routed_experts
    config.routed_scaling_factor = float(config.n_routed_experts)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True).eval()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    return model


def compare(reference: dict[str, torch.Tensor], states: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error max |a - b| / max |a| of every state; UserError naming the first above TOLERANCE."""
    errors = {}
    for name, expected in reference.items():
        error = float((expected - states[name]).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:  # written so that NaN fails
            raise UserError(
                f"exactness check failed: with all experts active the student first differs from its teacher at {name} "
                f"(relative error {error:.2e}, allowed {TOLERANCE:.0e}); nothing was written"
            )
        errors[name] = error
    return errors


def relative_rms(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """sqrt(mean (a - b)^2 / mean a^2)."""
    return float(((expected - actual).square().mean() / expected.square().mean()).sqrt())


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Round the parameters only: rotary frequencies and selection biases are buffers and stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
