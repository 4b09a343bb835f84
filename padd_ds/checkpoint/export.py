"""From a run's checkpoint to a folder that other programs load, whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tqdm import tqdm

from padd_ds.checkpoint.card import licence, model_card
from padd_ds.checkpoint.facts import EXPORT, read_facts
from padd_ds.checkpoint.handover import Compared, Weights, check_export, trained, why_unchecked
from padd_ds.checkpoint.layout import STAGE_STATE, STUDENT, WEIGHTS, Checkpoint, choose_checkpoint
from padd_ds.checkpoint.megatron_layout import megatron_pieces
from padd_ds.checkpoint.megatron_settings import check_megatron, write_settings
from padd_ds.checkpoint.weights import EMBEDDING, SavedWeights, locate, saved_weights
from padd_ds.conversion.card import CARD_NAME
from padd_ds.errors import UserError
from padd_ds.files import check_output_free, staged_directory
from padd_ds.hf import read_config

SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to."""

    run: Path
    output: Path
    step: int | None = None
    """None: the newest whole checkpoint."""
    dtype: str | None = None
    """None: as trained."""
    format: str = "hf"
    """A key of WRITERS."""
    check: bool = True
    """Compare the logits of what is exported with those of the live student."""
    overwrite: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What was written; `check` says what came of the comparison with the live student."""

    step: int
    tensors: int
    gib: float
    check: str


def export_run(options: ExportOptions) -> ExportSummary:
    """Write the student of a run's checkpoint to `options.output`, whole or not at all.

    UserError for a run without a checkpoint, a damaged one, tensors that are missing or written twice, a model that
    the format has no place for, and weights that are not those of the live student.
    """
    check_output_free(options.output, options.overwrite)
    checkpoint = choose_checkpoint(options.run, options.step)
    if checkpoint.facts.get("bias_target") == "logit":
        raise UserError(
            f"{checkpoint.folder}: trained with balance.target=logit, and the format has no place for a bias "
            "on the logits; train with balance.target=selection"
        )
    config = json.loads((options.run / STUDENT / "config.json").read_text(encoding="utf-8"))
    known = read_facts(options.run, checkpoint)
    weights = saved_weights(checkpoint, config, options.dtype)
    if options.format == "megatron":
        check_megatron(options.run / STUDENT, weights.path_of)
    checkpoint.verify([*checkpoint.files(f"{WEIGHTS}/"), STAGE_STATE])
    with staged_directory(options.output, options.overwrite) as staged:
        _copy_companions(options.run / STUDENT, staged, options.dtype)
        WRITERS[options.format](weights, staged, options)
        told = _check(checkpoint, staged, weights, options) if options.check else "not checked"
        facts = {"run": options.run.name, "step": checkpoint.step, "stage": checkpoint.facts["stage"], "check": told}
        facts["earlier"] = known.earlier
        (staged / EXPORT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for path in licence(known).files:
            shutil.copyfile(path, staged / path.name)
        card = model_card(options.output.name, known, config, weights, told, options.format)
        (staged / CARD_NAME).write_text(card, encoding="utf-8")
    return ExportSummary(step=checkpoint.step, tensors=len(weights.names), gib=weights.total_bytes / 2**30, check=told)


def _copy_companions(student: Path, staged: Path, dtype: str | None) -> None:
    """Config, tokenizer and conversion files; the config names the precision of the weights."""
    for path in student.iterdir():
        shutil.copy2(path, staged / path.name)
    if dtype is not None:
        path = staged / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _check(checkpoint: Checkpoint, staged: Path, saved: SavedWeights, options: ExportOptions) -> str:
    unchecked = why_unchecked(checkpoint, staged)
    if unchecked is not None:
        return f"not checked against the live student: {unchecked}"
    weights: Weights = trained(saved)  # of which _write_megatron has read back each
    if options.format == "hf":
        written = SavedWeights(*locate(sorted(staged.glob("model-*.safetensors"))), empty={}, dtype=None)
        weights = Compared(saved, written)
    off = check_export(checkpoint, staged, weights)
    return f"its logits are off those of the live student by {off:.2g} of their mean size"


def _write_hf(weights: SavedWeights, staged: Path, options: ExportOptions) -> None:
    shards = list(_plan_shards(weights, options.shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(tqdm(shards, desc="writing", unit="shard", dynamic_ncols=True), start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights.tensor(name) for name in names}, staged / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": weights.total_bytes}, "weight_map": weight_map}
    (staged / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _plan_shards(weights: SavedWeights, shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many to a shard as fit, by their size in fp32."""
    shard: list[str] = []
    filled = 0
    for name in weights.names:
        size = 4 * weights.stored[name].numel()
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _write_megatron(weights: SavedWeights, staged: Path, options: ExportOptions) -> None:
    # Imported late: it takes seconds, and most exports do without.
    from padd_ds.checkpoint.megatron import check_written, write_checkpoint

    config = read_config(str(staged))
    folder = write_settings(staged, config, weights.meta(EMBEDDING).dtype)
    pieces = list(megatron_pieces(config, weights.path_of))
    write_checkpoint(folder, pieces, weights)
    if options.check:
        check_written(folder, pieces, weights)


WRITERS: dict[str, Callable[[SavedWeights, Path, ExportOptions], None]] = {
    "hf": _write_hf,
    "megatron": _write_megatron,
}
