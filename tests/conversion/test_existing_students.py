"""Existing MoE students: new routers, everything else untouched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    Glm4MoeConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from padd_ds.conversion.existing import convert_existing, overwrite_tensor
from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.targets import load_targets
from padd_ds.errors import UserError
from padd_ds.report.conversion_page import conversion_page
from tests.conversion.tiny_teachers import byte_tokenizer, make_teacher

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
MLA = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
STUDENTS: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(
        **{**SIZES, "head_dim": 12, "num_experts": 6, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    ),
    "glm4_moe": Glm4MoeConfig(
        **{**SIZES, "head_dim": 12, "n_routed_experts": 6, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    ),
    "mixtral": MixtralConfig(**{**SIZES, "num_local_experts": 6, "sliding_window": None}),
    "deepseek_v2": DeepseekV2Config(
        **{**SIZES, **MLA, "num_key_value_heads": 4, "n_routed_experts": 6, "moe_intermediate_size": 16},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
}
MOE_LAYERS = {"qwen3_moe": [0, 2, 3], "glm4_moe": [1, 2, 3], "mixtral": [0, 1, 2, 3], "deepseek_v2": [1, 2, 3]}
ROUTER = {"mixtral": "block_sparse_moe.gate"}


def make_student(folder: Path, family: str) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(STUDENTS[family], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(std=0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("deep") / "teacher", "qwen2", num_hidden_layers=6)


def options(teacher: Path, student: Path, output: Path, text: Path, /, **changes: Any) -> ConversionOptions:
    settings: dict[str, Any] = {"calibration": text, "calibration_tokens": 512}
    return ConversionOptions(teacher=str(teacher), student=str(student), output=output, **{**settings, **changes})


@pytest.mark.parametrize("family", STUDENTS)
def test_only_the_routers_change(tmp_path: Path, teacher: Path, calibration_file: Path, family: str) -> None:
    student = make_student(tmp_path / "student", family)
    evaluation = {"evaluation": calibration_file, "evaluation_tokens": 512}
    contents = convert_existing(options(teacher, student, tmp_path / "out", calibration_file, **evaluation))
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    router = ROUTER.get(family, "mlp.gate")
    expected = {f"model.layers.{layer}.{router}.weight" for layer in MOE_LAYERS[family]}
    assert changed - {name for name in changed if name.endswith("e_score_correction_bias")} == expected
    assert all(before[name].dtype == after[name].dtype for name in before)

    tokenizer = AutoTokenizer.from_pretrained(student)
    ids_BT = torch.tensor(tokenizer(calibration_file.read_text())["input_ids"][:512]).view(2, 256)
    for who, folder in (("teacher", teacher), ("student before", student), ("student", tmp_path / "out")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            assert contents["perplexity"][who] == pytest.approx(
                float(model(ids_BT, labels=ids_BT).loss.exp()), rel=1e-3
            )
    assert "student before" in conversion_page(contents)

    targets = load_targets(tmp_path / "out")
    assert targets.layer_map_L.tolist() == [layer * 6 // 4 for layer in MOE_LAYERS[family]]
    assert targets.expert_prior_LE is not None
    assert targets.expert_prior_LE.shape == (len(MOE_LAYERS[family]), 6)
    # 64 neurons in 6 clusters of 10: the 4 weakest are left out.
    for assignment_F in targets.assignment_LF:
        assert torch.bincount(assignment_F + 1).tolist() == [4, 10, 10, 10, 10, 10, 10]


@pytest.mark.parametrize("router", ["calibrated", "random"])
def test_new_logits_spread_as_the_old_ones(tmp_path: Path, teacher: Path, calibration_file: Path, router: str) -> None:
    student = make_student(tmp_path / "student", "qwen3_moe")
    convert_existing(options(teacher, student, tmp_path / "out", calibration_file, router=router))
    spreads = []
    for folder in (student, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        seen: list[torch.Tensor] = []
        model.model.layers[0].mlp.gate.register_forward_hook(
            lambda m, a, output, seen=seen: seen.append(output[0].detach())
        )
        tokens = AutoTokenizer.from_pretrained(folder)(calibration_file.read_text())["input_ids"][:512]
        model(torch.tensor(tokens).view(2, 256))
        spreads.append(float(seen[0].std(dim=1, correction=0).mean()))
    assert spreads[1] == pytest.approx(spreads[0], rel=0.1)


def test_centroids_need_equal_widths(tmp_path: Path, teacher: Path, calibration_file: Path) -> None:
    student = make_student(tmp_path / "student", "mixtral")
    with pytest.raises(UserError, match=r"needs equal widths, and the teacher's is 32, the student's 48"):
        convert_existing(options(teacher, student, tmp_path / "out", calibration_file, router="centroid"))
    wide = make_teacher(tmp_path / "wide", hidden_size=48)
    settings = {"router": "centroid", "cluster": "weights", "calibration": None}
    convert_existing(options(wide, student, tmp_path / "out", calibration_file, **settings))
    targets, tensors = load_targets(tmp_path / "out"), load_file(tmp_path / "out/model.safetensors")
    rows_ED, centroid_ED = tensors["model.layers.0.block_sparse_moe.gate.weight"].float(), targets.centroids[0]
    cosine_E = torch.nn.functional.cosine_similarity(rows_ED, centroid_ED)
    assert float(cosine_E.min()) > 0.999
    assert targets.expert_prior_LE is None


def test_another_tokenizer_is_refused(tmp_path: Path, teacher: Path, calibration_file: Path) -> None:
    student = make_student(tmp_path / "student", "mixtral")
    path = student / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"swap":').replace('"b":', '"a":').replace('"swap":', '"b":'))
    with pytest.raises(UserError, match=r"student: its tokenizer reads .* differently from that of .*teacher"):
        convert_existing(options(teacher, student, tmp_path / "out", calibration_file))


def test_quantised_student_is_refused(tmp_path: Path, teacher: Path, calibration_file: Path) -> None:
    student = make_student(tmp_path / "student", "mixtral")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="its weights are quantised"):
        convert_existing(options(teacher, student, tmp_path / "out", calibration_file))


def test_dense_student_is_refused(tmp_path: Path, teacher: Path, calibration_file: Path) -> None:
    with pytest.raises(UserError, match="model type qwen2 is not supported; use one of qwen3_moe"):
        convert_existing(options(teacher, teacher, tmp_path / "out", calibration_file))


@pytest.mark.parametrize("wrong", [{"experts": 8, "top_k": 2}, {"refit": True}, {"dtype": "float32"}])
def test_what_belongs_to_the_student_is_not_asked_for(
    tmp_path: Path, teacher: Path, calibration_file: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} does not go with --student"):
        options(teacher, teacher, tmp_path / "out", calibration_file, **wrong)


def test_tensor_is_replaced_in_place(tmp_path: Path) -> None:
    tensors = {name: torch.randn(4, 3).to(torch.bfloat16) for name in "abc"}
    save_file(tensors, tmp_path / "file.safetensors")
    new = torch.randn(4, 3).to(torch.bfloat16)
    overwrite_tensor(tmp_path / "file.safetensors", "b", new)
    assert all(
        torch.equal(tensor, {**tensors, "b": new}[name])
        for name, tensor in load_file(tmp_path / "file.safetensors").items()
    )
    with pytest.raises(ValueError, match="does not take the place"):
        overwrite_tensor(tmp_path / "file.safetensors", "b", new[:3])
