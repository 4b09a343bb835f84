"""Teachers and calibration data that the tests of the conversion share."""

from pathlib import Path

import pytest

from tests.conversion.tiny_teachers import make_teacher, write_calibration_text


@pytest.fixture(scope="session")
def llama_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("llama") / "teacher", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration_text(tmp_path_factory.mktemp("data") / "calibration.txt")
