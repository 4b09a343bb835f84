"""The engine's part: weights before every rollout, failures agreed on, nothing lost or asked twice."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import RolloutFailed, UserError
from padd_ds.rollout.generation import Prompts, Sampling
from padd_ds.rollout.vllm.client import Routers
from padd_ds.rollout.vllm.engine import VllmRollout
from padd_ds.rollout.vllm.exchange import WeightBoard
from padd_ds.rollout.vllm.transport import ByFiles, Peers
from tests.commands import REPOSITORY
from tests.rollout.fake_vllm import END, FakeVllm, routes

PROMPTS = torch.tensor([[0, 5, 6], [7, 8, 9], [0, 0, 4]])
ASKED = Prompts(ids_PT=PROMPTS, mask_PT=(PROMPTS != 0).long(), seeds=[100, 200, 300])
SAMPLING = Sampling(group_size=2, max_new_tokens=5)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    fake = FakeVllm()
    yield fake
    fake.stop()


class World:
    """A student of one weight, and the engine that draws from it."""

    def __init__(self, fake: FakeVllm, folder: Path, routers: Routers | None = None, **options: Any) -> None:
        self.weight = 11.0
        self.said: list[str] = []
        peers = Peers(neighbours=(0,), exchanging=(0,), gather=lambda mine: [mine], together=lambda action: action())
        self.engine = VllmRollout(
            peers=peers,
            transport=ByFiles(
                peers=peers,
                weights=lambda: iter([("layer", {"w": torch.tensor([self.weight])})]),
                board=WeightBoard(folder, 0),
            ),
            url=fake.url,
            server=fake,  # type: ignore[arg-type]
            options=VllmConfig(answer_timeout_s=1.0, **options),
            sleeps=options.get("sleep", False),
            end_token_ids=(END,),
            pad_token_id=0,
            say=self.said.append,
            routers=routers,
        )

    def rollout(self, version: int) -> Any:
        with self.engine.ready(version):
            return self.engine.generate(ASKED, SAMPLING)


def test_responses_are_those_of_the_weights_as_they_are(fake: FakeVllm, tmp_path: Path) -> None:
    world = World(fake, tmp_path)
    first = world.rollout(0)
    assert first.ids_BR[:, 0].tolist() == [11] * 6
    assert first.ids_BR[:, 1].tolist() == [100, 101, 200, 201, 300, 301]
    assert first.mask_BR.all() and first.ended_B.all()
    torch.testing.assert_close(first.logprobs_BR[0], torch.tensor([0.0, -0.5, -1.0]))
    world.weight = 12.0
    assert world.rollout(1).ids_BR[:, 0].tolist() == [12] * 6
    assert sorted(request["token_ids"] for request in fake.seen[:3]) == [[4], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("place", "fault"),
    [(place, fault) for place in (2, 6, 8) for fault in ("die", "hang", 500)] + [(7, lambda told: {})],
)
def test_a_server_that_fails_is_started_again_and_nothing_is_lost(
    fake: FakeVllm, tmp_path: Path, fault: Any, place: int
) -> None:
    """At one of the six requests of an update, or at a prompt."""
    world = World(fake, tmp_path)
    expected = world.rollout(0)
    fake.faults = [None] * place + [fault]
    fake.seen.clear()
    world.weight = 12.0
    again = world.rollout(1)
    assert fake.restarts == 1 and len(world.said) == 1
    assert again.ids_BR[:, 0].tolist() == [12] * 6
    assert again.ids_BR[:, 1:].tolist() == expected.ids_BR[:, 1:].tolist()


def test_what_was_answered_is_not_asked_again(fake: FakeVllm, tmp_path: Path) -> None:
    world = World(fake, tmp_path)
    world.rollout(0)
    fake.seen.clear()
    fake.faults = [None] * 6 + ["die"]
    world.rollout(1)
    assert len(fake.seen) == 3


def test_a_server_that_fails_again_and_again_ends_the_run(fake: FakeVllm, tmp_path: Path) -> None:
    world = World(fake, tmp_path, max_restarts=2)
    fake.faults = [500] * 100
    with pytest.raises(RolloutFailed, match="3 times in a row"):
        world.rollout(0)
    assert fake.restarts == 2


def test_a_server_that_does_not_come_back_ends_the_run(
    fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise UserError("the rollout server did not start: planted")

    world = World(fake, tmp_path)
    monkeypatch.setattr(fake, "restart", broken)
    fake.faults = [500]
    with pytest.raises(RolloutFailed, match="planted"):
        world.rollout(0)


def test_a_sleeping_server_is_woken_before_it_gets_weights(fake: FakeVllm, tmp_path: Path) -> None:
    world = World(fake, tmp_path, sleep=True)
    world.rollout(0)
    assert fake.routes[-1] == "/sleep?level=2"
    fake.routes.clear()
    world.rollout(1)
    order = [
        fake.routes.index(route) for route in ("/wake_up?tags=weights", "/update_weights", "/wake_up?tags=kv_cache")
    ]
    assert order == sorted(order)


def test_ranks_that_share_a_server_agree_when_one_of_them_fails(fake: FakeVllm, tmp_path: Path) -> None:
    """What the other rank tells is that its request failed: the owner starts the server again."""
    world = World(fake, tmp_path)
    world.rollout(0)
    others = chain([None, None, None, "planted"], repeat(None))
    world.engine.peers = Peers(
        neighbours=(0, 1),
        exchanging=(0,),
        gather=lambda mine: [mine, next(others)],
        together=lambda action: action(),
    )
    world.engine._until_no_server_fails(lambda: None)
    assert fake.restarts == 1
    assert world.rollout(1).ids_BR[:, 0].tolist() == [11] * 6


def test_weights_that_find_no_room_are_told_with_their_folder(
    fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "weights"))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left on device.*set vllm\.exchange"):
        World(fake, tmp_path).rollout(0)


def test_experts_stand_at_their_tokens(fake: FakeVllm, tmp_path: Path) -> None:
    """Prompts of 2, 3 and 1 tokens, left-padded to 3, and responses of 3."""
    fake.tells_experts = (3, 2, 8)
    found = World(fake, tmp_path, routers=Routers(layers=2, top_k=2, experts=8)).rollout(0).routes_BLNK
    assert found.shape == (6, 3 + 3, 2, 2) and found.dtype == torch.int16
    for row, padding in enumerate([1, 1, 0, 0, 2, 2]):
        told = torch.from_numpy(routes(3 + 3 - 1 - padding, 3, 2, 8)[:, 1:]).short()
        assert torch.equal(found[row, padding:-1], told)
        assert (found[row, :padding] == -1).all() and (found[row, -1] == -1).all()


def test_what_is_begun_is_drawn_from_the_weights_of_then(fake: FakeVllm, tmp_path: Path) -> None:
    world = World(fake, tmp_path)
    expected = world.rollout(0)
    with world.engine.ready(1):
        drawing = world.engine.begin(ASKED, SAMPLING)
    world.weight = 12.0
    found = world.engine.finish(drawing, 2)
    assert found.ids_BR.tolist() == expected.ids_BR.tolist()
    assert found.versions_B is not None and found.versions_B.tolist() == [1] * 6
    assert world.rollout(2).ids_BR[:, 0].tolist() == [12] * 6


def test_what_a_server_fails_to_draw_ahead_is_drawn_from_the_weights_of_now(fake: FakeVllm, tmp_path: Path) -> None:
    world = World(fake, tmp_path)
    world.rollout(0)
    with world.engine.ready(0):
        fake.faults = ["die"]
        drawing = world.engine.begin(ASKED, SAMPLING)
    world.weight = 12.0
    found = world.engine.finish(drawing, 1)
    assert fake.restarts == 1 and len(world.said) == 1
    assert found.versions_B is not None and sorted(found.versions_B.tolist()) == [0] * 4 + [1] * 2
    assert found.ids_BR[:, 0].tolist() == [11 + version for version in found.versions_B.tolist()]
    assert found.ids_BR[:, 1].tolist() == [100, 101, 200, 201, 300, 301]


@pytest.mark.slow
def test_what_is_drawn_ahead_keeps_no_process_alive(fake: FakeVllm) -> None:
    script = f"""
import time
import torch
from padd_ds.config.sections import VllmConfig
from padd_ds.rollout.generation import Prompts, Sampling
from padd_ds.rollout.vllm.engine import VllmRollout
engine = VllmRollout(peers=None, transport=None, url={fake.url!r}, server=None, sleeps=False, end_token_ids=(2,),
                     options=VllmConfig(answer_timeout_s=600.0), pad_token_id=0, say=print)
engine._version = "0"
prompts = Prompts(ids_PT=torch.tensor([[5, 6]]), mask_PT=torch.ones(1, 2), seeds=[1])
engine.begin(prompts, Sampling(group_size=2, max_new_tokens=5))
time.sleep(1)  # so that it is asked
"""
    fake.faults = [lambda told: time.sleep(600)]
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert fake.routes == ["/inference/v1/generate"]
