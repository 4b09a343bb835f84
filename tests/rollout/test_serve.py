"""padd-serve as a process, with a server that only answers as vLLM's does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from padd_ds.rollout.vllm.client import Client
from padd_ds.rollout.vllm.server import is_healthy
from tests.rollout.fake_vllm import fake_interpreter


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    (tmp_path / "ds.json").write_text("{}")
    run = {
        "stage": "joint",
        "run_dir": f"{tmp_path}/run",
        "deepspeed": f"{tmp_path}/ds.json",
        "steps": 1,
        "model": {"student": f"{tmp_path}/student", "teacher": "t"},
        "data": {"source": "d"},
        "optimizer": {"learning_rate": 1},
        "vllm": {
            "python": fake_interpreter(tmp_path / "python"),
            "servers": f"{tmp_path}/urls",
            "transport": "network",
            "max_restarts": 1,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    started = []

    def start(*more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "padd_ds.serve", "--config", f"{tmp_path}/run.yaml"]
        command += ["--urls", f"{tmp_path}/urls", "--host", "127.0.0.1", *more]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=30)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_ends_is_started_again_and_none_is_left(
    serve: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process, urls = serve(), tmp_path / "urls"
    wait_until(urls.exists)
    (url,) = urls.read_text().split()
    client = Client(url, 5)
    client.begin_update()
    client.end_update("3")
    process.send_signal(signal.SIGUSR1)
    client.end()
    wait_until(client.is_new)
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""
    lines = told.splitlines()
    assert lines[0] == f"ready: {url}"
    assert lines[1].startswith(f"{url} ended and is started again: it ended without a word; see {tmp_path}/server_")
    assert not is_healthy(url) and not urls.exists()


def test_a_server_that_does_not_start_is_told_in_one_line(
    serve: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    (tmp_path / "python").write_text(
        "#!/bin/sh\n[ $1 = -c ] && echo 0.32.0 || echo ValueError: planted; echo WARNING OSError: no cause; exit 0\n"
    )
    process = serve()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: the vLLM server did not start: ValueError: planted; see ")
    assert errors.count("\n") == 1 and not (tmp_path / "urls").exists()
