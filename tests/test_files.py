"""Outputs that appear whole or not at all, and disks that are full."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from padd_ds import files
from padd_ds.errors import UserError
from padd_ds.files import check_output_free, disk_full_is_user_error, staged_directory, write_text_whole
from padd_ds.run.folder import check_run_folder

# A device that answers every write as a full disk does.
FULL = Path("/dev/full")


def write_plain() -> None:
    with FULL.open("w") as file:
        file.write("text")


WRITERS: dict[str, Callable[[], None]] = {
    "plain": write_plain,
    "torch": lambda: torch.save({"weights": torch.zeros(1000)}, FULL),
}


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_told_whoever_writes(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 0)
    with pytest.raises(UserError, match="the disk is full"), disk_full_is_user_error(tmp_path):
        WRITERS[writer]()


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_short_write_on_a_disk_with_room_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 2**40)
    with pytest.raises(RuntimeError), disk_full_is_user_error(tmp_path):
        WRITERS["torch"]()


def test_staged_folder_is_gone_after_an_error_and_the_old_one_stays(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(RuntimeError, match="half way"), staged_directory(output, overwrite=True) as staged:
        save_file({"weights": torch.zeros(3)}, staged / "new.safetensors")
        raise RuntimeError("half way")
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert [path.name for path in output.iterdir()] == ["old"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for below in ("o.json", "folder/o.json"):
        with pytest.raises(UserError, match=r"o\.json cannot be created: .*file is a file, not a folder"):
            check_output_free(tmp_path / "file" / below, overwrite=True)
    with pytest.raises(UserError, match="file is a file, not a folder"):
        check_run_folder(tmp_path / "file" / "run", resume=False)


def test_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_whole(path, "half \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_outputs_have_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with staged_directory(tmp_path / "output") as staged:
            save_file({"weights": torch.zeros(3)}, staged / "model.safetensors")
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "output", *(tmp_path / "output").iterdir()]}
    assert modes == {"output": 0o750, "model.safetensors": 0o640}
