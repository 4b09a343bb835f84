"""The rollout engine whose responses vLLM servers draw.

Legend: P prompts of this rank, G responses per prompt, B = P * G, T prompt tokens (left-padded), R response tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import RolloutFailed, UserError
from padd_ds.rollout.generation import Responses, Sampling
from padd_ds.rollout.vllm.client import Answer, Client, Request
from padd_ds.rollout.vllm.exchange import WeightBoard
from padd_ds.rollout.vllm.server import Server, ServerFault

REQUESTS_AT_ONCE = 256
"""Of one rank, each for a prompt's whole group."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The ranks of the run, as far as rollouts have to agree with them."""

    neighbours: tuple[int, ...]
    """The ranks that share this rank's server, itself among them; the first of them started it."""
    exchanging: tuple[int, ...]
    """The ranks whose files this rank's server reads: together they write every tensor once."""
    gather: Callable[[Any], list[Any]]
    """What every rank gave, in the order of ranks. Collective."""
    together: Callable[[Callable[[], Any]], Any]
    """Runs something on every rank; if it fails on one, all raise. Collective."""


@dataclass(kw_only=True)
class VllmRollout:
    """Gives its servers the student's weights before every rollout, and starts them again when they fail.

    A failure is agreed on by all ranks. What was answered is kept, what was not is asked again.
    """

    peers: Peers
    weights: Callable[[], Iterator[tuple[str, dict[str, torch.Tensor]]]]
    """(label, tensors) of what this rank writes, one layer at a time. Collective."""
    board: WeightBoard
    url: str
    server: Server | None
    """Where this rank started it."""
    options: VllmConfig
    sleeps: bool
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    say: Callable[[str], None]
    _version: str = field(init=False, default="")
    _parts: list[dict[str, Any]] = field(init=False, default_factory=list)
    _loaded: str = field(init=False, default="")
    """The version that this rank's own server has; empty: none of ours."""
    _asleep: bool = field(init=False, default=False)
    _fault: str | None = field(init=False, default=None)
    """Why this rank's own server has to be started again."""

    @property
    def _client(self) -> Client:
        return Client(self.url, self.options.answer_timeout_s)

    @contextmanager
    def ready(self, version: int) -> Iterator[None]:
        """See RolloutEngine. Afterwards the servers give their memory back, where they can."""
        self._version = str(version)
        for label, tensors in self.weights():
            self.peers.together(partial(self.board.write, label, tensors))
        if not self._parts:
            written = self.peers.gather(self.board.parts)
            self._parts = [part for rank in self.peers.exchanging for part in written[rank]]
        self._until_no_server_fails(lambda: None)
        yield
        if self.sleeps:
            self._until_no_server_fails(self._sleep)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids_PT: torch.Tensor,
        prompt_mask_PT: torch.Tensor,
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> Responses:
        """See RolloutEngine; each prompt's group is one request."""
        requests = [
            Request(
                token_ids=ids_T[mask_T.bool()].tolist(),
                n=group_size,
                seed=seed,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                end_token_ids=self.end_token_ids,
            )
            for ids_T, mask_T, seed in zip(prompt_ids_PT, prompt_mask_PT, seeds, strict=True)
        ]
        answers: dict[int, list[Answer]] = {}
        self._until_no_server_fails(lambda: self._ask(requests, answers))
        in_order = [answer for place in range(len(requests)) for answer in answers[place]]
        return as_responses(in_order, self.pad_token_id, prompt_ids_PT.device)

    def _ask(self, requests: Sequence[Request], answers: dict[int, list[Answer]]) -> None:
        """Fill in what `answers` lacks; ServerFault after all others were given the time to come."""
        missing = [place for place in range(len(requests)) if place not in answers]
        client, faults = self._client, []
        with ThreadPoolExecutor(max_workers=max(min(len(missing), REQUESTS_AT_ONCE), 1)) as pool:
            futures = {place: pool.submit(client.generate, requests[place], self._version) for place in missing}
            for place, future in futures.items():
                try:
                    answers[place] = future.result()
                except ServerFault as fault:
                    faults.append(fault)
        if faults:
            raise faults[0]

    def _ensure_loaded(self) -> None:
        """This rank's own server, well and with the weights of this version."""
        if self.server is None:
            return
        if self._fault is not None:
            self.say(f"a rollout server is started again: {self._fault}")
            try:
                self.server.restart()
            except UserError as error:
                raise ServerFault(str(error)) from error
            self._fault, self._asleep, self._loaded = None, False, ""
        client = self._client
        if self._loaded != self._version:
            if self._asleep:
                client.wake_up("weights")
            client.load(self._parts, self._version)
            if self._asleep:
                client.wake_up("kv_cache")
            self._asleep, self._loaded = False, self._version

    def _sleep(self) -> None:
        if self.server is not None and not self._asleep:
            self._client.sleep()
            self._asleep, self._loaded = True, ""

    def _until_no_server_fails(self, work: Callable[[], None]) -> None:
        """Do `work` on every rank, and again after the servers of those where it failed were started again.

        RolloutFailed when that was done often enough. Collective.
        """
        for _ in range(self.options.max_restarts + 1):
            faults = self._try(self._ensure_loaded)
            if not any(faults):
                faults = self._try(work)
            if not any(faults):
                return
            if self.server is not None:
                self._fault = next(filter(None, (faults[rank] for rank in self.peers.neighbours)), None)
        rank, fault = next((rank, fault) for rank, fault in enumerate(faults) if fault)
        raise RolloutFailed(
            f"rollout servers failed {self.options.max_restarts + 1} times in a row, at last that of rank {rank}: "
            f"{fault}; see the run's folder vllm, and vllm.max_restarts"
        )

    def _try(self, work: Callable[[], None]) -> list[str | None]:
        """What was wrong with the server of each rank, if anything. Collective."""
        return self.peers.gather(self.peers.together(lambda: _fault_of(work)))


def as_responses(answers: Sequence[Answer], pad_token_id: int, device: torch.device) -> Responses:
    """The answers as tensors, right-padded to the longest."""
    width = max(len(answer.token_ids) for answer in answers)
    shape = (len(answers), width)
    ids_BR = torch.full(shape, pad_token_id)
    logprobs_BR = torch.zeros(shape)
    mask_BR = torch.zeros(shape, dtype=torch.bool)
    for row, answer in enumerate(answers):
        length = len(answer.token_ids)
        ids_BR[row, :length] = torch.tensor(answer.token_ids)
        logprobs_BR[row, :length] = torch.tensor(answer.logprobs)
        mask_BR[row, :length] = True
    return Responses(
        ids_BR=ids_BR.to(device),
        mask_BR=mask_BR.to(device),
        ended_B=torch.tensor([answer.ended for answer in answers], device=device),
        logprobs_BR=logprobs_BR.to(device),
    )


def _fault_of(work: Callable[[], None]) -> str | None:
    try:
        work()
    except ServerFault as fault:
        return str(fault)
    return None
