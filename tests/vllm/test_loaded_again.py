"""Updates of weights from the same files."""

from pathlib import Path

from tests.vllm.conftest import save_student
from tests.vllm.scripts import run_script


def test_files_that_come_again_are_loaded_as_vllms_loader_does(tmp_path: Path) -> None:
    # All kinds of weights that padd-convert writes.
    student = save_student(tmp_path / "student", dense_layers=1, attention_bias=True, use_qk_norm=True)
    assert "AS BEFORE" in run_script("loaded_again.py", str(student))
