"""The whole path at its smallest size, by the commands that a user runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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
