"""An existing MoE student gets its router from a dense teacher; its experts stay as they are.

Shapes: W windows, T tokens of a window, D model width (teacher and student may differ), E experts.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from padd_ds.conversion.block import Block, load_block
from padd_ds.conversion.existing_layer import RoutedLayer, StudentRouter, route_layer
from padd_ds.conversion.families import layer_map
from padd_ds.conversion.head import Head, embed, head_rows
from padd_ds.conversion.layer import Ffn
from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.plan import (
    CALIBRATION,
    EVALUATION,
    TEACHER,
    OpenTeacher,
    check_device,
    check_disk,
    check_teacher,
    fingerprint,
    open_teacher,
    plain,
    text_windows,
    tokens_used,
    versions,
    without_padding,
)
from padd_ds.conversion.report import FILE_NAME, PAGE_NAME
from padd_ds.conversion.router import SIGMOID_SLOPE
from padd_ds.conversion.targets import layer_targets, save_targets
from padd_ds.conversion.teacher import TeacherWeights, local_folder, open_weights
from padd_ds.conversion.work import WorkFolder, work_folder
from padd_ds.errors import UserError
from padd_ds.hf import read_config
from padd_ds.seeds import derive_seed

ROUTERS_OF = {
    "qwen3_moe": "mlp.gate",
    "glm4_moe": "mlp.gate",
    "deepseek_v2": "mlp.gate",
    "mixtral": "block_sparse_moe.gate",
}
BIAS = "e_score_correction_bias"
BEFORE, AFTER = "student before", "student"
HEADER_BYTES = 8
COPIED_SUFFIXES = (".json", ".jinja", ".md", ".model", ".py", ".txt")


@dataclass(frozen=True, kw_only=True)
class Existing:
    """A checked pair of a dense teacher and an MoE student, and the texts [W, T] that both read."""

    options: ConversionOptions
    teacher: OpenTeacher
    folder: Path
    config: Any
    weights: TeacherWeights
    windows: dict[str, torch.Tensor]

    @property
    def depth(self) -> int:
        """Layers of the student."""
        return self.config.num_hidden_layers

    @property
    def router(self) -> str:
        """The router's name within a layer."""
        return ROUTERS_OF[self.config.model_type]

    def is_routed(self, layer: int) -> bool:
        """Whether a layer of the student is an MoE layer."""
        return f"model.layers.{layer}.{self.router}.weight" in self.weights.file_of


def convert_existing(options: ConversionOptions, page: Callable[[dict[str, Any]], str] | None = None) -> dict[str, Any]:
    """Write the student at `options.student` with new routers to `options.output`; the figures of the conversion.

    Every other byte of its weights is that of the student. One layer of each model is in memory at a time, and an
    interrupted conversion goes on at the layer it had reached. UserError for anything wrong with the input.
    """
    pair = _open(options)
    seen = {**fingerprint(options, pair.teacher.weights), "student": pair.weights.sha256}
    with work_folder(options.output, seen, options.overwrite) as work:
        states = _sweep(pair, work)
        perplexity = _perplexities(pair, states)
        contents = _publish(pair, work, perplexity)
        if page is not None:
            (work.result / PAGE_NAME).write_text(page(contents), encoding="utf-8")
    return contents


def _open(options: ConversionOptions) -> Existing:
    assert options.student is not None
    check_device(options.device)
    config = read_config(options.student, trust_remote_code=options.trust_remote_code)
    if config.model_type not in ROUTERS_OF:
        raise UserError(
            f"--student {options.student}: model type {config.model_type} is not supported; "
            f"use one of {', '.join(ROUTERS_OF)}"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"--student {options.student}: its weights are quantised; use a checkpoint of plain weights")
    teacher = check_teacher(options)
    if options.router == "centroid" and config.hidden_size != teacher.config.hidden_size:
        raise UserError(
            f"--router centroid needs equal widths, and the teacher's is {teacher.config.hidden_size}, the student's "
            f"{config.hidden_size}; use --router calibrated"
        )
    folder = local_folder(options.student)
    windows = text_windows(options, [teacher.folder, folder])
    norms = ["model.embed_tokens.weight", "model.norm.weight"]
    pair = Existing(
        options=options,
        teacher=open_teacher(teacher),
        folder=folder,
        config=config,
        weights=open_weights(folder, norms, "student"),
        windows=windows,
    )
    if not any(pair.is_routed(layer) for layer in range(pair.depth)):
        raise UserError(f"--student {options.student}: none of its layers has a tensor {pair.router}.weight")
    check_disk(options.output, sum(path.stat().st_size for path in pair.weights.files()))
    return pair


def _sweep(pair: Existing, work: WorkFolder) -> dict[str, torch.Tensor]:
    done = work.layers_done()
    states = work.states_after(done - 1) if done else _first_states(pair)
    for layer in tqdm(range(done, pair.depth), initial=done, total=pair.depth, desc="converting", unit="layer"):
        routed = _convert_layer(pair, layer, states)
        record = {} if routed is None else {**routed.targets.tensors(), **_router_tensors(pair, layer, routed)}
        work.finish_layer(layer, states, record, {"quality": None if routed is None else asdict(routed.quality)})
    return states


def _first_states(pair: Existing) -> dict[str, torch.Tensor]:
    states = {}
    for name, windows_WT in pair.windows.items():
        teacher_WTD = embed(pair.teacher.weights, windows_WT).float()
        student_WTD = embed(pair.weights, windows_WT).float()
        students = (BEFORE, AFTER) if name == EVALUATION else (AFTER,)
        states.update({f"{name}/{TEACHER}": teacher_WTD, **{f"{name}/{who}": student_WTD for who in students}})
    return states


def _convert_layer(pair: Existing, layer: int, states: dict[str, torch.Tensor]) -> RoutedLayer | None:
    """Give layer `layer` its router, where it is an MoE layer, and move all `states` past it.

    The teacher's states stay before the teacher layer that belongs to it: the next layer may share it.
    """
    sources = layer_map(pair.depth, pair.teacher.config.num_hidden_layers)
    for source in range(sources[layer - 1] if layer else 0, sources[layer]):
        _pass_teacher(pair, source, states)
    stored = _tensors_of(pair.weights, layer)
    routed = None
    if pair.is_routed(layer):
        routed = _route(pair, layer, sources[layer], stored, states)
    before = _student_block(pair, layer, stored)
    _move(states, f"{EVALUATION}/{BEFORE}", before)
    if routed is not None:
        after = _student_block(pair, layer, {**stored, **_router_tensors(pair, layer, routed)})
    for name in (CALIBRATION, EVALUATION):
        _move(states, f"{name}/{AFTER}", before if routed is None else after)
    return routed


def _route(
    pair: Existing, layer: int, source: int, stored: dict[str, torch.Tensor], states: dict[str, torch.Tensor]
) -> RoutedLayer:
    device = pair.options.device
    teacher = _teacher_block(pair, source)
    gate_FD, up_FD, down_DF = (getattr(teacher.ffn, f"{part}_proj").weight.data for part in ("gate", "up", "down"))
    teacher_x_SD = student_x_SD = None
    if CALIBRATION in pair.windows:
        teacher_x_BTD = teacher.attend(states[f"{CALIBRATION}/{TEACHER}"])[1]
        student_x_BTD = _student_block(pair, layer, stored).attend(states[f"{CALIBRATION}/{AFTER}"])[1]
        teacher_x_SD = without_padding(pair.windows, teacher_x_BTD).to(device)
        student_x_SD = without_padding(pair.windows, student_x_BTD).to(device)
    student = StudentRouter(
        weight_ED=stored[f"{pair.router}.weight"].to(device, torch.float32),
        x_SD=student_x_SD,
        top_k=pair.config.num_experts_per_tok,
        has_bias=f"{pair.router}.{BIAS}" in stored,
    )
    generator = torch.Generator().manual_seed(derive_seed(pair.options.seed, layer))
    ffn = Ffn(gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF)
    return route_layer(ffn, teacher_x_SD, student, pair.options, generator)


def _router_tensors(pair: Existing, layer: int, routed: RoutedLayer) -> dict[str, torch.Tensor]:
    """The router by its names within the layer, as the student stores it; the intercept only where there is a slot."""
    names = {f"{pair.router}.weight": routed.weight_ED, f"{pair.router}.{BIAS}": SIGMOID_SLOPE * routed.intercept_E}
    stored = {name: f"model.layers.{layer}.{name}" for name in names}
    return {
        name: names[name].to("cpu", pair.weights.dtype(whole))
        for name, whole in stored.items()
        if whole in pair.weights.file_of
    }


def _tensors_of(weights: TeacherWeights, layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): weights.tensor(name) for name in weights.file_of if name.startswith(prefix)}


def _student_block(pair: Existing, layer: int, tensors: Mapping[str, torch.Tensor]) -> Block:
    norm_D = pair.weights.tensor("model.norm.weight")
    return load_block(pair.config, layer, tensors, norm_D, torch.float32, pair.options.device)


def _teacher_block(pair: Existing, layer: int) -> Block:
    weights = pair.teacher.weights
    norm_D = weights.tensor("model.norm.weight")
    tensors = _tensors_of(weights, layer)
    return load_block(pair.teacher.config, layer, tensors, norm_D, torch.float32, pair.options.device)


def _pass_teacher(pair: Existing, layer: int, states: dict[str, torch.Tensor]) -> None:
    if pair.windows:
        block = _teacher_block(pair, layer)
        for name in pair.windows:
            _move(states, f"{name}/{TEACHER}", block)


def _move(states: dict[str, torch.Tensor], name: str, block: Block) -> None:
    if name in states:
        states[name] = block.forward(states[name])


def _perplexities(pair: Existing, states: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the teacher, and of the student with its own router and with the new one."""
    if EVALUATION not in pair.windows:
        return {}
    depth = pair.teacher.config.num_hidden_layers
    for layer in range(layer_map(pair.depth, depth)[-1], depth):
        _pass_teacher(pair, layer, states)
    last = _student_block(pair, pair.depth - 1, _tensors_of(pair.weights, pair.depth - 1))
    of_teacher = (pair.teacher.weights, pair.teacher.config, _teacher_block(pair, depth - 1))
    of_student = (pair.weights, pair.config, last)
    found = {}
    for who, (weights, config, block) in {TEACHER: of_teacher, AFTER: of_student, BEFORE: of_student}.items():
        head = Head(head_rows(weights, config), config.vocab_size, pair.options.device)
        normed_BTD = block.normalise(states[f"{EVALUATION}/{who}"], None)
        found[who] = exp(head.nll_mean_nats(normed_BTD, pair.windows[EVALUATION]))
    return found


def _publish(pair: Existing, work: WorkFolder, perplexity: dict[str, float]) -> dict[str, Any]:
    """Copy the student, put the new routers into the copy, add targets and figures."""
    records = {layer: work.record_of(layer) for layer in range(pair.depth) if pair.is_routed(layer)}
    weight_files = {path.name for path in pair.weights.files()}
    for path in pair.folder.iterdir():
        if path.name in weight_files or path.suffix in COPIED_SUFFIXES:
            shutil.copyfile(path, work.result / path.name)
    for layer, (tensors, _) in records.items():
        for name in (f"{pair.router}.weight", f"{pair.router}.{BIAS}"):
            if name in tensors:
                whole = f"model.layers.{layer}.{name}"
                overwrite_tensor(work.result / pair.weights.file_of[whole], whole, tensors[name])
    depth = pair.teacher.config.num_hidden_layers
    save_targets(
        work.result,
        [layer_targets(tensors) for tensors, _ in records.values()],
        [layer_map(pair.depth, depth)[layer] for layer in records],
        prior_temperature=pair.options.prior_temperature,
        cluster=pair.options.cluster,
        router=pair.options.router,
    )
    contents = _contents(pair, perplexity, [facts["quality"] for _, facts in records.values()])
    (work.result / FILE_NAME).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return contents


def overwrite_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Replace the values of one tensor in a safetensors file by others of the same shape and dtype."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    with path.open("r+b") as file:
        header_bytes = int.from_bytes(file.read(HEADER_BYTES), "little")
        entry = json.loads(file.read(header_bytes))[name]
        start, stop = entry["data_offsets"]
        if entry["shape"] != list(tensor.shape) or stop - start != len(data):
            raise ValueError(f"{name}: {list(tensor.shape)} does not take the place of {entry['shape']}")
        file.seek(HEADER_BYTES + header_bytes + start)
        file.write(data)


def _contents(pair: Existing, perplexity: dict[str, float], layers: list[dict[str, Any]]) -> dict[str, Any]:
    options = pair.options
    return {
        "teacher": {
            "source": options.teacher,
            "model_type": pair.teacher.config.model_type,
            "sha256": pair.teacher.weights.sha256,
        },
        "student": {"source": options.student, "model_type": pair.config.model_type, "sha256": pair.weights.sha256},
        "versions": versions(),
        "options": {name: plain(value) for name, value in asdict(options).items()},
        "tokens_used": tokens_used(pair.windows),
        "perplexity": perplexity,
        "layers": layers,
        "controls": {},
    }
