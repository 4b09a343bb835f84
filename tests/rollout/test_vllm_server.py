"""A server process lives as long as its starter, and says why where it does not start."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import UserError
from padd_ds.rollout.vllm.server import KEEPER, Server, check_installed

FAMILY = """
import os, signal, subprocess, sys, time
{before}
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
open(sys.argv[1], "w").write(" ".join(str(pid) for pid in [os.getpid(), *[child.pid for child in children]]))
time.sleep(60)
"""
STARTER = """
import subprocess, sys, time
keeper = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(60)
"""


def until(condition: Callable[[], Any]) -> Any:
    for _ in range(200):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def pids_in(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text(encoding="utf-8").split()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return False
    return state != "Z"


def kept(tmp_path: Path, before: str = "") -> tuple[list[str], Path, Path]:
    """Arguments of Python that keep a family of three processes, the file of its pids, and its folder."""
    pids, folder = tmp_path / "pids", tmp_path / "weights"
    folder.mkdir()
    family = FAMILY.format(before=before)
    return [str(KEEPER), str(folder), sys.executable, "-c", family, str(pids)], pids, folder


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGTERM, signal.SIG_DFL)"])
def test_a_family_ends_with_its_starter_however_that_ends(tmp_path: Path, before: str) -> None:
    arguments, pids, folder = kept(tmp_path, before)
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *arguments])
    family = until(lambda: pids_in(pids) if len(pids_in(pids)) == 3 else None)
    assert all(map(alive, family)) and folder.exists()
    starter.kill()
    starter.wait()
    until(lambda: not any(map(alive, family)) and not folder.exists())


def test_a_family_that_is_stopped_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, pids, folder = kept(tmp_path)
    shortened = tmp_path / "keeper.py"
    source = KEEPER.read_text(encoding="utf-8")
    assert "PATIENCE_S = 10.0" in source
    shortened.write_text(source.replace("PATIENCE_S = 10.0", "PATIENCE_S = 0.3"), encoding="utf-8")
    keeper = subprocess.Popen([sys.executable, str(shortened), *arguments[1:]], stdin=subprocess.PIPE)
    family = until(lambda: pids_in(pids) if len(pids_in(pids)) == 3 else None)
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    assert keeper.stdin is not None
    keeper.stdin.close()
    keeper.wait(timeout=10)
    assert not any(map(alive, family)) and not folder.exists()


def test_a_family_that_is_asked_to_end_leaves_the_weights(tmp_path: Path) -> None:
    """They are wanted when it is started again."""
    arguments, pids, folder = kept(tmp_path)
    keeper = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE)
    family = until(lambda: pids_in(pids) if len(pids_in(pids)) == 3 else None)
    keeper.communicate(b"\n", timeout=15)
    assert not any(map(alive, family)) and folder.exists()


def test_a_launchers_signals_do_not_take_the_keeper_from_its_family(tmp_path: Path) -> None:
    arguments, pids, _ = kept(tmp_path)
    keeper = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE)
    family = until(lambda: pids_in(pids) if len(pids_in(pids)) == 3 else None)
    for number in (signal.SIGINT, signal.SIGTERM):
        keeper.send_signal(number)
    time.sleep(0.2)
    assert keeper.poll() is None and all(map(alive, family))
    keeper.communicate(timeout=15)


def test_the_keeper_ends_as_the_command_does(tmp_path: Path) -> None:
    arguments = [str(KEEPER), str(tmp_path), sys.executable, "-c", "raise SystemExit(7)"]
    keeper = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE)
    assert keeper.wait(timeout=15) == 7 and tmp_path.exists()


def python_that(tmp_path: Path, does: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def server(tmp_path: Path, **options: Any) -> Server:
    return Server(
        model="student",
        dtype="float32",
        max_model_tokens=64,
        options=VllmConfig(**options),
        folder=tmp_path / "weights",
        log_path=tmp_path / "server.log",
        port=options.get("port", 0),
    )


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("ValueError: Model architectures ['OddForCausalLM'] are not supported for now.", "does not know the model's"),
        ("ValueError: Free memory on device (3/80 GiB) on startup is less than desired", "lower vllm.memory_share"),
        ("ValueError: No available memory for the cache blocks.", "lower vllm.memory_share"),
        ("ValueError: To serve, 9 GiB KV cache is needed, larger than the available KV cache memory", "vllm.cache_gib"),
        ("api_server.py: error: unrecognized arguments: --no-such", "vllm.arguments: unrecognized arguments"),
        ("SomethingError: planted", "SomethingError: planted"),
        ("", "it ended without a word"),
    ],
)
def test_why_a_server_does_not_start_is_told_in_a_line(tmp_path: Path, log: str, told: str) -> None:
    one = server(tmp_path, python=python_that(tmp_path, f'echo "{log}"; exit 1'))
    one.start()
    with pytest.raises(UserError) as error:
        one.wait_until_ready()
    assert told in str(error.value) and "server.log" in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    one = server(tmp_path, python=python_that(tmp_path, "exec sleep 60"), start_timeout_s=0.5)
    one.start()
    with pytest.raises(UserError, match=r"vllm\.start_timeout_s"):
        one.wait_until_ready()
    assert one._keeper is None


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"vllm.port {port} is taken"):
            server(tmp_path, port=port).start()


def test_the_server_is_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "kept")
    found = server(tmp_path, environment={"OMP_NUM_THREADS": "3"}).environment()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"} & set(found)
    assert found["HF_HOME"] == "kept" and found["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("echo", "has no vLLM; install the extra"),
        ("echo 0.11.2", "has vLLM 0.11.2, but versions 0.32"),
        ("echo 1.0.0", "has vLLM 1.0.0, but"),
        ("exit 3", "does not run"),
    ],
)
def test_an_environment_without_the_right_vllm_is_refused(tmp_path: Path, does: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_installed(VllmConfig(python=python_that(tmp_path, does)))
    check_installed(VllmConfig(python=python_that(tmp_path, "echo 0.32.0")))


def test_a_python_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not run"):
        check_installed(VllmConfig(python=str(tmp_path / "none")))
