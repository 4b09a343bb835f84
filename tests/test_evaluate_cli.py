import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from padd_ds import evaluate
from padd_ds.errors import UserError
from padd_ds.evaluation.results import Measured
from padd_ds.evaluation.scoring import summarise
from padd_ds.rollout.verify import AnswerChecker
from padd_ds.run.lock import run_lock
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.evaluation.test_scoring import scored
from tests.ranks import run_ranks
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
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"q": "1 + 1", "a": 2}\n{"q": "\xe9", "a": 2}\n')
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


def responses(files: Path, name: str = "out") -> list[dict]:
    return [json.loads(line) for line in (files / f"{name}.responses.jsonl").read_text().splitlines()]


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
    assert [row["problem"] for row in result["responses"]] == [0, 1, 2]
    assert result["responses_file"] == "out.responses.jsonl"
    rows = responses(files)
    assert [row["question"] for row in rows] == ["0 + 1", "1 + 1", "2 + 1"]
    assert set(rows[0]) >= {"gold", "response", "extracted", "correct", "tokens", "ended", "status"}
    assert not (files / ".out.json.partial").exists()
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
    assert [(row["problem"], row["sample"]) for row in sampled] == [(n, s) for n in (0, 1) for s in (1, 2, 3)]
    rows = responses(files)
    assert [row["question"] for row in rows] == ["0 + 1"] * 4 + ["1 + 1"] * 4
    assert len({row["response"] for row in rows if row["sample"]}) > 1
    assert set(samples["pass_at_k"]) == {"1", "2", "3"}
    assert result["headline"]["problems"]["samples"] == 1 and len(result["responses"]) == 2
    told = capsys.readouterr()
    cut = result["headline"]["problems"]["truncated"] + samples["truncated"]
    assert "mean of 3" in told.out and cut
    assert told.err.endswith(
        f"warning: {cut} of 8 responses were cut off at 8 tokens, before they ended; give a larger --max-new-tokens\n"
    )


@pytest.mark.parametrize(("cut", "warns"), [(1, False), (2, True)])
def test_a_tenth_of_cut_responses_is_no_warning(cut: int, warns: bool, capsys: pytest.CaptureFixture[str]) -> None:
    result = summarise([scored(ended=place >= cut) for place in range(10)])
    evaluate.warn_of_cut_responses(Measured(problems=result), 512)
    assert bool(capsys.readouterr().err) == warns


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
    assert [row["gold"] for row in responses(files)] == ["2"]


def test_an_interrupted_evaluation_goes_on_by_the_same_command(model, files, monkeypatch):
    command = arguments(model, files, "--answer-format", "last_number", "--samples", "2", "--batch-size", "3")
    evaluate.main([*command, "--output", str(files / "whole.json")])
    check = AnswerChecker.check
    batches = []

    def interrupted(self, *pairs):
        batches.append(pairs)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return check(self, *pairs)

    monkeypatch.setattr(AnswerChecker, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    assert not (files / "out.json").exists()
    with pytest.raises(UserError, match=r"\.out\.json\.partial: an interrupted evaluation with another max_new_tokens"):
        evaluate.main([*command, "--max-new-tokens", "9"])
    evaluate.main([*command, "--batch-size", "4"])
    assert len(batches) == 4 + 2  # two greedy and one drawn batch were kept; seven drawn responses are left
    assert responses(files) == responses(files, "whole")
    first, second = (json.loads((files / name).read_text())["headline"] for name in ("out.json", "whole.json"))
    assert first == second


def test_an_output_that_another_process_evaluates_to_is_refused(model, files):
    command = arguments(model, files, "--answer-format", "last_number")
    with run_lock(files / ".out.json.partial"):
        with pytest.raises(UserError, match=r"partial: another process evaluates in this folder .*pid.*another output"):
            evaluate.main(command)
        evaluate.main([*command, "--output", str(files / "beside.json")])
    evaluate.main(command)
    assert responses(files) == responses(files, "beside")


def evaluate_on(ranks, command: list[str]) -> int:
    """What `padd-eval` does on a rank, in the process that the test started for it."""
    evaluate.main(command)
    return ranks.rank


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_write_one_result(model, files):
    command = arguments(model, files, "--answer-format", "last_number", "--samples", "2")
    evaluate.main([*command, "--output", str(files / "whole.json")])
    assert run_ranks(evaluate_on, 2, command) == [0, 1]
    assert responses(files) == responses(files, "whole")
    assert not (files / ".out.json.partial").exists()


def test_routing_analysis_writes_numbers_and_a_page(model, files, capsys):
    rows = [{"q": f"{n} + 1", "a": n + 1, "kind": "<sum>" if n % 2 else "other"} for n in range(6)]
    (files / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--routing-analysis", "--subject-field", "kind", "--solution-field", "a", "--device", "cpu"]
    evaluate.main([*arguments(model, files, *options), "--routing-before", str(model), str(model)])
    routing = json.loads((files / "out.json").read_text())["routing"]
    assert routing["subjects"] == {"other": 3, "<sum>": 3}
    assert routing["headline"]["shift"] == 0.0 and routing["shift"]["flips_by_layer"] == [0.0, 0.0]
    assert 0 <= routing["specialisation"]["nmi"]["value"] <= 1
    html = (files / "out.html").read_text()
    assert "&lt;sum&gt;" in html and "<sum>" not in html
    assert "NMI of expert and subject" in capsys.readouterr().out
    assert sorted(path.name for path in files.glob("*out*")) == ["out.html", "out.json", "out_files"]
    assert [one["consistency_by_layer"] for one in routing["over_training"]] == [[1.0, 1.0]] * 2
    assert sorted(path.name for path in (files / "out_files").iterdir()) == ["experts.csv", "layers.csv", "plots"]


def test_routing_of_a_model_that_is_not_finite_is_one_line_and_writes_nothing(files):
    broken = tiny_student(vocabulary=len(VOCABULARY))
    torch.nn.init.constant_(broken.model.layers[0].self_attn.q_proj.weight, torch.nan)
    broken.save_pretrained(files / "broken")
    character_tokenizer(chat=True).save_pretrained(files / "broken")
    with pytest.raises(UserError, match=r"broken: its routing is not finite; check its weights"):
        evaluate.main(arguments(files / "broken", files, "--routing-analysis", "--solution-field", "a"))
    assert not list(files.glob("*out*"))


def test_overlap_of_training_data_needs_no_model(files, capsys):
    asked = "How many of the nineteen apples are left when Tom has eaten four and Ann has eaten seven?"
    (files / "gsm8k_test.jsonl").write_text(json.dumps({"question": asked, "answer": "#### 8"}) + "\n")
    (files / "train.jsonl").write_text(f'{{"text": "3 + 4"}}\n{{"text": "{asked}"}}\n')
    command = ["--check-overlap", str(files / "train.jsonl"), "--benchmark", "gsm8k", "--data-dir", str(files)]
    evaluate.main([*command, "--output", str(files / "overlap.json")])
    assert f"{files / 'train.jsonl'}, line 2: gsm8k 1, exact: How many" in capsys.readouterr().out
    (found,) = json.loads((files / "overlap.json").read_text())
    assert (found["place"], found["problem"], found["kind"]) == (f"{files / 'train.jsonl'}, line 2", 1, "exact")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--question-field", "query"],
            r"problems\.jsonl, line 1 has no 'query' \(fields: q, a, kind\); set --question-field",
        ),
        (["--data", "{files}/none.jsonl"], r"none\.jsonl: no such file"),
        (["--data", "{files}/empty.jsonl"], r"empty\.jsonl: holds no rows"),
        (["--data", "{files}/latin.jsonl"], r"latin\.jsonl, line 2: cannot be read as UTF-8"),
        (["--perplexity", "{files}/none.txt"], r"none\.txt: cannot be read"),
        (["--output", "{files}/problems.jsonl"], "already exists.*--overwrite"),
        (["--output", "{files}", "--overwrite"], "is a folder"),
        (["--data-dir", "{files}"], "--data-dir goes with --benchmark"),
        (["--pattern", "("], "not a regular expression"),
        (["--template", "none"], r"lacks \{question\}"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--samples", "-1"], "--samples -1 must be at least 0"),
        (["--tolerance", "nan"], "--tolerance nan must be a finite number"),
        (["--output", "{files}/text.txt/out.json"], r"out\.json cannot be created: .*text\.txt is a file"),
        (["--samples", "2", "--temperature", "inf"], "--temperature inf must be a finite number"),
        (["--template", "{question} {queston}"], r"did you mean \{question\}"),
        (["--chat"], "--chat goes with --template"),
        (["--tolerance", "-0.1"], r"--tolerance -0\.1 must be at least 0"),
        (["--samples", "2", "--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["--samples", "2", "--top-p", "2"], "--top-p 2.0 must be above 0 and at most 1"),
        (["--device", "warp"], "--device warp cannot be used"),
        (["--model", "{files}/none"], "no such folder"),
        (["--max-new-tokens", "4000"], "positions"),
        (["--perplexity", "{files}/text.txt", "--window", "5000"], "less than one window"),
        (["--routing-before", "{files}"], "goes with --routing or --routing-analysis"),
        (
            ["--routing", "--solution-field", "a", "--routing-before", "a", "b"],
            "--routing compares with one checkpoint",
        ),
        (["--routing-teacher", "{files}"], "goes with --routing-analysis"),
        (["--routing-targets", "{files}"], "goes with --routing-teacher"),
        (["--routing-analysis", "--samples", "2"], "leave out --samples"),
        (["--routing-analysis", "--output", "{files}/page.html"], "is for the numbers"),
        (["--routing-analysis", "--routing-teacher", "{files}"], r"padd_targets\.safetensors: no such file"),
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


def test_a_perplexity_that_is_not_finite_is_told_before_any_response(files, tmp_path):
    broken = tiny_student(vocabulary=len(VOCABULARY))
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    character_tokenizer().save_pretrained(tmp_path / "broken")
    before = sorted(files.iterdir())
    with pytest.raises(UserError, match="the perplexity is not finite"):
        evaluate.main(arguments(tmp_path / "broken", files, "--perplexity", str(files / "text.txt"), "--window", "16"))
    assert sorted(files.iterdir()) == before


def test_nothing_to_evaluate_is_refused(model, files):
    with pytest.raises(UserError, match="give --benchmark, --data or --perplexity"):
        evaluate.main(["--model", str(model), "--output", str(files / "out.json")])
    text = ["--perplexity", str(files / "text.txt")]
    with pytest.raises(UserError, match="--model is missing"):
        evaluate.main([*text, "--output", str(files / "out.json")])
    with pytest.raises(UserError, match="--samples goes with"):
        evaluate.main(["--model", str(model), "--output", str(files / "out.json"), *text, "--samples", "2"])
