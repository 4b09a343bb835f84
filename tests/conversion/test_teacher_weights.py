"""A checkpoint's weights: read in parts, checked in one go, and refused in one line where they are not whole."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from padd_ds.conversion import teacher
from padd_ds.conversion.families import FAMILIES, teacher_tensors
from padd_ds.conversion.teacher import (
    INDEX,
    SINGLE,
    TeacherWeights,
    check_shapes,
    check_tied,
    open_weights,
)
from padd_ds.errors import UserError
from tests.conversion.tiny_teachers import make_teacher

Tensors = dict[str, torch.Tensor]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def shards() -> dict[str, Tensors]:
    return {
        FIRST: {EMBEDDING: normal(50, 6).to(torch.bfloat16), "steps": torch.tensor(7), "none": torch.empty(0, 4)},
        SECOND: {UP: normal(9, 5), "model.norm.weight": normal(6).half()},
    }


def write(folder: Path, files: dict[str, Tensors], index: dict[str, str] | None = None) -> Path:
    """A checkpoint folder; its index is the one that belongs to the files unless another is given."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    if index is None:
        index = {tensor: name for name, tensors in files.items() for tensor in tensors}
    if set(files) != {SINGLE}:
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def refusal(folder: Path, required: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        open_weights(folder, required or [])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def weights(tmp_path: Path) -> TeacherWeights:
    return open_weights(write(tmp_path / "model", shards()), [UP])


def test_tensors_come_back_as_they_were_saved(weights: TeacherWeights) -> None:
    for name, tensors in shards().items():
        for tensor, value in tensors.items():
            assert weights.file_of[tensor] == name
            assert torch.equal(weights.tensor(tensor), value)
            assert weights.shape(tensor) == tuple(value.shape)
            assert weights.dtype(tensor) == value.dtype == weights.tensor(tensor).dtype
    assert weights.total() == 50 * 6 * 2 + 8 + 9 * 5 * 4 + 6 * 2
    assert [path.name for path in weights.files()] == [FIRST, SECOND]


def test_rows_and_picked_rows_are_those_of_the_tensor(weights: TeacherWeights) -> None:
    whole_VD = weights.tensor(EMBEDDING)
    assert torch.equal(weights.rows(EMBEDDING, 7, 30), whole_VD[7:30])
    for ids in ([3], [49, 0, 12, 12, 48], []):
        picked_RD = weights.pick(EMBEDDING, torch.tensor(ids, dtype=torch.long))
        assert picked_RD.dtype == torch.bfloat16
        assert torch.equal(picked_RD, whole_VD[ids])
    assert torch.equal(
        weights.pick("model.norm.weight", torch.tensor([5, 1])), weights.tensor("model.norm.weight")[[5, 1]]
    )
    for wrong in (50, -1):
        with pytest.raises(IndexError, match=f"has 50 rows and no row {wrong}"):
            weights.pick(EMBEDDING, torch.tensor([0, wrong]))


@pytest.mark.parametrize("chunk_bytes", [8, 64, 1 << 20])
def test_hashes_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(teacher, "CHUNK_BYTES", chunk_bytes)
    folder = write(tmp_path / "model", shards())
    files = ["config.json", FIRST, SECOND]
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    assert open_weights(folder, []).sha256 == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_is_found_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: float
) -> None:
    monkeypatch.setattr(teacher, "CHUNK_BYTES", 64)
    for place in (0, 7, 8, 40, 64):
        tensor = normal(13, 5).to(dtype)
        tensor.view(-1)[place] = value
        folder = write(tmp_path / "model", {FIRST: {EMBEDDING: normal(4, 4)}, SECOND: {UP: tensor, "z": normal(3)}})
        assert refusal(folder) == (
            f"{folder / SECOND}: tensor {UP} (layer 3) holds NaN or infinite values; use a sound checkpoint"
        )


def test_values_that_only_look_bad_are_taken(tmp_path: Path) -> None:
    largest = {str(dtype): torch.full((300,), torch.finfo(dtype).max, dtype=dtype) for dtype in FLOATS}
    integers = {f"i{n}": torch.full((9,), -1, dtype=dtype) for n, dtype in enumerate([torch.int8, torch.int64])}
    open_weights(write(tmp_path / "model", {SINGLE: {**largest, **integers}}), [])


def without_files(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


def lengthened(folder: Path) -> None:
    with (folder / SECOND).open("ab") as file:
        file.write(b"\0")


def changed_index(**changes: str | None) -> Callable[[Path], None]:
    """Give tensors, by a word of their names, another shard in the index, or none."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        for word, shard in changes.items():
            name = next((name for name in index if word in name), f"model.{word}.weight")
            index.pop(name, None)
            index.update({name: shard} if shard is not None else {})
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))

    return change


def index_text(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / INDEX).write_text(text)


def twice(folder: Path) -> None:
    save_file({**shards()[SECOND], EMBEDDING: normal(50, 6)}, folder / SECOND)


def single_beside(folder: Path) -> None:
    save_file({EMBEDDING: normal(50, 6)}, folder / SINGLE)


def odd_dtype(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data.replace(b'"F16"', b'"I16"').replace(b'"F32"', b'"U32"'))


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (without_files, f"no {SINGLE} and no {INDEX}"),
    (index_text('{"weight_map": {}}'), f"{INDEX}: the index names no tensors"),
    (index_text("{"), f"{INDEX}: damaged index"),
    (index_text("[]"), f"{INDEX}: damaged index"),
    (index_text('{"metadata": {}}'), f"{INDEX}: damaged index"),
    (index_text('{"weight_map": {"a": 1}}'), f"{INDEX}: damaged index (no file name for tensor a)"),
    (lambda folder: (folder / SECOND).unlink(), f"shard {SECOND} is named in {INDEX} but missing, and with it {UP}"),
    (changed_index(up_proj=FIRST), f"{INDEX} names {FIRST} for tensor {UP}, which is in {SECOND}"),
    (changed_index(head=FIRST), f"{INDEX} names {FIRST} for tensor model.head.weight, which is in no shard"),
    (changed_index(up_proj=None), f"{SECOND}: tensor {UP} is not named in {INDEX}"),
    (twice, f"tensor {EMBEDDING} is in both {FIRST} and {SECOND}"),
    (single_beside, f"both {SINGLE} and an {INDEX} of other files"),
    (truncated, f"{SECOND}: truncated or damaged safetensors"),
    (lengthened, f"{SECOND}: truncated or damaged safetensors"),
    (lambda folder: (folder / SECOND).write_text("version https://"), f"{SECOND}: truncated or damaged safetensors"),
    (lambda folder: (folder / SECOND).write_bytes(b""), f"{SECOND}: truncated or damaged safetensors"),
    (odd_dtype, f"{SECOND}: tensor {UP} is stored as U32"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[-40:] for _, message in DAMAGES])
def test_what_is_not_whole_is_named_with_a_remedy(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = write(tmp_path / "model", shards())
    open_weights(folder, [])
    damage(folder)
    assert re.match(rf"{re.escape(str(folder))}.*{re.escape(message)}.*; (copy|save|delete|use) ", refusal(folder))


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", shards())
    assert "tensor model.norm.bias is missing" in refusal(folder, [UP, "model.norm.bias"])


def test_cheap_checks_come_before_the_long_one(tmp_path: Path) -> None:
    files = shards()
    files[FIRST][EMBEDDING][0] = torch.nan
    folder = write(tmp_path / "model", files)
    assert "holds NaN" in refusal(folder)
    assert "tensor x is missing" in refusal(folder, ["x"])
    changed_index(up_proj=None)(folder)
    assert "is not named in" in refusal(folder)


def test_single_file_may_have_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {SINGLE: {UP: normal(3)}})
    (folder / INDEX).write_text(json.dumps({"weight_map": {UP: SINGLE}}))
    assert open_weights(folder, [UP]).file_of == {UP: SINGLE}


def peak_mib() -> float:
    """Largest resident size since the last call, of anonymous and mapped memory together."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib / 1024


def test_large_tensor_is_checked_and_picked_from_in_little_memory(tmp_path: Path) -> None:
    n_rows = 300 * 1024
    header = json.dumps({EMBEDDING: {"dtype": "BF16", "shape": [n_rows, 512], "data_offsets": [0, n_rows * 1024]}})
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(file.tell() + n_rows * 1024)  # 300 MiB that take no place on the disk
    peak_mib()
    before_mib = peak_mib()
    weights = open_weights(tmp_path, [EMBEDDING])
    weights.pick(EMBEDDING, torch.arange(0, n_rows, 100))
    weights.rows(EMBEDDING, 1000, 2000)
    assert peak_mib() - before_mib < 60


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_of_every_family_are_those_of_its_config(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_teacher(tmp_path / "teacher", family, tie_word_embeddings=tied, num_attention_heads=8)
    config, kind = AutoConfig.from_pretrained(folder), FAMILIES[family]
    weights = open_weights(folder, teacher_tensors(config, kind))
    check_shapes(config, kind, weights)
    check_tied(config, weights)
    for name in teacher_tensors(config, kind):
        shape = list(weights.shape(name))
        spoiled = {**weights.stored, name: teacher.StoredTensor(dtype=torch.float32, shape=(2, 3), start=0, stop=24)}
        wrong = TeacherWeights(folder=folder, file_of=weights.file_of, stored=spoiled, sha256={})
        message = f"{folder / SINGLE}: tensor {name} is [2, 3], and config.json asks for {shape}; "
        with pytest.raises(UserError, match=re.escape(message)):
            check_shapes(config, kind, wrong)


def test_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher", tie_word_embeddings=True)
    config = AutoConfig.from_pretrained(folder)
    tensors = {name: open_weights(folder, []).tensor(name).clone() for name in open_weights(folder, []).file_of}
    save_file({**tensors, "lm_head.weight": tensors[EMBEDDING].clone()}, folder / SINGLE)
    check_tied(config, open_weights(folder, []))
    save_file({**tensors, "lm_head.weight": tensors[EMBEDDING] + 1}, folder / SINGLE)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true .* lm_head.weight differs from .*; set it to"):
        check_tied(config, open_weights(folder, []))
    config.tie_word_embeddings = False
    check_tied(config, open_weights(folder, []))
