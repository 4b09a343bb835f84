"""Reading of a teacher's weights from safetensors, whole tensors or some of their rows.

Shapes: V vocabulary, D model width, F neurons of the FFN, R rows of a tensor.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from padd_ds.conversion.families import Family, head_dim_of, teacher_tensors
from padd_ds.errors import UserError
from padd_ds.files import sha256_of
from padd_ds.hf import offline_remedy

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWNLOADED = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.py",
    "README.md",
    "LICEN[SC]E*",
    "NOTICE*",
]
CHUNK_BYTES = 1 << 23
LENGTH_BYTES = 8  # of the number that a safetensors file begins with: how long its header is
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a header says of a tensor; its values are the bytes `start` to `stop` of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


Header = dict[str, StoredTensor]


@dataclass(frozen=True, kw_only=True)
class TeacherWeights:
    """Where every tensor of a checkpoint folder lies; no values are held in memory.

    file_of: file name of every tensor. stored: what the headers say of it. sha256: hexadecimal, by file name, of the
    weight files and config.json.
    """

    folder: Path
    file_of: dict[str, str]
    stored: Header
    sha256: dict[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the stored dtype, mapped from disk."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor in the stored dtype, mapped from disk."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return file.get_slice(name)[start:stop]

    def pick(self, name: str, ids_R: torch.Tensor) -> torch.Tensor:
        """[R, ...]: the rows `ids_R` of a tensor in the stored dtype; nothing but them is read.

        IndexError for a row that the tensor does not have.
        """
        stored = self.stored[name]
        n_rows, *row_shape = stored.shape
        row_bytes = math.prod(row_shape) * stored.dtype.itemsize
        picked = torch.empty(len(ids_R), *row_shape, dtype=stored.dtype)
        target = memoryview(picked.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with (self.folder / self.file_of[name]).open("rb", buffering=0) as file:
            for place, row in enumerate(ids_R.tolist()):
                if not 0 <= row < n_rows:
                    raise IndexError(f"{name} has {n_rows} rows and no row {row}")
                file.seek(stored.start + row * row_bytes)
                _fill(file, target[place * row_bytes : (place + 1) * row_bytes])
        return picked

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self.stored[name].dtype

    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(one.stop - one.start for one in self.stored.values())

    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return [self.folder / name for name in sorted(set(self.file_of.values()))]


def local_folder(source: str) -> Path:
    """The folder of a teacher: itself, or a snapshot of the hub repository."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        remedy = offline_remedy(source, error) or "; give a local folder"
        raise UserError(f"{source}: could not be downloaded ({type(error).__name__}){remedy}") from error


def open_weights(folder: Path, required: list[str], what: str = "teacher") -> TeacherWeights:
    """Index the weights of `folder` and check that they are whole; every file is read once, from start to end.

    UserError for: no safetensors, an index that is damaged or empty, a missing shard, a truncated file, index and
    shards at odds, a tensor in two shards, a missing tensor of `required`, a tensor with NaN or infinity. `what`
    names the model in the progress bar.
    """
    index = _read_index(folder)
    shards = [SINGLE] if index is None else sorted(set(index.values()))
    headers = {shard: _read_header(folder / shard) for shard in shards}
    file_of = _locate(folder, headers)
    if index is not None:
        _check_index(folder, index, file_of)
    for tensor in required:
        if tensor not in file_of:
            raise UserError(f"{folder}: tensor {tensor} is missing from its weights; the checkpoint is not complete")
    sha256 = {"config.json": sha256_of(folder / "config.json")}
    total = sum((folder / shard).stat().st_size for shard in shards)
    buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)]
    with tqdm(total=total, desc=f"checking the {what}", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for shard, header in headers.items():
            sha256[shard] = _check_shard(folder / shard, header, buffers, bar)
    stored = {name: one for header in headers.values() for name, one in header.items()}
    return TeacherWeights(folder=folder, file_of=file_of, stored=stored, sha256=sha256)


def check_shapes(config: Any, family: Family, weights: TeacherWeights) -> None:
    """UserError for a tensor whose shape is not the one that the config asks for; reads no values."""
    in_layer = _layer_shapes(config)
    outside = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
        "lm_head.weight": (config.vocab_size, config.hidden_size),
    }
    for name in teacher_tensors(config, family):
        expected = outside.get(name) or in_layer[name.split(".", 3)[3]]
        if weights.shape(name) != expected:
            raise UserError(
                f"{weights.folder / weights.file_of[name]}: tensor {name} is {list(weights.shape(name))}, and "
                f"config.json asks for {list(expected)}; put the config.json of these weights beside them"
            )


def check_tied(config: Any, weights: TeacherWeights) -> None:
    """UserError for a config that ties the head to the embedding over weights that hold two different ones.

    transformers leaves such a head untied, against the config.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tie_word_embeddings or head not in weights.file_of:
        return
    if weights.shape(head) != weights.shape(embedding) or not torch.equal(
        weights.tensor(head), weights.tensor(embedding)
    ):
        raise UserError(
            f"{weights.folder}: tie_word_embeddings is true in config.json, and {head} differs from {embedding}; "
            "set it to false to use both, or delete the head"
        )


def _read_index(folder: Path) -> dict[str, str] | None:
    """File name of every tensor as the index tells it, or None where there is a single file without an index."""
    path = folder / INDEX
    if not path.is_file():
        if (folder / SINGLE).is_file():
            return None
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; save the teacher as safetensors")
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged index ({error}); copy the checkpoint again") from error
    if not index:
        raise UserError(f"{path}: the index names no tensors; copy the checkpoint again")
    for tensor, shard in index.items():
        if not isinstance(shard, str):
            raise UserError(f"{path}: damaged index (no file name for tensor {tensor}); copy the checkpoint again")
        if not (folder / shard).is_file():
            raise UserError(
                f"{folder}: shard {shard} is named in {INDEX} but missing, and with it {tensor}; "
                "copy the checkpoint again"
            )
    if (folder / SINGLE).is_file() and SINGLE not in index.values():
        raise UserError(f"{folder}: both {SINGLE} and an {INDEX} of other files; delete the ones that are not meant")
    return index


def _read_header(path: Path) -> Header:
    """What a safetensors file holds, in order of place; UserError unless the file is as long as its header says."""
    try:
        with safe_open(path, framework="pt"):  # checks the header, and the length of the file against it
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
            entries = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    entries.pop("__metadata__", None)
    data_start = LENGTH_BYTES + header_bytes
    header = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in STORED_DTYPES:
            raise UserError(
                f"{path}: tensor {name} is stored as {entry['dtype']}; use a checkpoint in float32, bfloat16 or float16"
            )
        start, stop = (data_start + offset for offset in entry["data_offsets"])
        dtype, shape = STORED_DTYPES[entry["dtype"]], tuple(entry["shape"])
        header[name] = StoredTensor(dtype=dtype, shape=shape, start=start, stop=stop)
    return header


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: truncated or damaged safetensors ({error}); copy the checkpoint again")


def _locate(folder: Path, headers: dict[str, Header]) -> dict[str, str]:
    file_of: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header:
            other = file_of.setdefault(name, shard)
            if other != shard:
                raise UserError(f"{folder}: tensor {name} is in both {other} and {shard}; copy the checkpoint again")
    return file_of


def _check_index(folder: Path, index: dict[str, str], file_of: dict[str, str]) -> None:
    for name, shard in index.items():
        if file_of.get(name) != shard:
            place = f"in {file_of[name]}" if name in file_of else "in no shard"
            raise UserError(
                f"{folder}: {INDEX} names {shard} for tensor {name}, which is {place}; copy the checkpoint again"
            )
    for name in file_of.keys() - index.keys():
        raise UserError(f"{folder / file_of[name]}: tensor {name} is not named in {INDEX}; copy the checkpoint again")


def _check_shard(path: Path, header: Header, buffers: list[memoryview], bar: tqdm) -> str:
    """SHA-256 of a file, read once; UserError for a tensor with NaN or infinity.

    A second thread hashes a chunk while this one checks it and reads the next.
    """
    digest = hashlib.sha256()
    hashing: Future[None] | None = None
    try:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as hasher:
            for name, chunk in _chunks(file, header, buffers):
                if hashing is not None:
                    hashing.result()
                hashing = hasher.submit(digest.update, chunk)
                if name is not None and not _is_finite(chunk, header[name].dtype):
                    raise UserError(
                        f"{path}: tensor {name}{_layer_of(name)} holds NaN or infinite values; use a sound checkpoint"
                    )
                bar.update(len(chunk))
    except OSError as error:
        raise _damaged(path, error) from error
    return digest.hexdigest()


def _chunks(file: BinaryIO, header: Header, buffers: list[memoryview]) -> Iterator[tuple[str | None, memoryview]]:
    """The bytes of a file in order, with the tensor that they belong to, in chunks of up to CHUNK_BYTES.

    They lie in the two `buffers` in turn: a chunk is gone when the one after the next is asked for.
    """
    data_start = min((one.start for one in header.values()), default=os.fstat(file.fileno()).st_size)
    parts = [(None, 0, data_start), *((name, one.start, one.stop) for name, one in header.items())]
    for name, start, stop in parts:
        for place in range(start, stop, CHUNK_BYTES):
            chunk = buffers[0][: min(CHUNK_BYTES, stop - place)]
            _fill(file, chunk)
            yield name, chunk
            buffers.reverse()


def _fill(file: BinaryIO, target: memoryview) -> None:
    """Read as many bytes as `target` has; OSError where the file ends before."""
    filled = 0
    while filled < len(target):
        n_read = file.readinto(target[filled:])  # type: ignore[attr-defined]
        if not n_read:
            raise OSError(f"the file ends {len(target) - filled} bytes early")
        filled += n_read


def _is_finite(chunk: memoryview, dtype: torch.dtype) -> bool:
    if not dtype.is_floating_point:
        return True
    values = torch.frombuffer(chunk, dtype=dtype)
    if dtype.itemsize == 1:
        values = values.float()
    # Both are NaN where a value is; many times faster than isfinite.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(values))


def _layer_of(name: str) -> str:
    parts = name.split(".")
    return f" (layer {parts[2]})" if parts[:2] == ["model", "layers"] else ""


def _layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a layer of any family may hold, by name within the layer."""
    width, ffn, head = config.hidden_size, config.intermediate_size, head_dim_of(config)
    key_value = config.num_key_value_heads * head
    rows = {"q": config.num_attention_heads * head, "k": key_value, "v": key_value}
    return {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        **{f"self_attn.{part}_proj.weight": (size, width) for part, size in rows.items()},
        **{f"self_attn.{part}_proj.bias": (size,) for part, size in rows.items()},
        **{f"self_attn.{part}_norm.weight": (head,) for part in "qk"},
        "self_attn.o_proj.weight": (width, rows["q"]),
        "mlp.gate_proj.weight": (ffn, width),
        "mlp.up_proj.weight": (ffn, width),
        "mlp.down_proj.weight": (width, ffn),
    }
