"""One layer of a conversion: every stream of hidden states passes through it, and its experts are cut.

Shapes: B windows, T tokens of a window, S tokens without the padding, D model width.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from padd_ds.conversion.block import Block, load_block
from padd_ds.conversion.copies import reinitialise_copies
from padd_ds.conversion.exactness import advance_probes, fully_active, probe_states
from padd_ds.conversion.families import FFN_TENSORS, copied_layer_tensors, layer_tensors
from padd_ds.conversion.head import embed
from padd_ds.conversion.layer import ConvertedLayer, Ffn, LayerInputs, convert_layer
from padd_ds.conversion.plan import CALIBRATION, EVALUATION, STUDENT, TEACHER, Plan, without_padding
from padd_ds.conversion.targets import LayerTargets
from padd_ds.conversion.writer import moe_tensors, write_shard
from padd_ds.errors import UserError
from padd_ds.seeds import derive_seed

Tensors = dict[str, torch.Tensor]
States = dict[str, torch.Tensor]
REINIT = 1  # sets the draws of the copies apart from those of the clustering


@dataclass(frozen=True, kw_only=True)
class FinishedLayer:
    """A layer that has been written: what training needs of it unless it is dense, and what a reader wants to know."""

    targets: LayerTargets | None
    facts: dict[str, Any]


def first_states(plan: Plan) -> States:
    """The embeddings of all streams, by name: `probe/...`, `calibration/WHO` and `evaluation/WHO`."""
    embeddings = {name: embed(plan.teacher.weights, windows_BT) for name, windows_BT in plan.windows.items()}
    states = probe_states(embeddings.pop("probe"), plan.dtype)
    for name, embedding_BTD in embeddings.items():
        states[f"{name}/{TEACHER}"] = embedding_BTD.float()
        for variant in plan.variants:
            states[f"{name}/{variant}"] = embedding_BTD.to(plan.dtype).float()
    return states


def convert_one(plan: Plan, layer: int, states: States, result: Path) -> FinishedLayer:
    """Convert layer `layer`, write its shard to `result` and move all `states` past it.

    UserError where the written layer, with all experts active, is not the teacher's.
    """
    stored = read_layer(plan, layer)
    teacher = teacher_block(plan, layer, stored)
    teacher_x_BTD = None
    if CALIBRATION in plan.windows:
        after_BTD, teacher_x_BTD = teacher.attend(states[f"{CALIBRATION}/{TEACHER}"])
        states[f"{CALIBRATION}/{TEACHER}"] = after_BTD + teacher.feed(teacher_x_BTD)
    if EVALUATION in plan.windows:
        states[f"{EVALUATION}/{TEACHER}"] = teacher.forward(states[f"{EVALUATION}/{TEACHER}"])
    if layer < plan.options.dense_layers:
        return _keep_dense(plan, layer, states, teacher, stored, result)
    converted = {
        variant: _convert_variant(plan, layer, variant, states, teacher, teacher_x_BTD, stored)
        for variant in plan.variants
    }
    student = converted[STUDENT]
    tensors = _student_tensors(plan, layer, stored, student)
    with ThreadPoolExecutor(1) as pool:  # the disk works while the layer is proved
        written = pool.submit(_write_layer, plan, layer, tensors, result)
        error = _prove(plan, layer, states, teacher, stored, student, tensors)
        _check_written(written.result(), layer, tensors)
    facts = {"exactness_error": error, "quality": {name: asdict(one.quality) for name, one in converted.items()}}
    return FinishedLayer(targets=student.targets, facts=facts)


def _keep_dense(plan: Plan, layer: int, states: States, teacher: Block, stored: Tensors, result: Path) -> FinishedLayer:
    """Take a layer over as it is, and move the streams of all variants past it."""
    tensors = {name: tensor.to(plan.dtype) for name, tensor in stored.items()}
    block = _student_block(plan, layer, tensors, torch.float32)
    for text in {CALIBRATION, EVALUATION} & plan.windows.keys():
        for variant in plan.variants:
            states[f"{text}/{variant}"] = block.forward(states[f"{text}/{variant}"])
    _check_written(_write_layer(plan, layer, tensors, result), layer, tensors)
    written = _student_block(plan, layer, tensors, plan.dtype)
    error = advance_probes(states, teacher, written, plan.dtype, layer)
    return FinishedLayer(targets=None, facts={"exactness_error": error, "quality": None})


def teacher_block(plan: Plan, layer: int, stored: Tensors) -> Block:
    """The teacher's layer that student layer `layer` comes from, in fp32."""
    teacher = plan.teacher
    final_norm_D = teacher.weights.tensor("model.norm.weight")
    source = plan.teacher_layers[layer]
    return load_block(teacher.config, source, stored, final_norm_D, torch.float32, plan.options.device)


def read_layer(plan: Plan, layer: int) -> Tensors:
    """The teacher's tensors for student layer `layer`, as stored, by names within the layer."""
    prefix = f"model.layers.{plan.teacher_layers[layer]}."
    return {name: plan.teacher.weights.tensor(prefix + name) for name in layer_tensors(plan.teacher.family)}


def _convert_variant(
    plan: Plan,
    layer: int,
    variant: str,
    states: States,
    teacher: Block,
    teacher_x_BTD: torch.Tensor | None,
    stored: Tensors,
) -> ConvertedLayer:
    """Cut the layer for a variant and move its streams past it."""
    options, device = plan.variants[variant], plan.options.device
    gate_FD, up_FD, down_DF = (getattr(teacher.ffn, f"{part}_proj").weight.data for part in ("gate", "up", "down"))
    inputs, after_BTD, x_BTD = None, None, None
    if teacher_x_BTD is not None:
        after_BTD, x_BTD = teacher.attend(states[f"{CALIBRATION}/{variant}"])
        inputs = LayerInputs(
            teacher_SD=without_padding(plan.windows, teacher_x_BTD).to(device),
            student_SD=without_padding(plan.windows, x_BTD).to(device),
            stream_SD=without_padding(plan.windows, after_BTD).to(device),
        )
    generator = torch.Generator().manual_seed(derive_seed(options.seed, layer))
    ffn = Ffn(gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF)
    converted = convert_layer(ffn, inputs, plan.slicing, options, generator)
    if after_BTD is None and EVALUATION not in plan.windows:
        return converted
    block = _student_block(plan, layer, _student_tensors(plan, layer, stored, converted), torch.float32)
    if after_BTD is not None and x_BTD is not None:
        states[f"{CALIBRATION}/{variant}"] = after_BTD + block.feed(x_BTD)
    if EVALUATION in plan.windows:
        states[f"{EVALUATION}/{variant}"] = block.forward(states[f"{EVALUATION}/{variant}"])
    return converted


def _student_tensors(plan: Plan, layer: int, stored: Tensors, converted: ConvertedLayer) -> Tensors:
    """A student layer as it is written, by names within the layer."""
    tensors = _cut(plan, stored, converted)
    slicing, options = plan.slicing, plan.options
    generator = torch.Generator().manual_seed(derive_seed(options.seed, layer, REINIT))
    fresh = reinitialise_copies(tensors, slicing.groups, slicing.copies, options.reinit_share, generator)
    return {**tensors, **dict(fresh)}


def _cut(plan: Plan, stored: Tensors, converted: ConvertedLayer) -> Tensors:
    """A student layer of the teacher's own neurons."""
    copied = {name: stored[name].to(plan.dtype) for name in copied_layer_tensors(plan.teacher.family)}
    gate_FD, up_FD, down_DF = (stored[name].to(plan.dtype) for name in FFN_TENSORS)
    if converted.refitted_down_DF is not None:
        down_DF = converted.refitted_down_DF.to("cpu", plan.dtype)
    router, members_NG = converted.router, converted.members_NG.cpu()
    ffn = (gate_FD, up_FD, down_DF)
    return {**copied, **dict(moe_tensors(ffn, members_NG, router.weight_ED.cpu(), router.bias_E.cpu()))}


def _check_written(path: Path, layer: int, tensors: Tensors) -> None:
    """UserError unless the shard holds what is proved."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(f"model.layers.{layer}.{name}"), tensor):
                raise UserError(f"{path}: layer {layer} does not hold the {name} that was written; check the disk")


def _write_layer(plan: Plan, layer: int, tensors: Tensors, result: Path) -> Path:
    named = {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    return write_shard(result, layer + 2, plan.n_shards, named)


def _prove(
    plan: Plan, layer: int, states: States, teacher: Block, stored: Tensors, student: ConvertedLayer, tensors: Tensors
) -> float:
    """The error of the written tensors; what a refit or a draw has changed on purpose is taken back first."""
    tensors = dict(tensors)
    if student.refitted_down_DF is not None or plan.options.reinit_share:
        plain = _cut(plan, stored, replace(student, refitted_down_DF=None))
        changed = ("down_proj.weight",) if not plan.options.reinit_share else ("_proj.weight",)
        tensors.update({name: tensor for name, tensor in plain.items() if name.endswith(changed)})
    tensors["mlp.gate.weight"] = torch.zeros_like(tensors["mlp.gate.weight"])
    block = _student_block(plan, layer, tensors, plan.dtype, **fully_active(plan.slicing.routed, plan.slicing.copies))
    return advance_probes(states, teacher, block, plan.dtype, layer)


def _student_block(plan: Plan, layer: int, tensors: Tensors, dtype: torch.dtype, **changes: Any) -> Block:
    final_norm_D = plan.teacher.weights.tensor("model.norm.weight").to(plan.dtype)
    return load_block(plan.student_config, layer, tensors, final_norm_D, dtype, plan.options.device, **changes)
