"""Tests with a real vLLM: `make test-vllm` sets PADD_VLLM_PYTHON, the Python that has it; without they are skipped."""

import os
from pathlib import Path
from typing import Any

import pytest

from padd_ds.config.sections import VllmConfig
from padd_ds.rollout.vllm.server import Server
from tests.tiny import tiny_student
from tools.tiny_model import make_tokenizer

PYTHON = os.environ.get("PADD_VLLM_PYTHON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if PYTHON is None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="PADD_VLLM_PYTHON names no Python with vLLM; make test-vllm does"))


def vllm_options(**options: Any) -> VllmConfig:
    """A small server on a CPU, which starts without compiling and reads few prompts at once."""
    arguments = ["--enforce-eager", "--max-num-seqs", "64", "--max-num-batched-tokens", "64"]
    return VllmConfig(python=PYTHON, cache_gib=0.25, arguments=arguments, **options)


def save_student(folder: Path, **more: Any) -> Path:
    """A tiny student with heads as wide as vLLM's CPU attention wants them; `more` of `tiny_student`."""
    tiny_student(vocabulary=len(make_tokenizer()), head_dim=32, **more).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def tiny_server(folder: Path) -> Server:
    """A server of `save_student`'s model, not yet started."""
    return Server(
        model=str(save_student(folder / "student")),
        dtype="float32",
        max_model_tokens=64,
        options=vllm_options(),
        folder=folder / "weights",
        log_path=folder / "server.log",
    )
