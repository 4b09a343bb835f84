"""Scripts beside the tests that run inside vLLM's Python, which has no pytest."""

import os
import subprocess
from pathlib import Path

from tests.train_inputs import REPOSITORY
from tests.vllm.conftest import PYTHON


def run_script(name: str, *arguments: str) -> str:
    """What it prints; AssertionError with its last words where it fails."""
    command = [str(PYTHON), str(Path(__file__).with_name(name)), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
