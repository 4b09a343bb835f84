import json
import subprocess
import sys
from pathlib import Path

import pytest

from padd_ds import evaluate
from padd_ds.errors import UserError
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.tiny import tiny_student

TEXT = "A plain text, long enough for a few windows of a few tokens each. " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_student(vocabulary=len(VOCABULARY)).save_pretrained(folder)
    character_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path) -> Path:
    rows = [{"q": f"{n} + 1", "a": n + 1, "kind": "sum"} for n in range(5)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def arguments(model: Path, files: Path, *more: str) -> list[str]:
    paths = [
        "--model",
        str(model),
        "--data",
        str(files / "problems.jsonl"),
        "--output",
        str(files / "out.json"),
    ]
    return [*paths, "--question-field", "q", "--answer-field", "a", "--max-new-tokens", "8", *more]


def test_problems_and_text_are_measured_and_written(model, files, capsys):
    text = ["--perplexity", str(files / "text.txt"), "--window", "16", "--max-windows", "4"]
    options = [
        "--subject-field",
        "kind",
        "--answer-format",
        "last_number",
        "--limit",
        "3",
        "--template",
        "chat",
    ]
    evaluate.main(arguments(model, files, *text, *options, "--device", "cpu"))
    result = json.loads((files / "out.json").read_text())
    problems = result["headline"]["problems"]
    assert problems["problems"] == 3
    assert problems["by_subject"] == {"sum": [problems["correct"], 3]}
    assert result["headline"]["perplexity"]["tokens"] == 60
    assert [row["question"] for row in result["responses"]] == ["0 + 1", "1 + 1", "2 + 1"]
    assert set(result["responses"][0]) >= {
        "gold",
        "response",
        "extracted",
        "correct",
        "tokens",
        "ended",
        "status",
    }
    assert result["settings"]["template"]["chat"] is True
    assert result["settings"]["dtype"] == "float32"
    assert result["versions"]["torch"]
    shown = capsys.readouterr().out
    assert "Pass@1" in shown
    assert "60 tokens predicted in 4 windows of 16" in shown


def test_samples_stand_beside_the_greedy_response(model, files, capsys):
    options = ["--limit", "2", "--answer-format", "last_number", "--samples", "3", "--temperature", "2"]
    evaluate.main(arguments(model, files, *options))
    result = json.loads((files / "out.json").read_text())
    samples, sampled = result["headline"]["samples"], result["sampled_responses"]
    assert (samples["problems"], samples["samples"]) == (2, 3)
    assert [row["question"] for row in sampled] == ["0 + 1"] * 3 + ["1 + 1"] * 3
    assert len({row["response"] for row in sampled}) > 1
    assert result["headline"]["problems"]["samples"] == 1 and len(result["responses"]) == 2
    assert "mean of 3" in capsys.readouterr().out


def test_perplexity_alone_needs_no_problems(model, files):
    output = files / "text.json"
    command = ["--model", str(model), "--perplexity", str(files / "text.txt"), "--window", "16"]
    evaluate.main([*command, "--output", str(output)])
    assert json.loads(output.read_text())["headline"]["problems"] is None


def test_default_template_is_a_chat_where_the_model_has_one(model, files):
    evaluate.main(arguments(model, files, "--limit", "1", "--answer-format", "last_number"))
    settings = json.loads((files / "out.json").read_text())["settings"]
    assert settings["template"]["chat"] is True
    assert "boxed" in settings["template"]["text"]


def test_benchmark_is_read_from_a_folder(model, files):
    (files / "gsm8k_test.jsonl").write_text(json.dumps({"question": "1 + 1", "answer": "#### 2"}) + "\n")
    command = [
        "--model",
        str(model),
        "--benchmark",
        "gsm8k",
        "--data-dir",
        str(files),
        "--max-new-tokens",
        "4",
    ]
    evaluate.main([*command, "--template", "plain", "--output", str(files / "out.json")])
    result = json.loads((files / "out.json").read_text())
    assert [row["gold"] for row in result["responses"]] == ["2"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--question-field", "query"],
            r"problems\.jsonl, line 1 has no 'query' \(fields: q, a, kind\); set --question-field",
        ),
        (["--data", "{files}/none.jsonl"], r"none\.jsonl: no such file"),
        (["--perplexity", "{files}/none.txt"], r"none\.txt: cannot be read"),
        (["--output", "{files}/problems.jsonl"], "already exists.*--overwrite"),
        (["--output", "{files}", "--overwrite"], "is a folder"),
        (["--data-dir", "{files}"], "--data-dir goes with --benchmark"),
        (["--pattern", "("], "not a regular expression"),
        (["--template", "none"], r"lacks \{question\}"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--samples", "2", "--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["--samples", "2", "--top-p", "2"], "--top-p 2.0 must be above 0 and at most 1"),
        (["--device", "warp"], "--device warp cannot be used"),
        (["--model", "{files}/none"], "no such folder"),
        (["--max-new-tokens", "4000"], "positions"),
        (["--perplexity", "{files}/text.txt", "--window", "5000"], "less than one window"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(model, files, more, message):
    before = sorted(files.iterdir())
    more = [word.replace("{files}", str(files)) for word in more]
    with pytest.raises(UserError, match=message):
        evaluate.main(arguments(model, files, *more))
    assert sorted(files.iterdir()) == before


def test_a_mistake_is_one_line_and_exit_code_2_before_torch_is_loaded(files):
    command = [sys.executable, "-X", "importtime", "-m", "padd_ds.evaluate"]
    command += arguments(files / "none", files, "--question-field", "query")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert "line 1 has no 'query'" in lines[0]
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not (files / "out.json").exists()


def test_nothing_to_evaluate_is_refused(model, files):
    with pytest.raises(UserError, match="give --benchmark, --data or --perplexity"):
        evaluate.main(["--model", str(model), "--output", str(files / "out.json")])
    text = ["--perplexity", str(files / "text.txt")]
    with pytest.raises(UserError, match="--samples goes with"):
        evaluate.main(["--model", str(model), "--output", str(files / "out.json"), *text, "--samples", "2"])
