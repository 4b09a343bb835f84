"""Talks to one vLLM server: weights in, tokens out, every answer checked.

vLLM's routes: /inference/v1/generate (token ids in, token ids out), /health, and those of VLLM_SERVER_DEV_MODE for
weights, the prefix cache and sleep.
"""

import base64
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import requests

from padd_ds.errors import RolloutFailed
from padd_ds.rollout.vllm.server import ServerFault

UPDATING = "updating"
"""The version that a server tells while its weights change; nothing made then is taken."""
AS_STARTED = "default"
"""The version of the weights that a server loaded when it started."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """`n` responses to one prompt; the one at place i is drawn by the seed `seed` + i."""

    token_ids: list[int]
    n: int
    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float
    end_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    """Texts that end a response too; they stay in it."""
    routers: "Routers | None" = None
    """Those whose experts the server tells; None: it tells none."""


@dataclass(frozen=True, kw_only=True)
class Routers:
    """What the experts that a server tells can be."""

    layers: int
    """The model's last."""
    top_k: int
    experts: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response."""

    token_ids: list[int]
    """With the end token, where it ended by one."""
    logprobs: list[float]
    ended: bool
    routes_SNK: np.ndarray | None = None
    """[tokens of prompt and response but the last, MoE layers, experts per token]; None where they are not told."""


class Client:
    """`url` of a server, and how long any of its answers may take.

    All calls raise ServerFault where the server fails, RolloutFailed where it is well and refuses.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s

    def begin_update(self) -> None:
        """Weights are to come; ServerFault from here to `end_update`: they are in an unknown state."""
        self._post("update_weight_version", {"new_version": UPDATING})
        self._post("start_weight_update")

    def connect(self, meeting: Mapping[str, Any]) -> None:
        """Have the workers join a group of senders and receivers; answers when all are there."""
        self._post("init_weight_transfer_engine", {"init_info": meeting})

    def update(self, weights: Mapping[str, Any]) -> None:
        """Take over some of the weights."""
        self._post("update_weights", {"update_info": weights})

    def end_update(self, version: str) -> None:
        """All weights have come; from now on they are `version`."""
        self._post("finish_weight_update", {"weight_version": UPDATING})
        # Keys and values of the weights before.
        self._post("reset_prefix_cache")
        self._post("update_weight_version", {"new_version": version})

    def workers(self) -> int:
        """How many processes hold the weights."""
        told = self._get("get_world_size")
        try:
            return int(told["world_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ServerFault(f"{self.url}/get_world_size answers {told!r}") from error

    def is_new(self) -> bool:
        """Whether it has the weights that a server starts with; False where it does not answer."""
        try:
            return bool(self._get("weight_info") == {"weight_version": AS_STARTED})
        except ServerFault:
            return False

    def end(self) -> None:
        """Have the server's process end at once, whatever its engine does; nothing where there is none."""
        with suppress(ServerFault):  # its connection ends with it
            self._post("padd/end")

    def generate(self, request: Request, version: str) -> list[Answer]:
        """The responses, in the order of their seeds, all of them made by the weights of `version`.

        At temperature 0 they are all the same one.
        """
        n_drawn = 1 if request.temperature == 0 else request.n
        sampling = {
            "n": n_drawn,
            "seed": request.seed,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop_token_ids": list(request.end_token_ids),
            # The checkpoint's own end token does not count, where it is not among those.
            "ignore_eos": True,
            "stop": list(request.stop),
            "logprobs": 0,
            "detokenize": bool(request.stop),
        }
        told = self._post("inference/v1/generate", {"token_ids": request.token_ids, "sampling_params": sampling})
        return _checked_answers(told, replace(request, n=n_drawn), version) * (request.n // n_drawn)

    def sleep(self) -> None:
        """Give the memory of weights and cache back; both are gone."""
        self._post("sleep?level=2")

    def wake_up(self, tag: str) -> None:
        """Take memory again, for `weights` or for the `kv_cache`."""
        self._post(f"wake_up?tags={tag}")

    def _get(self, route: str) -> Any:
        return self._ask("GET", route)

    def _post(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._ask("POST", route, body)

    def _ask(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            answer = requests.request(method, f"{self.url}/{route}", json=body, timeout=self._timeout_s)
            if 400 <= answer.status_code < 500:
                raise RolloutFailed(f"{self.url}/{route} refuses what it is asked: {answer.text[:300]}")
            if answer.status_code != 200:
                raise ServerFault(f"{self.url}/{route} answers {answer.status_code}: {answer.text[:300]}")
            return answer.json() if answer.content else None
        except (requests.RequestException, ValueError) as error:
            raise ServerFault(f"{self.url}/{route}: {error}") from error


def _checked_answers(told: Any, request: Request, version: str) -> list[Answer]:
    """ServerFault for anything that is not what was asked for."""
    try:
        choices = sorted(told["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(request.n)):
            raise ServerFault(f"{len(choices)} responses where {request.n} were asked for")
        return [_checked_answer(choice, request, version) for choice in choices]
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerFault(f"an answer without what it must have: {error!r}") from error


def _checked_answer(choice: Mapping[str, Any], request: Request, version: str) -> Answer:
    token_ids = [int(token) for token in choice["token_ids"]]
    logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    versions = {span["version"] for span in choice["weight_versions"]}
    reason = choice["finish_reason"]
    if versions != {version}:
        raise ServerFault(f"a response of weights {sorted(versions)} where {version} are meant")
    if reason not in ("stop", "length") or not 0 < len(token_ids) <= request.max_new_tokens:
        raise ServerFault(f"a response of {len(token_ids)} tokens that ended by {reason}")
    if [entry["token_id"] for entry in choice["logprobs"]["content"]] != token_ids:
        raise ServerFault("log-probabilities of other tokens than the response's")
    if not all(math.isfinite(logprob) and logprob <= 1e-6 for logprob in logprobs):
        raise ServerFault("a log-probability that is none")
    ended = token_ids[-1] in request.end_token_ids or choice.get("stop_reason") in request.stop
    if ended != (reason == "stop"):
        raise ServerFault(f"a response that ended by {reason} with token {token_ids[-1]}")
    routes_SNK = None
    if request.routers is not None:
        routes_SNK = _checked_routes(choice, request.routers, len(request.token_ids) + len(token_ids) - 1)
    return Answer(token_ids=token_ids, logprobs=logprobs, ended=ended, routes_SNK=routes_SNK)


def _checked_routes(choice: Mapping[str, Any], routers: Routers, n_tokens: int) -> np.ndarray:
    """vLLM tells an .npy file of [tokens of prompt and response but the last, hidden layers, experts of a token]."""
    told = choice["routed_experts"]
    if told is None:
        raise RolloutFailed(
            "the rollout server tells no experts: routing.replay=rollout and vllm.tell_experts must stand in the "
            "configuration of padd-serve, too"
        )
    try:
        routes_SNK = np.lib.format.read_array(BytesIO(base64.b64decode(told, validate=True)), allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ServerFault(f"experts that cannot be read: {error}") from error
    expected = (n_tokens, routers.layers, routers.top_k)
    if routes_SNK.ndim != 3 or routes_SNK.dtype.kind not in "iu" or routes_SNK[:, -routers.layers :].shape != expected:
        raise ServerFault(f"experts of shape {routes_SNK.shape} and type {routes_SNK.dtype} where {expected} is meant")
    routes_SNK = routes_SNK[:, -routers.layers :]
    if routes_SNK.min() < 0 or routes_SNK.max() >= routers.experts:
        raise ServerFault(f"experts from {routes_SNK.min()} to {routes_SNK.max()} of {routers.experts}")
    return routes_SNK
