"""A narrowed model keeps the neurons that contribute, and stays a plain checkpoint."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from padd_ds.errors import UserError
from tools import narrow_dense
from tools.tiny_model import make_tiny_model, save_teacher


@pytest.fixture
def folder(tmp_path):
    """A teacher of which every other neuron writes nothing, and problems."""
    model = make_tiny_model(ffn_size=16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 1::2] = 0
    (tmp_path / "teacher").mkdir()
    save_teacher(tmp_path / "teacher", model)
    pairs = [(a, b) for a in range(9) for b in range(9)]
    rows = [{"question": f"{a} plus {b}?", "answer": str(a + b), "solution": f"#{a + b}"} for a, b in pairs]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(monkeypatch, folder, keep, *more):
    words = ["narrow_dense.py", "--teacher", folder / "teacher", "--output", folder / "narrow", "--keep", keep, *more]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, "--calibration", folder / "train.jsonl"]])
    narrow_dense.main()


def test_neurons_that_write_nothing_go_first(folder, monkeypatch):
    run(monkeypatch, folder, 8)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    narrow = AutoModelForCausalLM.from_pretrained(folder / "narrow")
    assert narrow.config.intermediate_size == 8
    ids_BT = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(narrow(ids_BT).logits, teacher(ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_questions_stand_in_the_template(folder, monkeypatch):
    read = []
    monkeypatch.setattr(narrow_dense, "supervised_batch", lambda prompts, *_: read.append(prompts) or {}["stop"])
    with pytest.raises(KeyError, match="stop"):
        run(monkeypatch, folder, 8, "--template", "Question: {question} Answer:")
    with pytest.raises(KeyError, match="stop"):
        run(monkeypatch, folder, 8)
    assert read[0] == [f"Question: {question} Answer:" for question in read[1]]


def test_a_width_beyond_the_teachers_is_refused(folder, monkeypatch):
    with pytest.raises(UserError, match="--keep is 17; the teacher's FFNs have 16 neurons"):
        run(monkeypatch, folder, 17)
    assert not (folder / "narrow").exists()
