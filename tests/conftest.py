"""Shared test set-up: one thread per process, no network, build caches of their own."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    # A run that was killed while building an op leaves a lock in the shared cache and blocks the next one.
    TORCH_EXTENSIONS_DIR=tempfile.mkdtemp(prefix="padd-test-extensions-"),
)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parent.parent
