"""Run by vLLM's Python: what leaves an engine of `WholeResponses`, whose steps are played here."""

from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists

from padd_ds.rollout.vllm.whole import WholeResponses


def engine(**sampling: SamplingParams) -> Any:
    """One with a request of each name, of client 3, without all that computes."""
    made = WholeResponses.__new__(WholeResponses)
    requests = {name: SimpleNamespace(sampling_params=one, client_index=3) for name, one in sampling.items()}
    made.scheduler = SimpleNamespace(requests=requests)
    made._waiting, made._weight_version, made.output_queue = {}, "7", Queue()
    return made


def output(request_id: str, *tokens: int, width: int = 1, experts: bool = False, **more: Any) -> EngineCoreOutput:
    """`width` log-probabilities of each token."""
    column = np.repeat(np.array(tokens)[:, None], width, axis=1)
    logprobs = LogprobsLists(column, -column / 8, np.array(tokens))
    routes = np.repeat(column[:, None, :1], 2, axis=1) if experts else None
    return EngineCoreOutput(request_id, list(tokens), new_logprobs=logprobs, routed_experts=routes, **more)


def stepped(made: Any, *outputs: EngineCoreOutput) -> EngineCoreOutputs:
    """What leaves after a step of these."""
    of_clients = {3: EngineCoreOutputs(outputs=list(outputs))}
    made._attach_weight_version(of_clients)
    return of_clients[3]


def told(of_client: EngineCoreOutputs) -> dict[str, list[int]]:
    """Tokens by request; their log-probabilities are of the same tokens."""
    for one in of_client.outputs:
        assert one.new_logprobs is not None and one.new_logprobs.logprob_token_ids[:, 0].tolist() == one.new_token_ids
        assert np.array_equal(one.new_logprobs.logprobs[:, 0], -np.array(one.new_token_ids) / 8)
        assert one.new_logprobs.sampled_token_ranks.tolist() == one.new_token_ids
    return {one.request_id: one.new_token_ids for one in of_client.outputs}


def at_the_end(**more: Any) -> SamplingParams:
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, logprobs=0, **more)


def tokens_wait_for_the_last() -> None:
    made = engine(a=at_the_end(), b=at_the_end())
    assert told(stepped(made, output("a", 1, experts=True), output("b", 2))) == {}
    assert told(stepped(made, output("a", 3, 4, experts=True), output("b", 5))) == {}
    last = stepped(made, output("a", 6, experts=True, finish_reason=FinishReason.STOP), output("b", 7))
    assert told(last) == {"a": [1, 3, 4, 6]} and last.weight_version == "7"
    assert last.outputs[0].routed_experts.tolist() == [[[1]] * 2, [[3]] * 2, [[4]] * 2, [[6]] * 2]
    assert told(stepped(made, output("b", 8, finish_reason=FinishReason.LENGTH))) == {"b": [2, 5, 7, 8]}
    assert not made._waiting


def a_step_may_tell_more_log_probabilities_than_another() -> None:
    made = engine(a=at_the_end())
    stepped(made, output("a", 1))
    stepped(made, output("a", 2, width=6))
    last = stepped(made, output("a", 3, finish_reason=FinishReason.STOP))
    assert told(last) == {"a": [1, 2, 3]} and last.outputs[0].new_logprobs.logprobs.shape == (3, 1)


def nothing_waits_for_a_request_that_was_given_up() -> None:
    made = engine(a=at_the_end(), gone=at_the_end())
    stepped(made, output("a", 1), output("gone", 2))
    del made.scheduler.requests["gone"]
    stepped(made, output("a", 3))
    assert made._waiting.keys() == {"a"}


def some_do_not_wait() -> None:
    made = engine(
        streamed=SamplingParams(output_kind=RequestOutputKind.DELTA), stopped=at_the_end(stop=["x"]), plain=at_the_end()
    )
    outputs = output("streamed", 1), output("stopped", 2), output("plain", 3)
    assert told(stepped(made, *outputs)) == {"streamed": [1], "stopped": [2]}
    event = EngineCoreEvent.new_event(EngineCoreEventType.PREEMPTED)
    assert told(stepped(made, output("plain", 4, events=[event]))) == {"plain": [3, 4]}


def a_new_version_takes_none_of_the_old_ones_tokens() -> None:
    made = engine(a=at_the_end(), gone=at_the_end())
    stepped(made, output("a", 1), output("gone", 2))
    stepped(made, output("a", 3))
    del made.scheduler.requests["gone"]
    made.set_weight_version("8")
    client, freed = made.output_queue.get_nowait()
    assert (client, told(freed), freed.weight_version) == (3, {"a": [1, 3]}, "7")
    assert made.output_queue.empty() and not made._waiting
    last = stepped(made, output("a", 4, finish_reason=FinishReason.LENGTH))
    assert (told(last), last.weight_version) == ({"a": [4]}, "8")


if __name__ == "__main__":
    tokens_wait_for_the_last()
    a_step_may_tell_more_log_probabilities_than_another()
    nothing_waits_for_a_request_that_was_given_up()
    some_do_not_wait()
    a_new_version_takes_none_of_the_old_ones_tokens()
    print("WHOLE")
