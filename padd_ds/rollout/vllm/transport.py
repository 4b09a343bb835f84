"""How the student's weights come to its rollout servers: through files, or over the network."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from padd_ds.errors import UserError
from padd_ds.rollout.vllm.client import Client
from padd_ds.rollout.vllm.exchange import WeightBoard, WeightFiles, laid_out
from padd_ds.rollout.vllm.network import address_towards, join, open_meeting, send
from padd_ds.rollout.vllm.server import ServerFault, fault_of

Weights = Callable[[], Iterator[tuple[str, dict[str, torch.Tensor]]]]
"""(label, tensors) of what this rank gives out, one layer at a time. Collective."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The ranks of the run, as far as rollouts have to agree with them."""

    neighbours: tuple[int, ...]
    """The ranks that share this rank's server, itself among them; the first of them looks after it."""
    exchanging: tuple[int, ...]
    """The ranks whose weights this rank's server takes: together they give out every tensor once."""
    gather: Callable[[Any], list[Any]]
    """What every rank gave, in the order of ranks. Collective."""
    together: Callable[[Callable[[], Any]], Any]
    """Runs something on every rank; if it fails on one, all raise. Collective."""


class Transport(Protocol):
    """Both are collective; ranks that look after no server take part."""

    def publish(self) -> None:
        """Make ready what servers take over; once for every rollout."""
        ...

    def load(self, behind: Client | None, version: str) -> None:
        """Give `behind` the weights as `version`: the server that this rank looks after, where that lacks them.

        ServerFault: its weights are then in an unknown state.
        """
        ...


@dataclass(kw_only=True)
class ByFiles:
    """All ranks write, each server reads."""

    peers: Peers
    weights: Weights
    board: WeightBoard | WeightFiles
    _parts: list[dict[str, Any]] = field(init=False, default_factory=list)

    def publish(self) -> None:
        for label, tensors in self.weights():
            self.peers.together(partial(self._write, label, tensors))
        if not self._parts:
            written = self.peers.gather(self.board.parts)
            self._parts = [part for rank in self.peers.exchanging for part in written[rank]]

    def _write(self, label: str, tensors: dict[str, torch.Tensor]) -> None:
        try:
            self.board.write(label, tensors)
        except OSError as error:
            raise UserError(
                f"weights for the rollout servers cannot be written to {error.filename or self.board.folder} "
                f"({error.strerror}); make room there for one copy of them, or set vllm.exchange to another folder"
            ) from error

    def load(self, behind: Client | None, version: str) -> None:
        if behind is not None:
            parts = [part | {"path": part["path"] + self.board.suffix} for part in self._parts]
            behind.begin_update()
            behind.update({"parts": parts})
            behind.end_update(version)


@dataclass(kw_only=True)
class ByNetwork:
    """Rank 0 sends one layer after the other to all servers at once, by a group that is made for it each time.

    A server that fails meanwhile leaves the others waiting in the middle of a layer: all count as failed then.
    """

    peers: Peers
    weights: Weights
    """Of rank 0 all tensors; the others help to gather them."""
    urls: Sequence[str]
    is_sender: bool
    device: torch.device
    timeout_s: float

    def publish(self) -> None:
        """Nothing to do."""

    def load(self, behind: Client | None, version: str) -> None:
        if not any(self.peers.gather(behind is not None)):
            return
        sender = _Sender(self.urls, self.device, self.timeout_s)
        fault = fault_of(sender.open) if self.is_sender else None
        # To the end in any case: the other ranks are on their way through the layers too.
        for _, tensors in self.weights():
            if self.is_sender and fault is None:
                fault = fault_of(partial(sender.send, tensors))
        if self.is_sender and fault is None:
            fault = fault_of(partial(sender.close, version))
        if fault := self.peers.gather(fault)[0]:
            raise ServerFault(fault)


class _Sender:
    """One transfer to all servers, from `open` to `close`; ServerFault from each step."""

    def __init__(self, urls: Sequence[str], device: torch.device, timeout_s: float) -> None:
        self._clients = [Client(url, timeout_s) for url in urls]
        self._device, self._timeout_s = device, timeout_s
        self._group: Any = None

    def open(self) -> None:
        sizes = [client.workers() for client in self._clients]
        try:
            store, address = open_meeting(self._timeout_s), address_towards(self._clients[0].url)
        except (OSError, RuntimeError) as error:
            raise ServerFault(f"no way to {self._clients[0].url}: {error}") from error
        world = 1 + sum(sizes)

        def invite(place: int) -> None:
            client = self._clients[place]
            client.begin_update()
            meeting = {"address": address, "port": store.port, "world": world, "timeout_s": self._timeout_s}
            client.connect(meeting | {"first_rank": 1 + sum(sizes[:place])})

        def meet() -> None:
            self._group = join(store, 0, world, self._device, self._timeout_s)

        self._everywhere(invite, meet)

    def send(self, tensors: dict[str, torch.Tensor]) -> None:
        part = laid_out(tensors)
        self._everywhere(
            lambda place: self._clients[place].update({"part": part}),
            lambda: send(self._group, part, tensors, self._device),
        )

    def close(self, version: str) -> None:
        self._everywhere(lambda place: self._clients[place].end_update(version), lambda: None)
        self._group = None

    def _everywhere(self, call: Callable[[int], None], meanwhile: Callable[[], None]) -> None:
        """`call` with the place of each server, and `meanwhile`, all at once; the first failure is raised at once."""
        pool = ThreadPoolExecutor(max_workers=len(self._clients) + 1)
        futures = [pool.submit(meanwhile), *(pool.submit(call, place) for place in range(len(self._clients)))]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        # Whoever waits for one that failed gives up after the timeout.
        pool.shutdown(wait=False)
        for future in done:
            try:
                future.result()
            except RuntimeError as error:  # a ServerFault, or torch's own for a group that is broken
                raise ServerFault(str(error)) from error
