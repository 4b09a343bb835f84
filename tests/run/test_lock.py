"""One process per run folder."""

import os
import socket
from pathlib import Path

import pytest

from padd_ds.errors import UserError
from padd_ds.run.lock import run_lock


def test_a_folder_is_held_once_and_then_free_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_lock(folder):
        with pytest.raises(UserError, match=f'{socket.gethostname()}.*"pid": {os.getpid()}'), run_lock(folder):
            pass
        with run_lock(tmp_path / "other"):
            pass
    with run_lock(folder):
        pass
