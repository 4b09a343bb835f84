"""One process tree per folder of a run, or of an evaluation."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from padd_ds.errors import UserError

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path, work: str = "trains", instead: str = "another run_dir") -> Iterator[None]:
    """Make `folder` where it is not there, and hold it as long as the block runs, or until the process dies.

    UserError where another process holds it; it says what `work` that does and what to choose `instead`. A file system
    without locks is told of and works without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: another process {work} in this folder ({file.read().strip()}); "
                f"wait for it, end it, or choose {instead}"
            ) from None
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error}); start one job at a time in it", file=sys.stderr)
        file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield
