"""Tensors through files that both sides map."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from padd_ds.rollout.vllm.exchange import WeightBoard, WeightFiles, read_part


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "bias": torch.tensor([1.5]),
    }


def test_readers_see_what_was_written(tmp_path: Path) -> None:
    board, written = WeightBoard(tmp_path, 0), tensors()
    board.write("layer", written)
    board.write("nothing", {})
    (part,) = board.parts
    read = dict(read_part(part))
    assert list(read) == list(written)
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_a_second_writing_is_seen_where_the_first_was_read(tmp_path: Path) -> None:
    board = WeightBoard(tmp_path, 0)
    board.write("layer", tensors())
    read = dict(read_part(board.parts[0]))
    again = tensors()
    board.write("layer", again)
    assert torch.equal(read["a"], again["a"])
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_may_be_parts_of_others(tmp_path: Path) -> None:
    stacked = torch.randn(4, 6, 3)
    board = WeightBoard(tmp_path, 0)
    board.write("experts", {f"e{place}": part.T for place, part in enumerate(stacked)})
    for place, (_, read) in enumerate(read_part(board.parts[0])):
        assert torch.equal(read, stacked[place].T)


def test_other_tensors_under_a_label_are_refused(tmp_path: Path) -> None:
    board = WeightBoard(tmp_path, 0)
    board.write("layer", tensors())
    with pytest.raises(ValueError, match="zip"):
        board.write("layer", {"a": torch.zeros(3, 5)})


def test_a_full_device_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """posix_fallocate fails at once, where a sparse file would kill the process as it is filled."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import torch; from pathlib import Path\n"
        "from padd_ds.rollout.vllm.exchange import WeightBoard\n"
        "try: WeightBoard(Path(sys.argv[1]), 0).write('x', {'w': torch.zeros(10000)})\n"
        "except OSError as error: print('refused', error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused")


def test_files_for_other_nodes_get_a_new_name_with_every_writing(tmp_path: Path) -> None:
    files, written = WeightFiles(tmp_path, 3), tensors() | {"scalar": torch.tensor(2.5), "T": torch.randn(4, 6).T}
    for _ in range(2):
        written["a"] = torch.randn(3, 5)
        files.write("layer", written)
        files.write("nothing", {})
        (part,) = files.parts
        read = dict(read_part(part | {"path": part["path"] + files.suffix}))
        assert list(read) == list(written)
        for name, tensor in written.items():
            assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["rank00003-layer.weights.2"]
