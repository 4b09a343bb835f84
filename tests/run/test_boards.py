"""Metrics that go to tensorboard, and to wandb, which a stand-in plays here."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from padd_ds.config.sections import LogConfig
from padd_ds.errors import UserError
from padd_ds.run import boards
from padd_ds.run.boards import check_boards, log_in, open_boards
from tests.world import joint_config


class StandIn(ModuleType):
    """Keeps what it is told; `fails` is raised at the start."""

    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def __init__(self, fails: Exception | None = None) -> None:
        super().__init__("wandb")
        self.fails, self.started, self.logged, self.ended = fails, [], [], 0

    def init(self, **given: Any) -> Any:
        if self.fails:
            raise self.fails
        self.started.append(given)
        return self

    def login(self) -> None:
        if self.fails:
            raise self.fails

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended += 1


def config(**log: Any) -> Any:
    return replace(joint_config(), log=LogConfig(**log))


def train(folder: Path, start: int, **log: Any) -> None:
    with ExitStack() as stack:
        for board in open_boards(folder, config(**log), start, stack):
            board(start, {"loss_lm": 0.5 + start})


def test_tensorboard_has_the_metrics_by_step(tmp_path: Path) -> None:
    train(tmp_path, 0)
    train(tmp_path, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss_lm")] == [(0, 0.5), (3, 3.5)]
    assert not (tmp_path / "wandb_id").exists()


def test_wandb_has_them_under_one_name_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 3):
        train(tmp_path, start, wandb="moe", tensorboard=False)
    assert wandb.logged == [{"step": 0, "loss_lm": 0.5}, {"step": 3, "loss_lm": 3.5}] and wandb.ended == 2
    first, again = wandb.started
    assert first == again and first["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("moe", tmp_path.name, "allow")
    assert first["config"]["stage"] == "joint" and first["config"]["log"]["wandb"] == "moe"


def test_wandb_that_does_not_start_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn(fails=StandIn.errors.Error("no\nkey")))
    with pytest.raises(UserError, match=r"log\.wandb=moe: wandb does not start \(no key\); .*WANDB_MODE=offline"):
        train(tmp_path, 0, wandb="moe", tensorboard=False)


def test_a_missing_login_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn(fails=StandIn.errors.Error("No API key configured.")))
    log_in(config())
    with pytest.raises(UserError, match=r"log\.wandb=moe: wandb does not start \(No API key .*run wandb login"):
        log_in(config(wandb="moe"))


def test_wandb_that_is_not_there_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    check_boards(config())
    with pytest.raises(UserError, match=r"log\.wandb=moe: wandb is not installed; run pip install wandb"):
        check_boards(config(wandb="moe"))
