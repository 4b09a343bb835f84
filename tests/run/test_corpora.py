"""A warm-up run over two corpora of tools/make_corpus.py: resumed as if nothing had been, refused in one line."""

import json
from pathlib import Path

import pytest

from tests.run.test_stop import metrics
from tests.train_inputs import make_inputs, start_training
from tools.make_corpus import main as make_corpus


def overrides(inputs: Path) -> list[str]:
    corpora = f"[{{prefix: {inputs}/sums, weight: 1}}, {{prefix: {inputs}/words, weight: 2}}]"
    options = [f"warmup.corpora={corpora}", "warmup.sequence_length=32", "warmup.batch_size=4", "warmup.init_weight=0"]
    return ["stage=warmup", "data={}", *options]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    texts = {
        "sums": [f"{a} plus {b} is {a + b}" for a in range(9) for b in range(a)],
        "words": ["abc " * n + "xyz" for n in range(20)],
    }
    for name, rows in texts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        make_corpus([str(path), "--tokenizer", str(folder / "student"), "--output", str(folder / name)])
    return folder


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(inputs: Path) -> None:
    def finish(name: str, *more: str) -> str:
        process = start_training(inputs, *overrides(inputs), f"run_dir={inputs}/{name}", *more)
        _, told = process.communicate(timeout=400)
        assert process.returncode == 0 and "Traceback" not in told, told
        return told

    told = finish("whole", "steps=6")
    assert "corpus " in told and "36 documents" in told and "66.7% of the sequences" in told
    finish("stopped", "steps=3")
    finish("stopped", "steps=6", "--resume")
    assert len(metrics(inputs / "whole")) == 6
    assert metrics(inputs / "stopped") == metrics(inputs / "whole")
    assert len({line["loss_lm"] for line in metrics(inputs / "whole")}) == 6


@pytest.mark.slow
def test_a_corpus_that_was_cut_is_one_line_and_exit_code_2(inputs: Path) -> None:
    cut = inputs / "cut.bin"
    cut.write_bytes((inputs / "words.bin").read_bytes()[:-2])
    (inputs / "cut.idx").write_bytes((inputs / "words.idx").read_bytes())
    corpora = f"warmup.corpora=[{{prefix: {inputs}/cut}}]"
    process = start_training(inputs, *overrides(inputs), corpora, f"run_dir={inputs}/refused")
    _, told = process.communicate(timeout=400)
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in told, told
    assert len(lines) == 1 and "cut.bin: holds " in lines[0], told
    assert not (inputs / "refused").exists()
