"""The tiny teacher: its tokenizer, its loss, a training that repeats, an output that is whole or absent."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from padd_ds.errors import UserError
from tests.commands import run_command
from tools.tiny_model import SPECIALS, make_tiny_model, make_tokenizer, save_teacher
from tools.tiny_problems import distinct_problems, problem_stream, take
from tools.tiny_teacher import (
    IGNORED,
    TrainingOptions,
    bucketed_batches,
    evaluate,
    is_right,
    learning_rate,
    response_loss,
    train,
)

TOOL = "tools/tiny_teacher.py"
SMALL = ["--hidden-size", "32", "--layers", "2", "--ffn-size", "64", "--heads", "2", "--kv-heads", "1"]
FEW = ["--threads", "1", "--train-problems", "20", "--test-problems", "5", "--batch-size", "8"]


def test_tokenizer_gives_every_problem_back_without_unknown_tokens():
    tokenizer = make_tokenizer()
    for problem in take(problem_stream("train", 0), 700):
        text = problem.question + problem.solution
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unk_token_id not in tokens
    assert len(tokenizer) <= 72


def test_question_and_solution_tokenize_apart_as_they_do_together():
    tokenizer = make_tokenizer()
    for problem in take(problem_stream("train", 1), 700):
        apart = tokenizer.encode(problem.question) + tokenizer.encode(problem.solution)
        assert apart == tokenizer.encode(problem.question + problem.solution)


def test_saved_teacher_loads_with_auto_classes(tmp_path: Path):
    model = make_tiny_model(seed=1)
    save_teacher(tmp_path, model)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("47 plus 85?", return_tensors="pt")["input_ids"]
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert tokenizer.decode(tokens[0]) == "47 plus 85?"
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<pad>", "<eos>", "left")
    assert loaded.generation_config.eos_token_id == SPECIALS.index("<eos>")


def test_chat_template_adds_nothing_but_the_end_token():
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "47 plus 85?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "47 plus 85?"
    messages.append({"role": "assistant", "content": "#132"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "47 plus 85?#132<eos>"
    ids = tokenizer("47 plus 85?#132<eos>")["input_ids"]
    assert ids == [*tokenizer.encode("47 plus 85?#132"), tokenizer.eos_token_id]


def test_models_of_one_seed_are_equal_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    one, same, other = make_tiny_model(seed=3), make_tiny_model(seed=3), make_tiny_model(seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_loss_counts_response_tokens_alone_whatever_the_padding():
    model = make_tiny_model()
    options = TrainingOptions(steps=1, batch_size=6, bucket_batches=2)
    tokens_BT, labels_BT = next(bucketed_batches(make_tokenizer(), options))
    losses = []
    for tokens, labels in zip(tokens_BT, labels_BT, strict=True):
        response = (labels != IGNORED).nonzero().flatten()
        length = int(response[-1]) + 1
        log_probs = model(tokens[None, :length]).logits[0].log_softmax(-1)
        losses += [-log_probs[position - 1, tokens[position]] for position in response.tolist()]
    torch.testing.assert_close(response_loss(model, tokens_BT, labels_BT), torch.stack(losses).mean())


def test_labels_are_the_solution_and_the_end_token():
    tokenizer = make_tokenizer()
    options = TrainingOptions(steps=1, batch_size=8, bucket_batches=1, bare_share=0.35)
    solutions = sorted(problem.solution + "<eos>" for problem in take(problem_stream("train", 0, 0.35), 8))
    _, labels_BT = next(bucketed_batches(tokenizer, options))
    assert sorted(tokenizer.decode(labels[labels != IGNORED]) for labels in labels_BT) == solutions


def test_length_buckets_leave_little_padding():
    batches = bucketed_batches(make_tokenizer(), TrainingOptions(steps=1))
    tokens = torch.cat([next(batches)[0].flatten() for _ in range(8)])
    assert (tokens == 0).float().mean() < 0.1


def test_learning_rate_rises_stays_and_falls_to_zero():
    assert learning_rate(0.0, 1.0) == pytest.approx(0.02)
    assert learning_rate(0.3, 2.0) == 2.0
    assert learning_rate(0.8, 1.0) == pytest.approx(0.5)
    assert learning_rate(1.0, 1.0) == 0.0
    assert learning_rate(1.5, 1.0) == 0.0


def test_training_lowers_the_loss_and_repeats_for_a_seed():
    options = TrainingOptions(steps=30, batch_size=16)
    first, second = make_tiny_model(), make_tiny_model()
    tokens_BT, labels_BT = next(bucketed_batches(make_tokenizer(), options))
    before = response_loss(first, tokens_BT, labels_BT).item()
    assert train(first, options)["steps"] == 30
    train(second, options)
    assert response_loss(first, tokens_BT, labels_BT).item() < before - 0.5
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_training_by_the_clock_ends_soon_after_its_time():
    result = train(make_tiny_model(), TrainingOptions(seconds=0.5, batch_size=8))
    assert result["steps"] >= 1
    assert 0.5 <= result["seconds"] < 5


@pytest.mark.parametrize("wrong", [{}, {"steps": 3, "seconds": 1.0}, {"steps": 0}, {"seconds": -1.0}])
def test_a_training_without_one_positive_length_is_refused(wrong: dict):
    with pytest.raises(UserError, match="steps"):
        TrainingOptions(**wrong)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("7+5=12#132", True),
        ("#132", True),
        ("#13", False),
        ("#1320", False),
        ("132", False),
        ("#132#1", False),
    ],
)
def test_a_response_is_right_only_when_it_ends_in_the_answer(response: str, right: bool):
    assert is_right(response, "132") is right


def test_evaluation_does_not_depend_on_the_batch():
    problems = distinct_problems("test", 3, seed=0)
    model = make_tiny_model()
    train(model, TrainingOptions(steps=60, batch_size=32, bare_share=1.0))
    together, alone = evaluate(model, problems), evaluate(model, problems, batch_size=1)
    assert together == alone
    assert sum(map(len, together.values())) == len(problems)


def test_sampled_shares_are_means_over_the_samples():
    shares = evaluate(make_tiny_model(), distinct_problems("test", 1, seed=0), samples=4)
    assert all((4 * value).is_integer() for values in shares.values() for value in values)


@pytest.mark.slow
def test_tool_writes_teacher_and_problems(tmp_path: Path):
    output, data = tmp_path / "teacher", tmp_path / "data"
    done = run_command(TOOL, "--output", str(output), "--data-output", str(data), "--steps", "3", *SMALL, *FEW)
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(output).config.hidden_size == 32
    assert json.loads((output / "tiny_teacher.json").read_text())["steps"] == 3
    assert len((data / "train.jsonl").read_text().splitlines()) == 140
    assert len((data / "test.jsonl").read_text().splitlines()) == 35


@pytest.mark.slow
def test_tool_refuses_an_existing_output_in_one_line_and_writes_nothing(tmp_path: Path):
    (tmp_path / "data").mkdir()
    arguments = [
        "--output",
        str(tmp_path / "teacher"),
        "--data-output",
        str(tmp_path / "data"),
        "--steps",
        "3",
    ]
    done = run_command(TOOL, *arguments, *SMALL, *FEW)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "--overwrite" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
