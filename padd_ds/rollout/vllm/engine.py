"""The rollout engine whose responses vLLM servers draw.

Legend: P prompts of this rank, G responses per prompt, B = P * G, T prompt tokens (left-padded), R response tokens,
N MoE layers, K experts per token, L = T + R.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Protocol

import numpy as np
import torch

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import RolloutFailed, UserError
from padd_ds.rollout.generation import Prompts, Responses, Sampling
from padd_ds.rollout.vllm.client import Answer, Client, Request, Routers
from padd_ds.rollout.vllm.server import ServerFault, fault_of
from padd_ds.rollout.vllm.transport import Peers, Transport

REQUESTS_AT_ONCE = 256
"""Of one rank, each for a prompt's whole group."""


class Restartable(Protocol):
    """A server that this rank looks after: one of its own (`server.Server`) or another's (`remote.RemoteServer`)."""

    def restart(self) -> None:
        """Wait until it is there again, with the weights that it started with; UserError if it does not come."""
        ...


@dataclass(kw_only=True)
class Drawing:
    """Responses on their way: what was asked, and by the place of each prompt what has come and what is to come."""

    requests: list[Request]
    prompt_width: int
    """T of the prompts."""
    device: torch.device
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    """Of the weights that made the answers."""
    coming: "dict[int, AsyncResult[list[Answer]]]" = field(default_factory=dict)


@dataclass(kw_only=True)
class VllmRollout:
    """Gives its servers the student's weights before every rollout, and starts them again when they fail.

    A failure is agreed on by all ranks. What was answered is kept, what was not is asked again.
    """

    peers: Peers
    transport: Transport
    url: str
    server: Restartable | None
    """Where this rank looks after it."""
    options: VllmConfig
    sleeps: bool
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    say: Callable[[str], None]
    routers: Routers | None = None
    """Those whose experts the servers tell; None: they tell none."""
    _version: str = field(init=False, default="")
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
        self.transport.publish()
        self._until_no_server_fails(lambda: None)
        yield
        if self.sleeps:
            self._until_no_server_fails(self._sleep)

    def generate(self, prompts: Prompts, sampling: Sampling) -> Responses:
        """See RolloutEngine; each prompt's group is one request."""
        return self._whole(self._drawing(prompts, sampling))

    def begin(self, prompts: Prompts, sampling: Sampling) -> Drawing:
        """See DrawsAhead."""
        drawing = self._drawing(prompts, sampling)
        self._ask(drawing)
        return drawing

    def finish(self, drawing: Drawing, version: int) -> Responses:
        """See DrawsAhead."""
        faults = self._try(lambda: self._take(drawing))
        if any(faults):
            self._blame(faults)
            self._version = str(version)
            self.transport.publish()
        return self._whole(drawing)

    def _drawing(self, prompts: Prompts, sampling: Sampling) -> Drawing:
        requests = [
            Request(
                token_ids=ids_T[mask_T.bool()].tolist(),
                n=sampling.group_size,
                seed=seed,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                end_token_ids=self.end_token_ids,
                routers=self.routers,
            )
            for ids_T, mask_T, seed in zip(prompts.ids_PT, prompts.mask_PT, prompts.seeds, strict=True)
        ]
        return Drawing(requests=requests, prompt_width=prompts.ids_PT.shape[1], device=prompts.ids_PT.device)

    def _whole(self, drawing: Drawing) -> Responses:
        """With what is still missing, on any rank. Collective."""

        def ask_for_the_rest() -> None:
            self._ask(drawing)
            self._take(drawing)

        places = range(len(drawing.requests))
        if any(self.peers.gather(len(drawing.answers) < len(places))):
            self._until_no_server_fails(ask_for_the_rest)
        answers = [answer for place in places for answer in drawing.answers[place]]
        versions = [drawing.versions[place] for place in places for _ in drawing.answers[place]]
        responses = as_responses(answers, versions, self.pad_token_id, drawing.device)
        if self.routers is None:
            return responses
        routes_BLNK = as_routes(answers, drawing.prompt_width, responses.ids_BR.shape[1])
        return replace(responses, routes_BLNK=routes_BLNK.to(drawing.device))

    def _ask(self, drawing: Drawing) -> None:
        """Have what `drawing` lacks made by the weights of now, in threads that no exit waits for."""
        missing = [place for place in range(len(drawing.requests)) if place not in drawing.answers]
        if missing:
            pool = ThreadPool(min(len(missing), REQUESTS_AT_ONCE))
            asked = {place: (drawing.requests[place], self._version) for place in missing}
            drawing.versions |= dict.fromkeys(missing, int(self._version))
            drawing.coming = {place: pool.apply_async(self._client.generate, asked[place]) for place in missing}
            pool.close()

    def _take(self, drawing: Drawing) -> None:
        """What was asked for last; ServerFault after all others were given the time to come."""
        faults = []
        for place, coming in drawing.coming.items():
            try:
                drawing.answers[place] = coming.get()
            except ServerFault as fault:
                faults.append(fault)
        drawing.coming = {}
        if faults:
            raise faults[0]

    def _revive(self) -> None:
        """This rank's own server, well again."""
        if self.server is not None and self._fault is not None:
            self.say(f"a rollout server is started again: {self._fault}")
            try:
                self.server.restart()
            except UserError as error:
                raise ServerFault(str(error)) from error
            self._fault, self._asleep, self._loaded = None, False, ""

    def _load(self) -> None:
        """This rank's own server with the weights of this version. Collective."""
        is_behind = self.server is not None and self._loaded != self._version
        if is_behind and self._asleep:
            self._client.wake_up("weights")
        self._loaded = ""
        self.transport.load(self._client if is_behind else None, self._version)
        self._loaded = self._version

    def _wake_up(self) -> None:
        if self._asleep:
            self._client.wake_up("kv_cache")
            self._asleep = False

    def _sleep(self) -> None:
        if self.server is not None and not self._asleep:
            self._client.sleep()
            self._asleep, self._loaded = True, ""

    def _until_no_server_fails(self, work: Callable[[], None]) -> None:
        """Do `work` on every rank, and again after the servers of those where it failed were started again.

        RolloutFailed when that was done often enough. Collective.
        """
        for _ in range(self.options.max_restarts + 1):
            for part in (self._revive, self._load, self._wake_up, work):
                faults = self._try(part)
                if any(faults):
                    break
            else:
                return
            self._blame(faults)
        rank, fault = next((rank, fault) for rank, fault in enumerate(faults) if fault)
        raise RolloutFailed(
            f"rollout servers failed {self.options.max_restarts + 1} times in a row, at last that of rank {rank}: "
            f"{fault}; see the run's folder vllm, and vllm.max_restarts"
        )

    def _blame(self, faults: Sequence[str | None]) -> None:
        """This rank's own server, where one of the ranks that share it had a fault."""
        if self.server is not None:
            self._fault = next(filter(None, (faults[rank] for rank in self.peers.neighbours)), None)

    def _try(self, work: Callable[[], None]) -> list[str | None]:
        """What was wrong with the server of each rank, if anything. Collective."""
        return self.peers.gather(self.peers.together(lambda: fault_of(work)))


def as_responses(
    answers: Sequence[Answer], versions: Sequence[int], pad_token_id: int, device: torch.device
) -> Responses:
    """The answers and the versions of the weights that made them as tensors, right-padded to the longest."""
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
        versions_B=torch.tensor(versions),
    )


def as_routes(answers: Sequence[Answer], prompt_width: int, width: int) -> torch.Tensor:
    """[B, T + R, N, K] int16: the experts of all tokens, -1 where there is none and on each response's last one."""
    first = answers[0].routes_SNK
    assert first is not None
    routes_BLNK = np.full((len(answers), prompt_width + width, *first.shape[1:]), -1, dtype=np.int16)
    for row, answer in enumerate(answers):
        assert answer.routes_SNK is not None
        end = prompt_width + len(answer.token_ids) - 1
        routes_BLNK[row, end - len(answer.routes_SNK) : end] = answer.routes_SNK
    return torch.from_numpy(routes_BLNK)
