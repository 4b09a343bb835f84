"""Updates of weights from the same files."""

import os
import subprocess
from pathlib import Path

from tests.train_inputs import REPOSITORY
from tests.vllm.conftest import PYTHON, save_student


def test_files_that_come_again_are_loaded_as_vllms_loader_does(tmp_path: Path) -> None:
    script = Path(__file__).with_name("loaded_again.py")
    # All kinds of weights that padd-convert writes.
    student = save_student(tmp_path / "student", dense_layers=1, attention_bias=True, use_qk_norm=True)
    command = [str(PYTHON), str(script), str(student)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "AS BEFORE" in done.stdout
