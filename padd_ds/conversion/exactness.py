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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the teacher computes on the probe tokens, as fp32 CPU tensors.

    states: computed in fp32 with the weights rounded to the student's dtype, see `run_states`.
    exact_logits: with the stored weights in fp32. own_logits: computed in the student's dtype, None for fp32.
    """

    tokens_BT: torch.Tensor
    states: dict[str, torch.Tensor]
    exact_logits: torch.Tensor
    own_logits: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """Relative errors of a student with all experts active, computed in fp32.

    largest_error: of any layer given the teacher's input, worst token. logits_error: of the logits from
    end to end. The other two exist below fp32, both of logits computed in the student's dtype: relative
    errors of the student's against the teacher's, and of the teacher's against its own in fp32.
    """

    largest_error: float
    logits_error: float
    student_rounding_error: float | None = None
    teacher_rounding_error: float | None = None


def probe_tokens(vocab_size: int) -> torch.Tensor:
    """[B, T] token ids spread over the vocabulary, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (BATCH, LENGTH), generator=generator)


@torch.no_grad()
def run_logits(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, V] logits on the CPU in fp32."""
    return model(tokens_BT.to(model.device), use_cache=False).logits.float().cpu()


@torch.no_grad()
def run_states(
    model: Any, tokens_BT: torch.Tensor, forced: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """[B, T, D] fp32 CPU states by name, in order: embedding, the output of each layer, final norm.

    With `forced` (the states of another model) each layer is given that model's input, so that its
    rounding is not amplified by the layers before it.
    """
    states: dict[str, torch.Tensor] = {}
    layers = model.model.layers
    inputs = ["embedding", *(f"layer {index}" for index in range(len(layers) - 1))]

    def before(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> Any:
            states.setdefault(name, args[0].float().cpu())
            return None if forced is None else (forced[name].to(args[0]), *args[1:])

        return hook

    def after(name: str) -> Any:
        return lambda module, args, output: states.update({name: output.float().cpu()})

    handles = [layer.register_forward_pre_hook(before(name)) for name, layer in zip(inputs, layers, strict=True)]
    handles += [layer.register_forward_hook(after(f"layer {index}")) for index, layer in enumerate(layers)]
    handles.append(model.model.norm.register_forward_hook(after("final norm")))
    try:
        model(tokens_BT.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def teacher_reference(model: Any, dtype: torch.dtype) -> Reference:
    """Run an fp32 teacher on the probe tokens. Leaves the model's weights rounded to `dtype`."""
    tokens_BT = probe_tokens(model.config.vocab_size)
    exact_logits = run_logits(model, tokens_BT)
    own_logits = None
    if dtype != torch.float32:
        cast_parameters(model, dtype)
        own_logits = run_logits(model, tokens_BT)
        cast_parameters(model, torch.float32)
    states = run_states(model, tokens_BT)
    states["logits"] = run_logits(model, tokens_BT)
    return Reference(tokens_BT=tokens_BT, states=states, exact_logits=exact_logits, own_logits=own_logits)


def check_student(folder: Path, reference: Reference, dtype: torch.dtype, device: str) -> Exactness:
    """Load the student with plain transformers and compare it with all its experts active.

    Computed in fp32, every layer (given the teacher's input) and the logits (from end to end) must equal
    the teacher's to TOLERANCE. Computed in a lower `dtype`, the logits may be off the teacher's in
    that dtype by no more than those are off its own in fp32. UserError naming the first layer that differs.
    """
    model = load_fully_active(folder, dtype).to(device)
    student_rounding = teacher_rounding = None
    if reference.own_logits is not None:
        student_rounding = relative_error(reference.own_logits, run_logits(model, reference.tokens_BT))
        teacher_rounding = relative_error(reference.exact_logits, reference.own_logits)
    cast_parameters(model, torch.float32)
    states = run_states(model, reference.tokens_BT, forced=reference.states)
    states["logits"] = run_logits(model, reference.tokens_BT)
    errors = compare(reference.states, states)
    logits_error = errors.pop("logits")
    if student_rounding is not None and teacher_rounding is not None:
        _check_rounding(student_rounding, teacher_rounding, dtype)
    return Exactness(
        largest_error=max(errors.values()),
        logits_error=logits_error,
        student_rounding_error=student_rounding,
        teacher_rounding_error=teacher_rounding,
    )


def _check_rounding(student: float, teacher: float, dtype: torch.dtype) -> None:
    if not student <= teacher:  # written so that NaN fails
        raise UserError(
            f"exactness check failed: in {dtype} the student's logits are off its teacher's by {student:.2e}, those "
            f"are off its own in fp32 by {teacher:.2e}; nothing was written (convert with --dtype float32)"
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
    """Relative error of every state, for states of layers that of the worst token; UserError above TOLERANCE."""
    errors = {}
    for name, expected in reference.items():
        measure = relative_error if name == "logits" else worst_token_error
        error = measure(expected, states[name])
        if not error <= TOLERANCE:  # written so that NaN fails
            raise UserError(
                f"exactness check failed: with all experts active the student first differs from its teacher at {name} "
                f"(relative error {error:.2e}, allowed {TOLERANCE:.0e}); nothing was written"
            )
        errors[name] = error
    return errors


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """||a - b|| / ||a||."""
    return float((expected - actual).norm() / expected.norm())


def worst_token_error(expected_BTD: torch.Tensor, actual_BTD: torch.Tensor) -> float:
    """max over tokens of ||a - b|| / ||a||."""
    return float(((expected_BTD - actual_BTD).norm(dim=-1) / expected_BTD.norm(dim=-1)).max())


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Round the parameters only: rotary frequencies and selection biases are buffers and stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
