"""Which engine draws a run's responses, and the servers that it needs."""

import hashlib
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from padd_ds.config.schema import RunConfig
from padd_ds.engine.ranks import Ranks, gather_objects, on_main, together
from padd_ds.engine.student import Student
from padd_ds.engine.weights import local_tensors, share_among, whole_tensors
from padd_ds.hf import end_token_ids
from padd_ds.rollout.generation import HuggingFaceRollout, RolloutEngine
from padd_ds.rollout.vllm.client import Routers
from padd_ds.rollout.vllm.devices import gpus_of_server
from padd_ds.rollout.vllm.engine import VllmRollout
from padd_ds.rollout.vllm.exchange import WeightBoard, WeightFiles
from padd_ds.rollout.vllm.remote import RemoteServer, listed_servers, places_of
from padd_ds.rollout.vllm.server import Server
from padd_ds.rollout.vllm.transport import ByFiles, ByNetwork, Peers, Transport

IN_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class RolloutServers:
    """What this rank knows of the servers of the run."""

    server: Server | RemoteServer | None
    """The one that this rank looks after."""
    url: str
    """Of the one that this rank asks."""
    all_urls: tuple[str, ...]
    neighbours: tuple[int, ...]
    """The ranks that share it."""
    exchanging: tuple[int, ...]
    """The ranks whose weights it reads."""
    folder: Path | None
    """Through which weights go, if through one."""
    sleep: bool
    """Whether servers give their memory back between rollouts."""


@contextmanager
def rollout_servers(config: RunConfig, dtype: torch.dtype, ranks: Ranks) -> Iterator[RolloutServers | None]:
    """Start the run's vLLM servers, wait for them, and end them with the block; None where it uses none. Servers of
    their own are only waited for. Collective."""
    if not config.uses_vllm:
        yield None
    elif config.vllm.servers is None:
        with _started_servers(config, dtype, ranks) as servers:
            yield servers
    else:
        with _servers_of_their_own(config, ranks) as servers:
            yield servers


@contextmanager
def _started_servers(config: RunConfig, dtype: torch.dtype, ranks: Ranks) -> Iterator[RolloutServers]:
    told = gather_objects((socket.gethostname(), uuid.uuid4().hex), ranks)
    hosts, token = [host for host, _ in told], told[0][1]
    here = [rank for rank in range(ranks.world) if hosts[rank] == hosts[ranks.rank]]
    place, size = here.index(ranks.rank), config.vllm.ranks_per_server
    neighbours = tuple(here[place // size * size :][:size])
    folder = (IN_MEMORY if config.vllm.exchange is None else Path(config.vllm.exchange)) / f"padd-{token}"
    starts = ranks.rank == neighbours[0]
    server = together(lambda: _server(config, dtype, ranks, folder, place // size) if starts else None, ranks)
    try:
        together(partial(_start, server, folder), ranks)
        together(lambda: None if server is None else server.wait_until_ready(), ranks)
        urls = gather_objects(None if server is None else server.url, ranks)
        yield RolloutServers(
            server=server,
            url=urls[neighbours[0]],
            all_urls=tuple(filter(None, urls)),
            neighbours=neighbours,
            exchanging=tuple(here if config.vllm.exchange is None else range(ranks.world)),
            folder=folder,
            sleep=_sleeps(config, ranks),
        )
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _servers_of_their_own(config: RunConfig, ranks: Ranks) -> Iterator[RolloutServers]:
    urls = on_main(lambda: listed_servers(config.vllm), ranks)
    places = together(lambda: places_of(ranks.world, len(urls)), ranks)
    place = places[ranks.rank]
    neighbours = tuple(rank for rank in range(ranks.world) if places[rank] == place)
    server = RemoteServer(urls[place], config.vllm) if ranks.rank == neighbours[0] else None
    folder = _shared_folder(config) if config.vllm.transport == "files" else None
    try:
        on_main(partial(_make_empty, folder), ranks)
        together(lambda: None if server is None else server.wait_until_ready(), ranks)
        yield RolloutServers(
            server=server,
            url=urls[place],
            all_urls=tuple(urls),
            neighbours=neighbours,
            exchanging=tuple(range(ranks.world)),
            folder=folder,
            sleep=False,
        )
    finally:
        if folder is not None and ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _shared_folder(config: RunConfig) -> Path:
    """The run's own, the same each time: nobody else deletes what a run that was killed has left there."""
    assert config.vllm.exchange is not None
    name = hashlib.sha256(str(Path(config.run_dir).absolute()).encode()).hexdigest()[:16]
    return Path(config.vllm.exchange) / f"padd-{name}"


def _make_empty(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _sleeps(config: RunConfig, ranks: Ranks) -> bool:
    return ranks.device.type != "cpu" if config.vllm.sleep is None else config.vllm.sleep


def rollout_engine(
    config: RunConfig, student: Student, tokenizer: Any, servers: RolloutServers | None = None
) -> RolloutEngine:
    """What draws the responses of this rank. Collective with servers."""
    end_ids = tuple(end_token_ids(student.model, tokenizer))
    if servers is None:
        return HuggingFaceRollout(
            model=student.model,
            end_token_ids=end_ids,
            pad_token_id=tokenizer.pad_token_id,
            ranks_in_step=student.ranks.world > 1,
            keep_logprobs=config.policy.importance_cap is not None,
            trace=student.tracing if student.layers else None,
        )
    ranks = student.ranks
    peers = Peers(
        neighbours=servers.neighbours,
        exchanging=servers.exchanging,
        gather=lambda mine: gather_objects(mine, ranks),
        together=lambda action: together(action, ranks),
    )
    return VllmRollout(
        peers=peers,
        transport=_transport(config, student, servers, peers),
        url=servers.url,
        server=servers.server,
        options=config.vllm,
        sleeps=servers.sleep,
        end_token_ids=end_ids,
        pad_token_id=tokenizer.pad_token_id,
        say=lambda text: print(text, file=sys.stderr, flush=True),
        routers=_routers(student) if config.servers_tell_experts else None,
    )


def _routers(student: Student) -> Routers:
    first = student.layers[0]
    return Routers(layers=len(student.layers), top_k=first.router.top_k, experts=first.num_experts)


def _transport(config: RunConfig, student: Student, servers: RolloutServers, peers: Peers) -> Transport:
    ranks = student.ranks
    if servers.folder is None:
        return ByNetwork(
            peers=peers,
            weights=lambda: whole_tensors(student),
            urls=servers.all_urls,
            is_sender=ranks.is_main,
            device=ranks.device,
            timeout_s=config.vllm.answer_timeout_s,
        )
    share = share_among(student, servers.exchanging)
    board = WeightBoard if config.vllm.exchange is None else WeightFiles
    return ByFiles(peers=peers, weights=lambda: local_tensors(student, share), board=board(servers.folder, ranks.rank))


def _server(config: RunConfig, dtype: torch.dtype, ranks: Ranks, folder: Path, number: int) -> Server:
    on_gpu = ranks.device.type != "cpu"
    return Server(
        model=config.model.student,
        dtype=str(dtype).removeprefix("torch."),
        max_model_tokens=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        options=config.vllm,
        folder=folder,
        log_path=Path(config.run_dir) / "vllm" / f"server_of_rank_{ranks.rank:05d}.log",
        port=config.vllm.port + number if config.vllm.port else 0,
        devices=gpus_of_server(ranks.rank, ranks.device.index or 0, config.vllm.tensor_parallel) if on_gpu else None,
        sleeps=_sleeps(config, ranks),
        trust_remote_code=config.model.trust_remote_code,
        tells_experts=config.servers_tell_experts,
    )


def _start(server: Server | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if server is not None:
        server.start()
