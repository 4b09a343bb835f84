"""The work folder: resumed with the same fingerprint, emptied with another, gone after a refusal."""

import shutil
from pathlib import Path

import pytest
import torch

from padd_ds.conversion import work
from padd_ds.conversion.work import partial_folder, save_tensors, work_folder
from padd_ds.errors import UserError


class Killed(BaseException):
    pass


def leave_two_layers(output: Path, fingerprint: dict[str, int]) -> None:
    with pytest.raises(Killed), work_folder(output, fingerprint) as folder:
        for layer in range(2):
            states = {"states": torch.full((3,), float(layer))}
            folder.finish_layer(layer, states, {"target": torch.tensor([layer])}, {"layer": layer})
        (folder.result / "shard").write_text("one")
        (folder.result / ".tmpa1B2c3").write_text("what safetensors leaves when it is killed")
        raise Killed


def test_finished_layers_are_taken_up(tmp_path: Path) -> None:
    output = tmp_path / "student"
    leave_two_layers(output, {"seed": 1})
    assert not output.exists()
    with work_folder(output, {"seed": 1}) as folder:
        assert folder.layers_done() == 2
        assert folder.states_after(1)["states"].tolist() == [1, 1, 1]
        assert [int(folder.record_of(layer)[0]["target"]) for layer in range(2)] == [0, 1]
        assert folder.record_of(1)[1] == {"layer": 1}
        assert (folder.result / "shard").read_text() == "one"
    assert [path.name for path in output.iterdir()] == ["shard"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_states_without_their_record_do_not_count(tmp_path: Path) -> None:
    output = tmp_path / "student"
    leave_two_layers(output, {"seed": 1})
    (partial_folder(output) / "layer-00001.safetensors").unlink()
    with work_folder(output, {"seed": 1}) as folder:
        assert folder.layers_done() == 1


def test_another_fingerprint_starts_anew(tmp_path: Path) -> None:
    output = tmp_path / "student"
    leave_two_layers(output, {"seed": 1})
    with work_folder(output, {"seed": 2}) as folder:
        assert folder.layers_done() == 0
        assert list(folder.result.iterdir()) == []


def test_refusal_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong"), work_folder(tmp_path / "student", {}):
        raise UserError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=r"the disk is full.*stays in .*\.student\.partial")
    with refused, work_folder(tmp_path / "student", {}) as folder:
        folder.finish_layer(0, {}, {}, {})
        raise OSError(28, "No space left on device")
    with work_folder(tmp_path / "student", {}) as folder:
        assert folder.layers_done() == 1


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with work_folder(tmp_path / "student", {}) as folder:
        folder.finish_layer(0, {}, {}, {})
        with pytest.raises(UserError, match="another process is writing it"), work_folder(tmp_path / "student", {}):
            pass
        assert folder.layers_done() == 1


def test_file_that_is_being_written_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(work, "save_file", torn)
    with pytest.raises(Killed):
        save_tensors(tmp_path / "shard.safetensors", {"a": torch.zeros(2)})
    assert not (tmp_path / "shard.safetensors").exists()


def test_what_a_kill_behind_the_move_has_left_is_not_taken_up(tmp_path: Path) -> None:
    left = tmp_path / ".student.partial"
    with work_folder(tmp_path / "student", {"a": 1}) as work:
        work.finish_layer(0, {"x": torch.ones(1)}, {}, {})
        shutil.copytree(left, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "result")
    (tmp_path / "copy").rename(left)
    (tmp_path / "student").rename(tmp_path / "elsewhere")
    with work_folder(tmp_path / "student", {"a": 1}) as work:
        assert work.layers_done() == 0
