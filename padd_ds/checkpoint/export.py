"""From a run's checkpoint to a plain Hugging Face folder, one shard in memory at a time."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from padd_ds.checkpoint.layout import STUDENT, WEIGHTS, Checkpoint, choose_checkpoint
from padd_ds.errors import UserError
from padd_ds.files import check_output_free, staged_directory
from padd_ds.hf import DTYPES

SHARD_BYTES = 4 * 2**30
KEPT_IN_FP32 = "e_score_correction_bias"
"""The class keeps the selection bias in fp32 whatever the model's precision."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to."""

    run: Path
    output: Path
    step: int | None = None
    """None: the newest whole checkpoint."""
    dtype: str | None = None
    """None: as trained."""
    overwrite: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What was written."""

    step: int
    tensors: int
    gib: float


def export_run(options: ExportOptions) -> ExportSummary:
    """Write the student of a run's checkpoint to `options.output`, whole or not at all.

    UserError for a run without a checkpoint, a damaged one, tensors that are missing or written twice, and a bias
    that the format has no place for.
    """
    check_output_free(options.output, options.overwrite)
    checkpoint = choose_checkpoint(options.run, options.step)
    if checkpoint.facts.get("bias_target") == "logit":
        raise UserError(
            f"{checkpoint.folder}: trained with balance.target=logit, and the format has no place for a bias "
            "on the logits; train with balance.target=selection"
        )
    checkpoint.verify(checkpoint.files(f"{WEIGHTS}/"))
    with ExitStack() as stack:
        files = _open_weights(checkpoint, stack)
        _check_complete(options.run / STUDENT, set(files), checkpoint)
        with staged_directory(options.output, options.overwrite) as staged:
            _copy_companions(options.run / STUDENT, staged, options.dtype)
            total_bytes = _write_shards(files, staged, options)
            facts = {"run": options.run.name, "step": checkpoint.step, "stage": checkpoint.facts["stage"]}
            (staged / "padd_export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return ExportSummary(step=checkpoint.step, tensors=len(files), gib=total_bytes / 2**30)


def _open_weights(checkpoint: Checkpoint, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> open safetensors file."""
    files: dict[str, Any] = {}
    for path in sorted((checkpoint.folder / WEIGHTS).glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name in files:
                raise UserError(f"{path}: tensor {name} was written by two ranks; the checkpoint is damaged")
            files[name] = file
    return files


def _check_complete(student: Path, names: set[str], checkpoint: Checkpoint) -> None:
    """Every FFN of every layer must be there, and every expert: nothing in safetensors itself would tell."""
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    n_experts, depth = config.get("n_routed_experts", 0), config["num_hidden_layers"]
    n_dense = config.get("first_k_dense_replace", 0) if n_experts else depth
    ffns = [f"model.layers.{layer}.mlp" for layer in range(n_dense)]
    ffns += [f"model.layers.{layer}.mlp.experts.{e}" for layer in range(n_dense, depth) for e in range(n_experts)]
    expected = {f"{ffn}.{projection}_proj.weight" for ffn in ffns for projection in ("gate", "up", "down")}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    if not config.get("tie_word_embeddings", False):
        expected.add("lm_head.weight")
    missing = sorted(expected - names)
    if missing:
        raise UserError(f"{checkpoint.folder}: {len(missing)} tensors are missing, the first is {missing[0]}")


def _copy_companions(student: Path, staged: Path, dtype: str | None) -> None:
    """Config, tokenizer and conversion files; the config names the precision of the weights."""
    for path in student.iterdir():
        shutil.copy2(path, staged / path.name)
    if dtype is not None:
        path = staged / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _write_shards(files: dict[str, Any], staged: Path, options: ExportOptions) -> int:
    shards = list(_plan_shards(files, options.shard_bytes))
    empty = _shared_experts_of_width_0(staged)
    weight_map: dict[str, str] = dict.fromkeys(empty, f"model-00001-of-{len(shards):05d}.safetensors")
    total_bytes = 0
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _cast(files[name].get_tensor(name), name, options.dtype) for name in names}
        save_file(tensors | (empty if number == 1 else {}), staged / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (staged / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total_bytes


def _shared_experts_of_width_0(student: Path) -> dict[str, torch.Tensor]:
    """What the class has in place of shared experts where a student has none; training leaves them out."""
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "glm4_moe" or config["n_shared_experts"]:
        return {}
    width = config["hidden_size"]
    shapes = {"gate": (0, width), "up": (0, width), "down": (width, 0)}
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}_proj.weight": torch.empty(shape)
        for layer in range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])
        for name, shape in shapes.items()
    }


def _plan_shards(files: dict[str, Any], shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many to a shard as fit, by their size in fp32."""
    shard: list[str] = []
    filled = 0
    for name in sorted(files):
        size = 4 * torch.Size(files[name].get_slice(name).get_shape()).numel()
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _cast(tensor: torch.Tensor, name: str, dtype: str | None) -> torch.Tensor:
    return tensor if dtype is None or name.endswith(KEPT_IN_FP32) else tensor.to(DTYPES[dtype])
