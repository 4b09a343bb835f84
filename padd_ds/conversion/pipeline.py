"""The conversion from end to end: check, calibrate, cut layer by layer, prove, publish."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from padd_ds.conversion.calibration import capture_ffn_inputs, read_texts, token_windows
from padd_ds.conversion.companions import (
    copy_tokenizer,
    write_card,
    write_generation_config,
)
from padd_ds.conversion.exactness import (
    Exactness,
    Reference,
    check_student,
    teacher_reference,
)
from padd_ds.conversion.families import (
    Family,
    check_supported,
    layer_map,
    student_config,
    teacher_tensors,
)
from padd_ds.conversion.layer import ConvertedLayer, Ffn, convert_layer
from padd_ds.conversion.options import ConversionOptions, Slicing
from padd_ds.conversion.report import write_report
from padd_ds.conversion.targets import LayerTargets, save_targets
from padd_ds.conversion.teacher import TeacherWeights, local_folder, open_weights
from padd_ds.conversion.writer import (
    ShardWriter,
    attention_tensors,
    moe_tensors,
    outer_tensors,
)
from padd_ds.errors import UserError
from padd_ds.files import check_output_free, staged_directory
from padd_ds.hf import DTYPES, load_causal_lm, load_tokenizer, read_config

SEED_STRIDE = 1_000_003  # keeps the streams of different layers and seeds apart


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A checked teacher: its config, family and where its weights lie."""

    folder: Path
    config: Any
    family: Family
    weights: TeacherWeights


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion found; the same numbers stand in `padd_conversion.json`."""

    output: Path
    exactness: Exactness
    layers: list[dict[str, float | None]]
    contents: dict[str, Any]


def convert(options: ConversionOptions) -> ConversionReport:
    """Turn a dense teacher into a `Glm4MoeForCausalLM` folder at `options.output`.

    UserError for anything wrong with the input, before any work, and for a student that is not equal
    to its teacher. The output is whole or absent.
    """
    started_s = time.monotonic()
    check_output_free(options.output, options.overwrite)
    _check_device(options.device)
    teacher, slicing = open_teacher(options)
    dtype_name = options.dtype or _dtype_name(teacher.weights)
    slicing.check_alignment(DTYPES[dtype_name].itemsize)
    windows_WT = _calibration_windows(options, teacher)
    reference, inputs = _run_teacher(options, teacher, windows_WT, DTYPES[dtype_name])
    with staged_directory(options.output, overwrite=options.overwrite) as staged:
        student_config(teacher.config, teacher.family, slicing, dtype_name).save_pretrained(staged)
        write_generation_config(teacher.folder, staged, teacher.config)
        copy_tokenizer(teacher.folder, staged, options.trust_remote_code)
        write_card(staged, options, slicing)
        layers = _write_weights(options, teacher, slicing, inputs, staged, DTYPES[dtype_name])
        exactness = check_student(staged, reference, DTYPES[dtype_name], options.device)
        contents = write_report(
            staged,
            options=options,
            dtype_name=dtype_name,
            config=teacher.config,
            family=teacher.family,
            slicing=slicing,
            weights=teacher.weights,
            layers=layers,
            exactness=exactness,
            calibration_tokens=0 if windows_WT is None else windows_WT.numel(),
            seconds=time.monotonic() - started_s,
        )
    return ConversionReport(output=options.output, exactness=exactness, layers=layers, contents=contents)


def open_teacher(options: ConversionOptions) -> tuple[Teacher, Slicing]:
    """Check everything about the teacher that can be checked without running it."""
    config = read_config(options.teacher, trust_remote_code=options.trust_remote_code)
    family = check_supported(config, options.teacher)
    slicing = Slicing(
        width=config.intermediate_size,
        experts=options.experts,
        shared=options.shared_experts,
        top_k=options.top_k,
    )
    folder = local_folder(options.teacher)
    weights = open_weights(folder, teacher_tensors(config, family))
    return Teacher(folder=folder, config=config, family=family, weights=weights), slicing


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not usable here ({str(error).splitlines()[0]}); use cpu") from error


def _dtype_name(weights: TeacherWeights) -> str:
    stored = weights.tensor("model.norm.weight").dtype
    for name, dtype in DTYPES.items():
        if dtype == stored:
            return name
    raise UserError(f"{weights.folder}: weights are stored as {stored}; pass --dtype")


def _calibration_windows(options: ConversionOptions, teacher: Teacher) -> torch.Tensor | None:
    if options.calibration is None:
        return None
    tokenizer = load_tokenizer(str(teacher.folder), trust_remote_code=options.trust_remote_code)
    texts = read_texts(options.calibration, options.calibration_field, options.calibration_part)
    return token_windows(options.calibration, texts, tokenizer, options.calibration_tokens)


def _run_teacher(
    options: ConversionOptions, teacher: Teacher, windows_WT: torch.Tensor | None, dtype: torch.dtype
) -> tuple[Reference, list[torch.Tensor] | None]:
    """Everything that the whole teacher is needed in memory for; it is freed before the student is written."""
    model = load_causal_lm(str(teacher.folder), torch.float32, trust_remote_code=options.trust_remote_code)
    model = model.to(options.device)
    stored = teacher.weights.tensor("model.norm.weight").dtype
    inputs = None if windows_WT is None else capture_ffn_inputs(model, windows_WT, stored)
    return teacher_reference(model, dtype), inputs


def _write_weights(
    options: ConversionOptions,
    teacher: Teacher,
    slicing: Slicing,
    inputs: list[torch.Tensor] | None,
    staged: Path,
    dtype: torch.dtype,
) -> list[dict[str, float | None]]:
    """Write the weights and targets to `staged`; the quality of every layer."""
    depth = teacher.config.num_hidden_layers
    teacher_layers = layer_map(depth, depth)
    writer = ShardWriter(staged)
    for name, tensor in outer_tensors(teacher.weights, teacher.config.tie_word_embeddings):
        writer.add(name, tensor.to(dtype))
    targets: list[LayerTargets] = []
    quality: list[dict[str, float | None]] = []
    for layer, source in enumerate(tqdm(teacher_layers, desc="converting", unit="layer")):
        for name, tensor in attention_tensors(teacher.weights, teacher.family, source, layer):
            writer.add(name, tensor.to(dtype))
        ffn = _read_ffn(teacher.weights, source)
        x_SD = None if inputs is None else inputs[source].to(options.device, torch.float32)
        converted = _convert_on(options, ffn, x_SD, slicing, layer)
        for name, tensor in moe_tensors(layer, ffn, converted.members_NG.cpu(), converted.router_ED):
            keep = name.endswith("e_score_correction_bias")  # the class keeps this one in fp32
            writer.add(name, tensor if keep else tensor.to(dtype))
        targets.append(converted.targets)
        quality.append(converted.report())
    writer.close()
    save_targets(
        staged,
        targets,
        teacher_layers,
        prior_temperature=options.prior_temperature,
        cluster=options.cluster,
        router=options.router,
    )
    return quality


def _convert_on(
    options: ConversionOptions,
    ffn: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    x_SD: torch.Tensor | None,
    slicing: Slicing,
    layer: int,
) -> ConvertedLayer:
    gate_FD, up_FD, down_DF = (matrix.to(options.device, torch.float32) for matrix in ffn)
    generator = torch.Generator().manual_seed(options.seed * SEED_STRIDE + layer)
    return convert_layer(Ffn(gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF), x_SD, slicing, options, generator)


def _read_ffn(weights: TeacherWeights, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prefix = f"model.layers.{layer}.mlp"
    gate, up, down = (weights.tensor(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down"))
    return gate, up, down
