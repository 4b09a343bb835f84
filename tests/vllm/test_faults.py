"""Servers and trainers of a real vLLM that are struck at random moments.

`make test-vllm` strikes once each; PADD_STRIKES sets another number.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from padd_ds.errors import EXIT_CODE_STOPPED
from padd_ds.rollout.vllm.client import UPDATING
from tests.train_inputs import REPOSITORY, make_inputs
from tests.vllm.conftest import PYTHON, save_student

STRIKES = int(os.environ.get("PADD_STRIKES", "1"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose responses a server draws."""
    folder = make_inputs(tmp_path_factory.mktemp("struck"))
    save_student(folder / "student")
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run["rollout"] = {"engine": "vllm", "prompts": 4, "group_size": 4, "max_new_tokens": 24}
    run["data"] |= {"max_prompt_tokens": 16}
    run["vllm"] = {
        "python": PYTHON,
        "cache_gib": 0.25,
        "answer_timeout_s": 20.0,
        "arguments": ["--enforce-eager", "--max-num-seqs", "64"],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


LAUNCHED: list["subprocess.Popen[bytes]"] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Ends the runs of a test that failed before they ended."""
    yield
    for run in LAUNCHED:
        run.kill()
        run.wait()
    LAUNCHED.clear()


def launch(inputs: Path, name: str, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "padd_ds/train.py", "--config", f"{inputs}/run.yaml", f"run_dir={inputs}/{name}"]
    command += ["checkpoint.every_steps=1000", "log.tensorboard=false", *more]
    with (inputs / f"{name}.log").open("ab") as log:
        LAUNCHED.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT))
    return LAUNCHED[-1]


def metrics(inputs: Path, name: str) -> list[dict[str, Any]]:
    path = inputs / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def servers_of(inputs: Path, name: str) -> list[int]:
    """Process ids of the run's servers, their engines and their workers."""
    log, found = f"{inputs}/{name}/vllm/", []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            output = os.readlink(process / "fd" / "1")
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if output.startswith(log) and b"keeper.py" not in words and (b"serve.py" in words or b"VLLM::" in words):
            found.append(int(process.name))
    return found


def until(condition: Callable[[], Any], run: "subprocess.Popen[bytes]", log: Path, every_s: float = 0.05) -> Any:
    deadline = time.monotonic() + 240
    while not (found := condition()):
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(every_s)
    return found


def gets_weights(inputs: Path, name: str) -> bool:
    """Whether the run's server is between two versions of the weights."""
    for pid in servers_of(inputs, name):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "--port" in words:
            port = words[words.index("--port") + 1]
            told = requests.get(f"http://127.0.0.1:{port}/weight_info", timeout=5).json()
            return bool(told == {"weight_version": UPDATING})
    return False


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["any", "an update"])
def test_a_server_that_is_struck_again_and_again_costs_no_prompt(inputs: Path, moment: str) -> None:
    dice, name = random.Random(0), f"servers at {moment}".replace(" ", "-")
    run, log = launch(inputs, name, "steps=100000"), inputs / f"{name}.log"
    for strike in range(STRIKES):
        done = len(metrics(inputs, name))
        until(lambda done=done: len(metrics(inputs, name)) > done, run, log)
        if moment == "any":
            time.sleep(dice.uniform(0, 1.0))
        else:
            until(lambda: gets_weights(inputs, name), run, log, every_s=0.002)
        victims = servers_of(inputs, name)
        assert victims
        number = signal.SIGSTOP if strike % 3 == 2 else signal.SIGKILL
        os.kill(dice.choice(victims), number)
        before = strike
        until(lambda before=before: log.read_text().count("started again") > before, run, log)
    done = len(metrics(inputs, name))
    until(lambda: len(metrics(inputs, name)) > done + 1, run, log)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == EXIT_CODE_STOPPED, log.read_text()[-3000:]
    told = metrics(inputs, name)
    assert [one["step"] for one in told] == list(range(len(told)))
    assert max(one["rollout_ratio_max"] for one in told) < 1.001
    # All tokens drawn, over those of a response: as many responses in every step.
    for one in told:
        drawn = one["tokens_per_second_rollout"] * one["seconds_rollout"]
        assert drawn / one["response_tokens"] == pytest.approx(16, rel=1e-3)
    assert not servers_of(inputs, name) and not list(Path("/dev/shm").glob("padd-*"))


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_server_behind(inputs: Path) -> None:
    dice = random.Random(1)
    for strike in range(STRIKES):
        name = f"trainer{strike}"
        run, log = launch(inputs, name, "steps=1000"), inputs / f"trainer{strike}.log"
        until(lambda name=name: servers_of(inputs, name), run, log)
        if strike % 3 != 1:  # otherwise while the server starts
            until(lambda name=name: metrics(inputs, name), run, log)
        if strike % 3 == 2:
            until(lambda name=name: gets_weights(inputs, name), run, log, every_s=0.002)
        else:
            time.sleep(dice.uniform(0, 3.0))
        run.send_signal(dice.choice([signal.SIGKILL, signal.SIGTERM]))
        run.wait(timeout=120)
        deadline = time.monotonic() + 40
        while servers_of(inputs, name) or list(Path("/dev/shm").glob("padd-*")):
            assert time.monotonic() < deadline, "a server was left behind"
            time.sleep(0.1)
