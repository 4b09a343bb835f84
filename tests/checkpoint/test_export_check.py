"""What is exported is the live student, or nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from padd_ds.checkpoint import export
from padd_ds.checkpoint.export import ExportOptions, ExportSummary, export_run
from padd_ds.checkpoint.handover import layerwise_logits
from padd_ds.checkpoint.probe import PROBE
from padd_ds.checkpoint.weights import SavedWeights, locate
from padd_ds.engine.handover import probe_logits
from padd_ds.errors import UserError
from tests.checkpoint.made_up_run import SIZES, layer_shapes, random_student, seal, spread, write_large_run, write_run
from tools.tiny_model import make_tiny_model

DENSE = {name: SIZES[name] for name in SIZES if "expert" not in name and "dense" not in name and name != "head_dim"}
EXPERT = "model.layers.1.mlp.experts.{}.down_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
Tensors = dict[str, torch.Tensor]


def run_export(folder: Path, **options: Any) -> ExportSummary:
    return export_run(ExportOptions(run=folder / "run", output=folder / "out", **options))


@pytest.mark.parametrize(
    "model",
    [
        lambda: random_student(first_k_dense_replace=1, attention_bias=True),
        lambda: random_student(use_qk_norm=True, n_shared_experts=0),
        lambda: spread(LlamaForCausalLM(LlamaConfig(**DENSE))),
        lambda: spread(make_tiny_model()),
    ],
    ids=["student", "no shared experts", "dense", "dense, tied"],
)
def test_a_good_export_passes(model: Callable[[], Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", model())
    summary = run_export(tmp_path)
    off = float(summary.check.split(" by ")[1].split()[0])
    assert off < 1e-6 and summary.check.startswith("its logits are off those of the live student")
    assert json.loads((tmp_path / "out" / "padd_export.json").read_text())["check"] == summary.check


def test_layer_by_layer_gives_the_models_own_logits(tmp_path: Path) -> None:
    model = random_student(first_k_dense_replace=1)
    write_run(tmp_path / "run", model)
    run_export(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected_TV = probe_logits(again, again.config.vocab_size, torch.device("cpu"))
    paths = (tmp_path / "out").glob("*.safetensors")
    found_TV = layerwise_logits(again.config, SavedWeights(*locate(paths), empty={}, dtype=None))
    torch.testing.assert_close(found_TV, expected_TV, rtol=1e-5, atol=1e-5)
    assert found_TV.shape == (16, 96) and found_TV.std() > 0.1


def swap_experts(tensors: Tensors) -> Tensors:
    return tensors | {EXPERT.format(0): tensors[EXPERT.format(1)], EXPERT.format(1): tensors[EXPERT.format(0)]}


def drop_bias(tensors: Tensors) -> Tensors:
    return tensors | {BIAS: torch.zeros_like(tensors[BIAS])}


def shift_embedding(tensors: Tensors) -> Tensors:
    return tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].roll(1, dims=0)}


def lose_a_value(tensors: Tensors) -> Tensors:
    tensors["lm_head.weight"][3, 0] = torch.nan
    return tensors


@pytest.mark.parametrize(
    ("spoil", "victim"),
    [(swap_experts, "experts"), (drop_bias, "e_score"), (shift_embedding, "embed_tokens"), (lose_a_value, "lm_head")],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_file_that_is_not_the_student_is_not_handed_over(
    spoil: Callable[[Tensors], Tensors], victim: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(tensors: Tensors, path: Path, **arguments: Any) -> None:
        save_file(spoil({name: tensor.clone() for name, tensor in tensors.items()}), path, **arguments)

    write_run(tmp_path / "run", random_student())
    monkeypatch.setattr(export, "save_file", spoiled)
    with pytest.raises(UserError, match=rf"{victim}.* was not written as it was trained"):
        run_export(tmp_path, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert run_export(tmp_path, check=False).check == "not checked"
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("export_format", ["hf", "megatron"])
@pytest.mark.parametrize(("layer", "spoil"), [(1, swap_experts), (2, drop_bias)])
def test_a_checkpoint_that_is_not_the_student_is_not_exported(
    layer: int, spoil: Callable[[Tensors], Tensors], export_format: str, tmp_path: Path
) -> None:
    if export_format == "megatron":
        pytest.importorskip("megatron.core")
    write_run(tmp_path / "run", random_student())
    path = tmp_path / "run" / "checkpoints" / "step_1" / "weights" / f"layer_{layer}.rank_00000.safetensors"
    save_file(spoil(load_file(path)), path)
    seal(tmp_path / "run")
    with pytest.raises(UserError, match="step_1: logits of its weights are off those of the live student"):
        run_export(tmp_path, format=export_format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_held_against_the_trained_ones(dtype: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_student())
    off = float(run_export(tmp_path, dtype=dtype).check.split(" by ")[1].split()[0])
    assert off < 1e-6


def test_a_student_trained_in_bf16_passes(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_student(), torch.bfloat16)
    off = float(run_export(tmp_path).check.split(" by ")[1].split()[0])
    assert 1e-4 < off < 0.2


def test_what_cannot_be_checked_is_told(tmp_path: Path) -> None:
    settings = {name: DENSE[name] for name in DENSE if name != "partial_rotary_factor"}
    write_run(tmp_path / "run", spread(SmolLM3ForCausalLM(SmolLM3Config(**settings))))
    assert "not checked against the live student: only glm4_moe" in run_export(tmp_path).check


def test_a_checkpoint_without_logits_is_exported_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_student())
    stage = tmp_path / "run" / "checkpoints" / "step_1" / "stage.safetensors"
    assert PROBE in load_file(stage)
    save_file({"other": torch.zeros(1)}, stage)
    seal(tmp_path / "run")
    assert "kept no logits" in run_export(tmp_path).check


def peak_mib() -> float:
    """Largest resident size since the last call, of anonymous and mapped memory together."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib / 1024


LARGE = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_hidden_layers": 12,
    "vocab_size": 2048,
}


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large_run(tmp_path_factory.mktemp("large") / "run", torch.float32, **LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("export_format", ["hf", "megatron"])
def test_a_layer_and_a_shard_are_all_that_is_in_memory(export_format: str, large_run: Path, tmp_path: Path) -> None:
    if export_format == "megatron":
        pytest.importorskip("megatron.core")
        from padd_ds.checkpoint import megatron  # noqa: F401 (what it takes by itself is no matter here)
    (tmp_path / "run").symlink_to(large_run)
    shapes = layer_shapes(AutoConfig.from_pretrained(large_run / "student"))
    layer_mib = sum(torch.Size(shape).numel() for shape in shapes.values()) / 2**18
    shard_mib = 64
    peak_mib()
    before_mib = peak_mib()
    summary = run_export(tmp_path, format=export_format, shard_bytes=shard_mib * 2**20)
    # A layer of the class, the tensors that it is made of, those they are compared with, and what its loader needs.
    assert peak_mib() - before_mib < shard_mib + 4 * layer_mib < summary.gib * 2**10 * 0.6
