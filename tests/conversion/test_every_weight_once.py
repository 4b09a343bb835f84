"""Whatever the slicing, a written student holds every weight of its teacher exactly once."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from padd_ds.conversion.pipeline import convert
from tests.conversion.test_conversion_students import options, stored_tensors
from tests.conversion.tiny_teachers import make_teacher

Tensors = dict[str, torch.Tensor]
ADDED = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")


@st.composite
def slicings(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a teacher, and how to cut it, that a conversion accepts."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    experts = draw(st.integers(3, 12))
    shared = draw(st.integers(1, experts - 2))
    slice_width = draw(st.integers(1, 3)) * 16 // dtype.itemsize
    return {
        "family": draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])),
        "dtype": dtype,
        "sizes": {
            "intermediate_size": experts * slice_width,
            "hidden_size": 8 * draw(st.integers(2, 5)),
            "num_hidden_layers": draw(st.integers(1, 3)),
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": draw(st.booleans()),
        },
        "cut": {
            "experts": experts,
            "shared_experts": shared,
            "top_k": draw(st.integers(1, experts - shared)),
            "cluster": draw(st.sampled_from(["activations", "weights", "random", "contiguous"])),
            "calibration_tokens": 512,
        },
    }


# Not shrunk when it fails: that takes hundreds of conversions.
@settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(case=slicings())
def test_every_weight_stands_once(case: dict[str, Any], calibration_file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(Path(folder) / "teacher", case["family"], case["dtype"], **case["sizes"])
        convert(options(teacher, Path(folder) / "student", calibration_file, **case["cut"]))
        dense, student = load_file(teacher / "model.safetensors"), stored_tensors(Path(folder) / "student")
    for layer in range(case["sizes"]["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        assert neurons(student, prefix) == neurons(dense, prefix)
    copied = {name: tensor for name, tensor in student.items() if ".mlp." not in name}
    expected = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    expected.setdefault("lm_head.weight", dense["model.embed_tokens.weight"])
    assert copied.keys() == expected.keys()
    assert all(bits(copied[name]) == bits(expected[name]) for name in expected)


def neurons(tensors: Tensors, prefix: str) -> list[bytes]:
    """The neurons of all FFNs under a prefix, sorted: of each its row of gate and of up and its column of down."""
    names = [name for name in tensors if name.startswith(prefix) and not name.endswith(ADDED)]
    parts: dict[str, Tensors] = {}
    for name in names:
        ffn, matrix = name.removesuffix("_proj.weight").rsplit(".", 1)
        parts.setdefault(ffn, {})[matrix] = tensors[name]
    assert all(part.keys() == {"gate", "up", "down"} for part in parts.values())
    rows = [torch.cat([part["gate"], part["up"], part["down"].T], dim=1) for part in parts.values()]
    return sorted(bits(row) for row in torch.cat(rows))


def bits(tensor: torch.Tensor) -> bytes:
    return str(tensor.dtype).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
