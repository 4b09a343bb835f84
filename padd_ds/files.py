"""Outputs that appear whole or not at all."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from padd_ds.errors import UserError

ALMOST_FULL_BYTES = 1 << 24
CHUNK_BYTES = 1 << 22
DISK_FULL_HINT = "the last whole checkpoint stays; free some space and go on with --resume"
"""What a run has to say that can be continued."""


def check_output_free(path: Path, overwrite: bool) -> None:
    """Refuse an output that exists (unless `overwrite`) or whose parent cannot be written."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists; choose another output or pass --overwrite")
    check_creatable(path)


def check_creatable(path: Path) -> None:
    """UserError for a path below a file or in a folder that cannot be written."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{path} cannot be created: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be created: no permission to write in {parent}")


@contextmanager
def staged_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path` when the block ends without error.

    On any exception the staged folder is deleted and `path` is left as it was. A full disk
    becomes a UserError. An existing `path` is replaced only with `overwrite`, by rename.
    """
    check_output_free(path, overwrite)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.absolute().parent))
    try:
        with disk_full_is_user_error(path):
            yield staged
        give_usual_modes(staged)
        replace_folder(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def give_usual_modes(folder: Path) -> None:
    """Let the umask decide who may read a folder and its files; safetensors and tempfile write for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_text_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with disk_full_is_user_error(path):
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def disk_full_is_user_error(
    path: Path, hint: str = "nothing was kept; free some space or choose another output"
) -> Iterator[None]:
    """Turn "no space left", as the system, safetensors and torch report it, into a UserError that ends in `hint`."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error, path):
            raise
        raise UserError(f"{path}: the disk is full ({free_bytes(path) / 2**30:.2f} GiB free); {hint}") from error


def _is_disk_full(error: Exception, path: Path) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(words in str(error) for words in ("No space left on device", "os error 28")):
        return True
    # torch.save tells of a short write only, so the disk itself has to be asked.
    short_write = any(words in str(error) for words in ("iostream error", "unexpected pos"))
    return short_write and free_bytes(path) < ALMOST_FULL_BYTES


def free_bytes(path: Path) -> int:
    """Bytes that may still be written beside `path`, which need not exist."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def replace_folder(staged: Path, path: Path) -> None:
    """Give `staged` the name `path`; what stood there is deleted afterwards."""
    if not path.exists():
        os.rename(staged, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.absolute().parent))
    os.rename(path, old / path.name)
    os.rename(staged, path)
    shutil.rmtree(old)


def delete_unfinished_tensors(folder: Path) -> None:
    """Delete what safetensors left in `folder` and below when it was killed: it writes to a file `.tmp*` first."""
    for path in folder.rglob(".tmp*"):
        path.unlink()
