"""A real server and transformers give the same responses to an evaluation."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds import evaluate
from padd_ds.evaluation import vllm
from padd_ds.evaluation.generate import GenerationOptions, generate_responses
from padd_ds.evaluation.kept import Share
from padd_ds.evaluation.scoring import Draw
from padd_ds.hf import load_causal_lm, load_skeleton
from padd_ds.seeds import derive_seed
from tests.vllm.conftest import PYTHON, save_student, vllm_options
from tools.tiny_model import make_tokenizer

PROMPTS = [f"{n} plus {n * n}?" for n in range(3, 27)]
SEEDS = [derive_seed(0, row) for row in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_student(tmp_path_factory.mktemp("evaluated") / "student"))


@pytest.fixture(scope="module")
def draw(student: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Draw]:
    skeleton, log_path = load_skeleton(student, torch.float32), tmp_path_factory.mktemp("log") / "server.log"
    with vllm.served_responses(student, skeleton, make_tokenizer(), 64, vllm_options(), log_path, Share()) as draw:
        yield draw


def served(draw: Draw, options: GenerationOptions) -> list[Any]:
    found = {row: one for batch in draw(PROMPTS, options, SEEDS, False) for row, one in batch.items()}
    return [found[row] for row in range(len(PROMPTS))]


def test_greedy_responses_are_those_of_transformers(draw: Draw, student: str) -> None:
    """With stop texts too, of one token and of two."""
    model, tokenizer = load_causal_lm(student, torch.float32), make_tokenizer()
    options = GenerationOptions(max_new_tokens=24)
    expected = generate_responses(model, tokenizer, PROMPTS, options)
    assert served(draw, options) == expected
    assert len({one.text for one in expected}) > len(PROMPTS) // 2
    stop = (expected[0].text[2], expected[1].text[3:5])
    stopping = GenerationOptions(max_new_tokens=24, stop=stop)
    cut = generate_responses(model, tokenizer, PROMPTS, stopping)
    assert served(draw, stopping) == cut
    assert sum(one.tokens for one in cut) < sum(one.tokens for one in expected)


def test_drawn_responses_follow_from_their_seeds_alone(draw: Draw) -> None:
    options = GenerationOptions(max_new_tokens=16, temperature=0.8, top_p=0.9)
    together = served(draw, options)
    assert len({one.text for one in together}) > len(PROMPTS) // 2
    alone = {
        row: next(draw([PROMPTS[row]], GenerationOptions(**{**vars(options), "batch_size": 1}), [SEEDS[row]], False))[0]
        for row in (20, 3, 11)
    }
    assert alone == {row: together[row] for row in alone}


def test_the_command_gives_the_same_file_of_responses(
    draw: Draw, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def running(*_: Any) -> Iterator[Draw]:
        yield draw

    monkeypatch.setattr(vllm, "served_responses", running)
    rows = [{"question": prompt, "answer": 1} for prompt in PROMPTS]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", student, "--data", str(tmp_path / "problems.jsonl"), "--template", "plain"]
    command += ["--max-new-tokens", "16", "--answer-format", "last_number"]
    evaluate.main([*command, "--output", str(tmp_path / "hf.json"), "--device", "cpu"])
    chosen = ["--backend", "vllm", "--dtype", "float32", "--vllm", f"python={PYTHON}"]
    evaluate.main([*command, *chosen, "--output", str(tmp_path / "vllm.json")])
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in ("hf.json", "vllm.json"))
    assert ours["headline"] == theirs["headline"] and ours["model"] == theirs["model"]
    assert (tmp_path / "hf.responses.jsonl").read_text() == (tmp_path / "vllm.responses.jsonl").read_text()
