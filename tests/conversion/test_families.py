"""Every family's students, run by plain transformers on long texts, equal their teachers with all experts active."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from padd_ds.conversion.exactness import relative_error, worst_token_error
from padd_ds.conversion.families import check_supported
from padd_ds.conversion.pipeline import convert
from padd_ds.errors import UserError
from tests.conversion.test_conversion_students import load_all_active, options
from tests.conversion.tiny_teachers import CONFIGS, FAMILY_SETTINGS, SIZES, make_teacher

N_TOKENS = 256
TOKENS_BT = torch.randint(256, (1, N_TOKENS), generator=torch.Generator().manual_seed(3))
TRAINED_TOKENS = 32
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED_TOKENS,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": TRAINED_TOKENS,
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied, every head its own keys": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama 3": ("llama", {"rope_parameters": ROPES["llama3"], "num_key_value_heads": 1}),
    "llama, linear rope": ("llama", {"rope_parameters": ROPES["linear"]}),
    "mistral, no window": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral, window as long as the text": (
        "mistral",
        {"sliding_window": N_TOKENS, "max_position_embeddings": N_TOKENS},
    ),
    "qwen2.5, small": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5, large": ("qwen2", {"tie_word_embeddings": False, "num_attention_heads": 8}),
    "qwen2.5, window that is switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
    "qwen2.5, yarn": ("qwen2", {"rope_parameters": ROPES["yarn"]}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, untied, one head of keys": ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
}


def load(folder: Path, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **changes).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS_BT).logits.float()


def teacher_and_student(folder: Path, family: str, settings: dict[str, Any], dtype: torch.dtype) -> tuple[Path, Path]:
    teacher = make_teacher(folder / "teacher", family, dtype, **settings)
    convert(options(teacher, folder / "student", None, cluster="random", router="centroid"))
    return teacher, folder / "student"


@pytest.mark.parametrize("case", CASES)
def test_student_equals_its_teacher_in_fp32(tmp_path: Path, case: str) -> None:
    teacher, folder = teacher_and_student(tmp_path, *CASES[case], torch.float32)
    student = load_all_active(folder)
    assert type(student).__name__ == "Glm4MoeForCausalLM"
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert worst_token_error(logits(load(teacher)), logits(student)) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_student_is_as_close_to_its_teacher_in_bf16_as_rounding_lets_it(tmp_path: Path, case: str) -> None:
    teacher, folder = teacher_and_student(tmp_path, *CASES[case], torch.bfloat16)
    student = load_all_active(folder)
    assert student.dtype == torch.bfloat16
    in_bf16, in_fp32 = logits(load(teacher)), logits(load(teacher, dtype=torch.float32))
    assert 0 < relative_error(in_bf16, logits(student)) <= relative_error(in_fp32, in_bf16)
    # Its weights are the teacher's to the last bit: computed in fp32, nothing is left of that.
    assert worst_token_error(in_fp32, logits(student.float())) <= 1e-5


@pytest.mark.parametrize("rope", ROPES)
def test_text_is_long_enough_to_tell_rotary_variants_apart(tmp_path: Path, rope: str) -> None:
    teacher = make_teacher(tmp_path / "teacher", rope_parameters=ROPES[rope])
    expected = logits(load(teacher))
    config = json.loads((teacher / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPES[rope]["rope_theta"]}
    (teacher / "config.json").write_text(json.dumps(config))
    assert relative_error(expected, logits(load(teacher))) > 1e-2


def test_window_one_shorter_than_the_text_is_another_model_and_is_refused(tmp_path: Path) -> None:
    window: dict[str, Any] = {"sliding_window": N_TOKENS - 1, "max_position_embeddings": N_TOKENS}
    narrow = load(make_teacher(tmp_path / "narrow", "mistral", **window))
    whole = load(make_teacher(tmp_path / "whole", "mistral", max_position_embeddings=N_TOKENS))
    assert worst_token_error(logits(whole), logits(narrow)) > 1e-3
    with pytest.raises(UserError, match="sliding_window is 255, below max_position_embeddings 256"):
        check_supported(narrow.config, "teacher")


@pytest.mark.parametrize(
    ("family", "settings", "refusal"),
    [
        ("mistral", {"sliding_window": 128, "layer_types": ["full_attention"] * 2}, "sliding_window is 128"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}, "sliding_window is 128"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 511, "max_window_layers": 0}, "sliding_window is 511"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}, None),
        ("llama", {"sliding_window": 128}, None),
    ],
)
def test_only_windows_that_cut_something_off_are_refused(
    family: str, settings: dict[str, Any], refusal: str | None
) -> None:
    config = CONFIGS[family](**{**SIZES, **FAMILY_SETTINGS[family], **settings})
    if refusal is None:
        check_supported(config, "teacher")
        return
    with pytest.raises(UserError, match=f"^teacher: {refusal}.*set sliding_window to null"):
        check_supported(config, "teacher")


def test_mistral_slides_in_every_layer_whatever_its_layer_types_say(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "mistral", sliding_window=128)
    said = MistralConfig.from_pretrained(teacher, layer_types=["full_attention"] * 2)
    unlimited = MistralConfig.from_pretrained(teacher, sliding_window=None)
    assert torch.equal(logits(load(teacher)), logits(load(teacher, config=said)))
    assert relative_error(logits(load(teacher)), logits(load(teacher, config=unlimited))) > 1e-2


def test_quantised_weights_are_refused() -> None:
    config = CONFIGS["llama"](**SIZES, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"^teacher: quantization_config is set \(fp8\)"):
        check_supported(config, "teacher")
