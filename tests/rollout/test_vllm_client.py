"""What a server answers is taken only if it is what was asked for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from padd_ds.errors import RolloutFailed
from padd_ds.rollout.vllm.client import Client, Request, Routers
from padd_ds.rollout.vllm.server import ServerFault
from tests.rollout.fake_vllm import END, FakeVllm, npy, routes

REQUEST = Request(token_ids=[5, 6], n=2, seed=7, max_new_tokens=4, temperature=1.0, top_p=1.0, end_token_ids=(END,))


def update(client: Client) -> None:
    client.begin_update()
    client.update({"parts": []})
    client.end_update("3")


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    fake = FakeVllm()
    yield fake
    fake.stop()


def test_responses_come_in_the_order_of_their_seeds(fake: FakeVllm) -> None:
    answers = Client(fake.url, 5).generate(REQUEST, "default")
    assert [answer.token_ids for answer in answers] == [[0, 7, END], [0, 8, END]]
    assert all(answer.ended and answer.logprobs == [0.0, -0.5, -1.0] for answer in answers)
    sampling = fake.seen[0]["sampling_params"]
    assert fake.seen[0]["token_ids"] == [5, 6]
    assert (sampling["n"], sampling["stop_token_ids"], sampling["max_tokens"]) == (2, [END], 4)


def test_a_cut_response_has_not_ended(fake: FakeVllm) -> None:
    cut = Request(**{**vars(REQUEST), "max_new_tokens": 2})
    assert [answer.ended for answer in Client(fake.url, 5).generate(cut, "default")] == [False, False]


WITH_EXPERTS, SHAPE = replace(REQUEST, routers=Routers(layers=2, top_k=2, experts=8)), (3, 2, 8)


def test_experts_come_where_they_are_asked_for(fake: FakeVllm) -> None:
    fake.tells_experts = SHAPE
    assert Client(fake.url, 5).generate(REQUEST, "default")[0].routes_SNK is None
    for answer in Client(fake.url, 5).generate(WITH_EXPERTS, "default"):
        assert answer.routes_SNK is not None and answer.routes_SNK.tolist() == routes(2 + 3 - 1, *SHAPE)[:, 1:].tolist()


def test_a_server_that_was_not_started_to_tell_experts_is_no_fault_of_its_own(fake: FakeVllm) -> None:
    with pytest.raises(RolloutFailed, match=r"tells no experts: .* in the configuration of padd-serve"):
        Client(fake.url, 5).generate(WITH_EXPERTS, "default")


@pytest.mark.parametrize(
    "told",
    [
        *("no base64", "AAAA", "", npy(routes(3, *SHAPE)), npy(routes(4, *SHAPE)[0])),
        *(npy(routes(4, 1, 2, 8)), npy(routes(4, *SHAPE).astype(float)), npy(routes(4, 3, 4, 8))),
        *(npy(routes(4, *SHAPE) + 8), npy(routes(4, *SHAPE).astype(np.int8) - 1)),
    ],
)
def test_experts_of_other_tokens_or_that_no_router_has_are_not_taken(fake: FakeVllm, told: str) -> None:
    fake.faults = [changed(lambda choice: choice.update(routed_experts=told))]
    with pytest.raises(ServerFault, match="experts"):
        Client(fake.url, 5).generate(replace(WITH_EXPERTS, n=1), "default")


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(told: dict[str, Any]) -> dict[str, Any]:
        change(told["choices"][0])
        return told

    return apply


GARBAGE: dict[str, Any] = {
    "no JSON": lambda told: "<html>",
    "nothing": lambda told: {},
    "a list": lambda told: [],
    "too few": lambda told: {"choices": told["choices"][:1]},
    "one twice": lambda told: {"choices": [told["choices"][0]] * 2},
    "stale": changed(lambda c: c.update(weight_versions=[{"version": "0", "start": 0, "end": 3}])),
    "half stale": changed(lambda c: c["weight_versions"].append({"version": "updating", "start": 2, "end": 3})),
    "no version": changed(lambda c: c.pop("weight_versions")),
    "no tokens": changed(lambda c: c.update(token_ids=[], logprobs={"content": []})),
    "too long": changed(
        lambda c: c.update(token_ids=[3] * 5, logprobs={"content": [{"token_id": 3, "logprob": -1.0}] * 5})
    ),
    "aborted": changed(lambda c: c.update(finish_reason="abort")),
    "ended without the end": changed(lambda c: c.update(finish_reason="length")),
    "others' logprobs": changed(lambda c: c["logprobs"]["content"][0].update(token_id=9)),
    "fewer logprobs": changed(lambda c: c["logprobs"]["content"].pop()),
    "no logprob": changed(lambda c: c["logprobs"]["content"][0].update(logprob=None)),
    "NaN": changed(lambda c: c["logprobs"]["content"][0].update(logprob=float("nan"))),
    "above 1": changed(lambda c: c["logprobs"]["content"][0].update(logprob=0.3)),
    "status": 500,
    "died": "die",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_a_fault(fake: FakeVllm, what: str) -> None:
    fake.faults = [GARBAGE[what]]
    with pytest.raises(ServerFault):
        Client(fake.url, 5).generate(REQUEST, "default")
    assert Client(fake.url, 5).generate(REQUEST, "default")


def test_what_a_server_refuses_is_no_fault_of_its_own(fake: FakeVllm) -> None:
    fake.faults = [400]
    with pytest.raises(RolloutFailed, match="refuses what it is asked"):
        Client(fake.url, 5).generate(REQUEST, "default")


def test_greedy_responses_are_asked_for_once(fake: FakeVllm) -> None:
    answers = Client(fake.url, 5).generate(Request(**{**vars(REQUEST), "temperature": 0.0}), "default")
    assert [answer.token_ids for answer in answers] == [[0, 7, END]] * 2
    assert fake.seen[0]["sampling_params"]["n"] == 1


def test_a_server_that_hangs_is_one_that_failed(fake: FakeVllm) -> None:
    fake.faults = ["hang"]
    with pytest.raises(ServerFault, match="timed out"):
        Client(fake.url, 0.3).generate(REQUEST, "default")


def test_nobody_listening_is_a_fault(fake: FakeVllm) -> None:
    fake.stop()
    with pytest.raises(ServerFault):
        Client(fake.url, 1).sleep()
    fake.start()


def test_weights_in_between_have_a_version_that_nobody_asks_for(fake: FakeVllm) -> None:
    """An update that fails half-way leaves a server whose responses are refused."""
    fake.faults = [None, None, 500]
    client = Client(fake.url, 5)
    with pytest.raises(ServerFault):
        update(client)
    for version in ("default", "3"):
        with pytest.raises(ServerFault, match="updating"):
            client.generate(REQUEST, version)


def test_keys_and_values_of_the_weights_before_are_dropped(fake: FakeVllm) -> None:
    fake.faults = [None, None, lambda told: told]
    fake.act = lambda route, body: {}  # type: ignore[method-assign]
    update(Client(fake.url, 5))
    assert fake.routes.index("/reset_prefix_cache") > fake.routes.index("/finish_weight_update")
    assert fake.routes[-1] == "/update_weight_version"
