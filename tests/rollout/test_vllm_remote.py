"""Servers on nodes of their own: their list, weights over files and network, and what happens when one fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import RolloutFailed, UserError
from padd_ds.rollout.vllm.engine import VllmRollout
from padd_ds.rollout.vllm.exchange import WeightFiles
from padd_ds.rollout.vllm.remote import RemoteServer, listed_servers, places_of
from padd_ds.rollout.vllm.transport import ByFiles, ByNetwork, Peers, Transport
from tests.rollout.fake_vllm import CPU, END, FakeVllm
from tests.rollout.test_vllm_engine import ASKED, SAMPLING

PEERS = Peers(neighbours=(0,), exchanging=(0,), gather=lambda mine: [mine], together=lambda action: action())


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    fakes = [FakeVllm(), FakeVllm()]
    yield fakes
    for fake in fakes:
        fake.stop()


class World:
    """One rank, which asks the first of the servers; over the network all of them get its weights."""

    def __init__(self, fakes: list[FakeVllm], transport: str, folder: Path, **more: Any) -> None:
        self.layers = {"layer": {"w": torch.tensor([11.0])}, "rest": {"other": torch.randn(3, 4).T}}
        options = VllmConfig(
            servers=[fake.url for fake in fakes],
            transport=transport,  # type: ignore[arg-type]
            exchange=str(folder),
            answer_timeout_s=1.0,
            start_timeout_s=2.0,
            **more,
        )
        self.said: list[str] = []
        self.engine = VllmRollout(
            peers=PEERS,
            transport=self.transport(options, folder),
            url=fakes[0].url,
            server=RemoteServer(fakes[0].url, options),
            options=options,
            sleeps=False,
            end_token_ids=(END,),
            pad_token_id=0,
            say=self.said.append,
        )

    def transport(self, options: VllmConfig, folder: Path) -> Transport:
        def weights() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
            return iter(self.layers.items())

        if options.transport == "files":
            return ByFiles(peers=PEERS, weights=weights, board=WeightFiles(folder, 0))
        urls = options.servers
        assert isinstance(urls, list)
        return ByNetwork(peers=PEERS, weights=weights, urls=urls, is_sender=True, device=CPU, timeout_s=1.0)

    def first_tokens(self, version: int, weight: float) -> list[int]:
        self.layers["layer"] = {"w": torch.tensor([weight])}
        with self.engine.ready(version):
            responses = self.engine.generate(ASKED, SAMPLING)
        first: list[int] = responses.ids_BR[:, 0].tolist()
        return first


@pytest.mark.parametrize("transport", ["files", "network"])
def test_servers_have_the_weights_of_every_rollout(fakes: list[FakeVllm], transport: str, tmp_path: Path) -> None:
    world = World(fakes, transport, tmp_path)
    for version, weight in enumerate((11.0, 12.0)):
        assert world.first_tokens(version, weight) == [int(weight)] * 6
        if transport == "network":
            assert [fake.first for fake in fakes] == [int(weight)] * 2
    assert world.said == []


@pytest.mark.parametrize("transport", ["files", "network"])
@pytest.mark.parametrize("fault", ["die", "hang", 500])
def test_a_server_that_fails_gets_the_weights_again_and_what_was_not_answered(
    fakes: list[FakeVllm], transport: str, fault: Any, tmp_path: Path
) -> None:
    world = World(fakes, transport, tmp_path)
    assert world.first_tokens(0, 11.0) == [11] * 6
    updates = len([route for route in fakes[0].routes if route.startswith("/")]) - 3
    for place in (updates - 1, updates + 1):  # the last request of an update; the second prompt
        fakes[0].faults = [None] * place + [fault]
        assert world.first_tokens(place, 12.0) == [12] * 6
    assert fakes[0].restarts == 2 and len(world.said) == 2


def test_a_server_that_was_started_again_already_is_not_ended(fakes: list[FakeVllm], tmp_path: Path) -> None:
    world = World(fakes, "files", tmp_path)
    world.first_tokens(0, 11.0)
    fakes[0].restart()
    with world.engine.ready(0):
        assert world.engine.generate(ASKED, SAMPLING).ids_BR[:, 0].tolist() == [11] * 6
    assert fakes[0].restarts == 1 and "/padd/end" not in fakes[0].routes


def test_a_server_that_nobody_starts_again_ends_the_run(fakes: list[FakeVllm], tmp_path: Path) -> None:
    world = World(fakes, "files", tmp_path, max_restarts=1)
    fakes[0].http.shutdown()
    fakes[0].http.server_close()
    with pytest.raises(RolloutFailed, match=r"did not answer in vllm.start_timeout_s 2; start padd-serve there"):
        world.first_tokens(0, 11.0)
    fakes[0].start()


def test_servers_are_listed_in_place_or_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "servers.txt"
    path.write_text("http://n1:8000/\n\nhttp://n2:8000\n")
    expected = ["http://n1:8000", "http://n2:8000"]
    assert listed_servers(VllmConfig(servers=str(path), exchange="x")) == expected
    assert listed_servers(VllmConfig(servers=expected, exchange="x")) == expected


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ("absent.txt", "vllm.servers absent.txt: no such file"),
        ([], "names no server"),
        (["n1:8000"], "vllm.servers: n1:8000; give the URL"),
        (["http://n1:8000", "http://n1:8000/"], "http://n1:8000 twice"),
    ],
)
def test_a_list_of_something_else_is_refused(servers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listed_servers(VllmConfig(servers=servers, exchange="x"))


def test_neighbours_share_a_server_and_none_is_idle() -> None:
    assert places_of(8, 2) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert places_of(5, 3) == [0, 0, 1, 1, 2]
    with pytest.raises(UserError, match="lists 3 servers for 2 ranks"):
        places_of(2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"servers": ["http://n:1"]}, "set exchange"),
        ({"transport": "network"}, "set servers, or files"),
        ({"servers": ["http://n:1"], "exchange": "x", "sleep": True}, "leave sleep out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VllmConfig(**options)
