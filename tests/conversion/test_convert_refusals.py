"""Bad input to padd-convert: exit code 2, one line, nothing left behind."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config

from padd_ds import convert
from padd_ds.conversion import plan, sweep, work
from padd_ds.conversion.block import Block
from tests.conversion.tiny_teachers import make_teacher

Arguments = dict[str, Any]


@pytest.fixture
def refused(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> Callable[..., str]:
    """Run the command with a good command line changed by keyword; the one line it says when it refuses."""

    def run(**changes: Any) -> str:
        arguments: Arguments = {
            "teacher": llama_teacher,
            "output": tmp_path / "out/student",
            "experts": 8,
            "shared_experts": 2,
            "top_k": 3,
            "calibration": calibration_file,
            "calibration_tokens": 512,
        }
        arguments.update(changes)
        flags = [(f"--{name.replace('_', '-')}", value) for name, value in arguments.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["padd-convert", *(str(word) for flag in flags for word in flag)])
        with pytest.raises(SystemExit) as exit_info:
            convert.cli()
        assert exit_info.value.code == 2
        assert "output" in changes or list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*")) == []
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return run


def damaged_teacher(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def test_missing_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no such folder" in refused(teacher=tmp_path / "absent")


def test_not_a_causal_language_model(refused: Callable[..., str], tmp_path: Path) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    assert "not a causal language model" in refused(teacher=tmp_path / "bert")


def test_unsupported_family(refused: Callable[..., str], tmp_path: Path) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    assert "model type gpt2 is not supported; use one of llama" in refused(teacher=tmp_path / "gpt2")


def test_truncated_weights(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    weights = (teacher / "model.safetensors").read_bytes()
    (teacher / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors: truncated or damaged" in refused(teacher=teacher)


def test_tensor_with_nan_is_named(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    assert "tensor model.layers.1.mlp.up_proj.weight (layer 1) holds NaN" in refused(teacher=teacher)


def test_missing_tensor_is_named(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    weights = load_file(teacher / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    assert "tensor model.layers.0.self_attn.q_proj.weight is missing" in refused(teacher=teacher)


def test_missing_shard_is_named(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "shard model-00001-of-00002.safetensors" in refused(teacher=teacher)


def test_index_at_odds_with_its_shards(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    names = list(load_file(teacher / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names[1:], "model.safetensors")}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"tensor {names[0]} is not named in model.safetensors.index.json" in refused(teacher=teacher)


def test_quantised_teacher(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert "quantization_config is set (fp8)" in refused(teacher=teacher)


def test_config_of_another_model(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    message = refused(teacher=teacher)
    assert "tensor model.layers.0.mlp.gate_proj.weight is [64, 32], and config.json asks for [128, 32]" in message


def test_head_that_is_not_the_embedding_it_is_tied_to(
    refused: Callable[..., str], tmp_path: Path, llama_teacher: Path
) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    assert "tie_word_embeddings is true in config.json, and lm_head.weight differs" in refused(teacher=teacher)


def test_weights_that_are_not_safetensors(refused: Callable[..., str], tmp_path: Path, llama_teacher: Path) -> None:
    teacher = damaged_teacher(tmp_path / "teacher", llama_teacher)
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    assert "save the teacher as safetensors" in refused(teacher=teacher)


def test_more_experts_chosen_than_routed(refused: Callable[..., str]) -> None:
    assert "--top-k is 7; it must lie between 1 and the 6 routed experts" in refused(top_k=7)


def test_width_that_the_experts_do_not_divide(refused: Callable[..., str]) -> None:
    message = refused(experts=6, shared_experts=1)
    assert "does not divide the teacher's FFN width 64" in message
    assert message.endswith("counts that work in every dtype: 4, 8")


def test_small_clusters_that_do_not_fill_a_slice(refused: Callable[..., str]) -> None:
    assert "--overcluster is 3, which does not divide the 8 neurons of a slice" in refused(overcluster=3)


def test_no_layer_left_to_cut(refused: Callable[..., str]) -> None:
    assert "--dense-layers is 2; it must be below the 2 layers" in refused(dense_layers=2)


def test_slices_too_thin_for_grouped_products(refused: Callable[..., str]) -> None:
    assert "slices of 2 neurons" in refused(experts=32)


@pytest.mark.parametrize("shared", [0, 8, 7])
def test_shared_experts_must_leave_routed_ones(refused: Callable[..., str], shared: int) -> None:
    assert "--shared-experts" in refused(shared_experts=shared, top_k=1)


def test_missing_calibration_names_both_options(refused: Callable[..., str]) -> None:
    message = refused(calibration=None, cluster="weights", router="calibrated")
    assert "--cluster weights" in message
    assert "--router calibrated" in message
    assert "--calibration is missing" in refused(calibration=None, cluster="activations", router="centroid")


def test_calibration_file_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "absent.txt: no such file" in refused(calibration=tmp_path / "absent.txt")


def test_existing_output_is_kept(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("kept")
    assert "already exists" in refused(output=tmp_path / "mine")
    assert (tmp_path / "mine/file").read_text() == "kept"


def test_full_disk(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(work, "save_file", full)
    message = refused(output=tmp_path / "full/student")
    assert "the disk is full" in message
    assert "stays in" in message
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".student.partial"]


def test_too_little_disk_is_found_before_writing(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda path: 1000)
    assert "the student needs 0.0 GiB and 0.0 GiB are free" in refused()


def test_wrong_student_names_the_first_differing_layer(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = sweep._cut

    def spoiled(plan: Any, stored: Any, converted: Any) -> Any:
        tensors = cut(plan, stored, converted)
        spoiled.layer += 1
        name = "mlp.shared_experts.down_proj.weight"
        return {**tensors, name: tensors[name] + 1.0} if spoiled.layer > first else tensors

    spoiled.layer = 0
    first = 2  # the calibrated student's stream and the written layer each cut it once
    monkeypatch.setattr(sweep, "_cut", spoiled)
    assert "first differs from its teacher at layer 1" in refused()


def test_a_shard_that_is_not_what_was_proved_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sweep.write_shard

    def spoiled(folder: Path, number: int, total: int, tensors: Any) -> Path:
        name = "model.layers.1.mlp.shared_experts.down_proj.weight"
        if name in tensors:
            tensors = {**tensors, name: tensors[name] + 1.0}
        return write(folder, number, total, tensors)

    monkeypatch.setattr(sweep, "write_shard", spoiled)
    assert "layer 1 does not hold the mlp.shared_experts.down_proj.weight that was written" in refused()


def test_student_that_is_right_in_fp32_only(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Block.forward

    def coarse(self: Block, states_BTD: torch.Tensor) -> torch.Tensor:
        output_BTD = forward(self, states_BTD)
        exact = states_BTD.dtype == torch.float32 or not hasattr(self.ffn, "experts")
        return output_BTD if exact else output_BTD * (1 + 0.3 * torch.randn_like(output_BTD))

    monkeypatch.setattr(Block, "forward", coarse)
    assert "in torch.bfloat16 the student's logits are off its teacher's by" in refused(dtype="bfloat16")


def test_part_of_a_text_file(refused: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    assert "--calibration-part takes records of a JSONL file" in refused(calibration=text, calibration_part="A")
    assert "--part-fractions are those of --calibration-part" in refused(part_fractions="0.1,0.2,0.3,0.4")


def test_device_that_is_not_there(refused: Callable[..., str]) -> None:
    assert "--device nonsense is not usable here" in refused(device="nonsense")


REFUSED_SETTINGS = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
    ("llama", {"attention_bias": True}, "attention_bias is true"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ("mistral", {"sliding_window": 128}, "sliding_window is 128"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window is 64"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope type is dynamic",
    ),
]


@pytest.mark.parametrize(("family", "settings", "reason"), REFUSED_SETTINGS)
def test_what_the_student_class_cannot_express(
    refused: Callable[..., str], tmp_path: Path, family: str, settings: dict[str, Any], reason: str
) -> None:
    assert reason in refused(teacher=make_teacher(tmp_path / "teacher", family, **settings))


def test_command_exits_with_two_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "padd_ds.convert", "--teacher", str(tmp_path / "no"), "--output", "x"]
    result = subprocess.run(
        [*command, "--experts", "4", "--top-k", "9"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: --top-k is 9; it must lie between 1 and the 3 routed experts (--experts 4 minus --shared-experts 1)"
    ]
