"""The whole path at its smallest size, by the commands that a user runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from padd_ds.conversion.calibration import PADDING, TextFile, token_rows
from tools import tiny_teacher
from tools.demo import DEMOS
from tools.tiny_model import make_tokenizer
from tools.tiny_problems import distinct_problems, write_problems


@pytest.mark.parametrize("size", ["tiny", "smallest"])
def test_a_demo_calibrates_on_no_more_than_its_data_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """The larger sizes are too slow to be run by tests; their data is quick to make."""
    words = DEMOS[size].make_teacher[0]
    own = [word.format(out=tmp_path, seed=0) for word in words[words.index("tools/tiny_teacher.py") :]]
    monkeypatch.setattr(sys, "argv", own)
    args = tiny_teacher._parse()
    problems = distinct_problems(
        "train", args.train_problems, args.seed, args.bare_share, tiny_teacher._options(args).levels
    )
    write_problems(tmp_path / "train.jsonl", problems)
    convert = DEMOS[size].convert
    n_tokens = int(convert[convert.index("--calibration-tokens") + 1])
    file = TextFile(path=tmp_path / "train.jsonl", field="question,solution", part="A")
    assert token_rows(file, "--calibration-tokens", make_tokenizer(), n_tokens).ne(PADDING).sum() == n_tokens


@pytest.mark.slow
@pytest.mark.ranks
def test_the_whole_path_runs_and_leaves_table_and_report(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    command = [sys.executable, "tools/demo.py", "--size", "smallest", "--output", str(output)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = [line.split()[0] for line in done.stdout.splitlines() if line and "FLOPs/token" not in line]
    assert [name for name in ("teacher", "converted", "warmed-up", "joint") if name in table] == [
        "teacher",
        "converted",
        "warmed-up",
        "joint",
    ]
    assert "<svg" in (output / "report.html").read_text(encoding="utf-8")
    for stage, steps in (("warmup", 2), ("joint", 2)):
        lines = (output / "runs" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(steps))
    student = json.loads((output / "students" / "joint" / "config.json").read_text(encoding="utf-8"))
    assert student["architectures"] == ["Glm4MoeForCausalLM"] and not student["tie_word_embeddings"]
