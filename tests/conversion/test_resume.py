"""A conversion that is killed at any moment goes on where it was, to the same bytes."""

from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conversion.tiny_teachers import make_teacher


@pytest.mark.slow
def test_killed_at_random_moments_the_result_has_the_same_bytes(tmp_path: Path, calibration_file: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", num_hidden_layers=8)
    (tmp_path / "output").mkdir()
    words = ["-m", "tests.conversion.killing", teacher, calibration_file, tmp_path / "output"]
    result = run_command(*words, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("20 kills")
