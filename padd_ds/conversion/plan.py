"""Everything about a conversion that is checked and known before its first layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import padd_ds
from padd_ds.conversion.calibration import PADDING, TextFile, token_rows, token_windows
from padd_ds.conversion.companions import check_tokenizer
from padd_ds.conversion.costs import model_costs
from padd_ds.conversion.exactness import probe_tokens
from padd_ds.conversion.families import (
    Family,
    check_supported,
    layer_map,
    student_config,
    teacher_tensors,
)
from padd_ds.conversion.options import ConversionOptions, Slicing
from padd_ds.conversion.teacher import (
    TeacherWeights,
    check_shapes,
    check_tied,
    local_folder,
    open_weights,
)
from padd_ds.conversion.work import partial_folder
from padd_ds.errors import UserError
from padd_ds.files import free_bytes, sha256_of
from padd_ds.hf import DTYPES, load_tokenizer, read_config

STUDENT, TEACHER = "student", "teacher"
CALIBRATION, EVALUATION = "calibration", "evaluation"
CONTROLS = ("random", "contiguous")
DISK_MARGIN = 1.02
NOT_IN_FINGERPRINT = ("output", "overwrite", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher whose config has been checked, and its weights where they have been."""

    folder: Path
    config: Any
    family: Family


@dataclass(frozen=True, kw_only=True)
class OpenTeacher(Teacher):
    """A teacher whose weights have been checked."""

    weights: TeacherWeights


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion whose input has been checked.

    windows: token ids [W, T] of the `probe`, and of the `calibration` and `evaluation` texts where given; PADDING may
        stand at the end of the rows of `calibration`.
    variants: the options of the student, and of the controls that are evaluated beside it.
    """

    options: ConversionOptions
    teacher: OpenTeacher
    slicing: Slicing
    dtype_name: str
    student_config: Any
    windows: dict[str, torch.Tensor]
    variants: dict[str, ConversionOptions]

    @property
    def dtype(self) -> torch.dtype:
        """Of the written weights."""
        return DTYPES[self.dtype_name]

    @property
    def depth(self) -> int:
        """Layers of the student."""
        return self.student_config.num_hidden_layers

    @property
    def n_shards(self) -> int:
        """Embedding, every layer, final norm with head."""
        return self.depth + 2

    @property
    def teacher_layers(self) -> list[int]:
        """Teacher layer of every student layer."""
        return layer_map(self.depth, self.teacher.config.num_hidden_layers)


def make_plan(options: ConversionOptions) -> Plan:
    """Check all of the input; UserError for whatever is wrong with it, the texts before the many weights."""
    check_device(options.device)
    teacher = check_teacher(options)
    config, family = teacher.config, teacher.family
    assert options.experts is not None and options.top_k is not None
    slicing = Slicing(
        width=config.intermediate_size,
        experts=options.experts,
        shared=options.shared_experts,
        top_k=options.top_k,
        copies=options.replicate,
    )
    if options.dense_layers >= config.num_hidden_layers:
        raise UserError(
            f"--dense-layers is {options.dense_layers}; it must be below the {config.num_hidden_layers} layers of "
            f"{options.teacher}"
        )
    slicing.check_overcluster(options.overcluster)
    windows = {"probe": probe_tokens(config.vocab_size), **text_windows(options, [teacher.folder])}
    teacher = open_teacher(teacher)
    dtype_name = options.dtype or _dtype_name(teacher.weights)
    slicing.check_alignment(DTYPES[dtype_name].itemsize)
    plan = Plan(
        options=options,
        teacher=teacher,
        slicing=slicing,
        dtype_name=dtype_name,
        student_config=student_config(config, family, slicing, dtype_name, options.dense_layers),
        windows=windows,
        variants=_variants(options),
    )
    check_tokenizer(teacher.folder, plan.student_config, options.trust_remote_code)
    check_disk(options.output, _bytes_needed(plan))
    return plan


def check_teacher(options: ConversionOptions) -> Teacher:
    """The teacher as its config tells it, with its weights not yet looked at."""
    config = read_config(options.teacher, trust_remote_code=options.trust_remote_code)
    family = check_supported(config, options.teacher)
    return Teacher(folder=local_folder(options.teacher), config=config, family=family)


def open_teacher(teacher: Teacher) -> OpenTeacher:
    """Check the weights of a teacher; reads them all."""
    weights = open_weights(teacher.folder, teacher_tensors(teacher.config, teacher.family))
    check_shapes(teacher.config, teacher.family, weights)
    check_tied(teacher.config, weights)
    return OpenTeacher(folder=teacher.folder, config=teacher.config, family=teacher.family, weights=weights)


def fingerprint(options: ConversionOptions, weights: TeacherWeights) -> dict[str, Any]:
    """What the bytes of a result depend on."""
    texts = [path for path in (options.calibration, options.evaluation) if path is not None]
    return {
        "options": {name: plain(value) for name, value in asdict(options).items() if name not in NOT_IN_FINGERPRINT},
        "teacher": weights.sha256,
        "texts": {str(path): sha256_of(path) for path in texts},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    return {"padd_ds": padd_ds.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def plain(value: Any) -> Any:
    """A value that JSON can hold."""
    return str(value) if isinstance(value, Path) else value


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not usable here ({str(error).splitlines()[0]}); use cpu") from error


def _dtype_name(weights: TeacherWeights) -> str:
    stored = weights.dtype("model.norm.weight")
    for name, dtype in DTYPES.items():
        if dtype == stored:
            return name
    raise UserError(f"{weights.folder}: weights are stored as {stored}; pass --dtype")


def text_windows(options: ConversionOptions, folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Token ids [W, T] of the calibration and evaluation texts; UserError unless all tokenizers give the same."""
    texts = {
        CALIBRATION: (options.calibration, options.calibration_part, options.calibration_tokens),
        EVALUATION: (options.evaluation, None, options.evaluation_tokens),
    }
    windows: dict[str, torch.Tensor] = {}
    for name, (path, part, n_tokens) in texts.items():
        if path is None:
            continue
        template = options.calibration_template
        file = TextFile(
            path=path, field=options.calibration_field, part=part, template=template, fractions=options.part_fractions
        )
        cut = token_rows if name == CALIBRATION and file.holds_rows else token_windows
        for folder in folders:
            tokenizer = load_tokenizer(str(folder), trust_remote_code=options.trust_remote_code)
            found_WT = cut(file, f"--{name}-tokens", tokenizer, n_tokens)
            if not torch.equal(windows.setdefault(name, found_WT), found_WT):
                raise UserError(
                    f"{folder}: its tokenizer reads {path} differently from that of {folders[0]}; "
                    "teacher and student must share their tokens"
                )
    return windows


def without_padding(windows: Mapping[str, torch.Tensor], states_WTD: torch.Tensor) -> torch.Tensor:
    """[S, D]: what is there of the calibration windows' states [W, T, D] without the padding."""
    return states_WTD[windows[CALIBRATION] != PADDING]


def tokens_used(windows: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """How many tokens of every text there are."""
    return {name: int((ids_WT != PADDING).sum()) for name, ids_WT in windows.items()}


def _variants(options: ConversionOptions) -> dict[str, ConversionOptions]:
    controls = CONTROLS if options.controls else ()
    return {STUDENT: options, **{cluster: replace(options, cluster=cluster) for cluster in controls}}


def check_disk(output: Path, n_bytes: int) -> None:
    """UserError where `n_bytes` more than an interrupted conversion has left there would not fit beside `output`."""
    partial = partial_folder(output)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    needed, free = int(DISK_MARGIN * n_bytes), free_bytes(output) + there
    if free < needed:
        raise UserError(
            f"{output}: the student needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "free some space or choose another output"
        )


def _bytes_needed(plan: Plan) -> int:
    """Of the result, with the states of two layers beside it."""
    _, student = model_costs(plan.teacher.config, plan.teacher.family, plan.slicing, plan.options.dense_layers)
    token_bytes = plan.teacher.config.hidden_size * torch.float32.itemsize
    texts = sum(windows.numel() for name, windows in plan.windows.items() if name != "probe")
    tokens = 5 * plan.windows["probe"].numel() + texts * (1 + len(plan.variants))
    return student.total_parameters * plan.dtype.itemsize + 2 * token_bytes * tokens
