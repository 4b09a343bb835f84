"""Responses leave vLLM's engine when they are whole.

Its engine hands every token of every response over to the process that answers, which takes each apart again; of many
responses at once that is more work than a small model's own. Nobody reads a rollout's tokens one by one, so here a
response's tokens wait in the engine for its last one. Written against vLLM 0.32 (vllm/v1/engine/core.py).
"""

from itertools import chain
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.outputs import LogprobsLists

logger = init_logger("vllm.padd_ds")

_MORE = ("new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "pooling_output", "events", "new_sampling_mask")
"""What an output can bring beside tokens, their log-probabilities and experts; one that does waits for nothing."""


class WholeResponses(EngineCoreProc):
    """The engine's process, which answers those who wait for whole responses (`RequestOutputKind.FINAL_ONLY`) once."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._waiting: dict[str, list[EngineCoreOutput]] = {}
        """By request."""
        super().__init__(*arguments, **named)
        logger.info("responses leave the engine when they are whole")

    def _attach_weight_version(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """What vLLM calls with the outputs of every step."""
        for of_client in outputs.values():
            of_client.outputs = [self._with_what_waited(one) for one in of_client.outputs if not self._waits(one)]
        if len(self._waiting) > len(self.scheduler.requests):
            live = self.scheduler.requests.keys()  # the clients of others gave up
            self._waiting = {request_id: parts for request_id, parts in self._waiting.items() if request_id in live}
        super()._attach_weight_version(outputs)

    def set_weight_version(self, weight_version: str) -> None:
        """What waits is of the version before, and goes now to be told as such."""
        for request_id in list(self._waiting):
            parts, request = self._waiting.pop(request_id), self.scheduler.requests.get(request_id)
            if request is not None:  # else its client gave up
                freed = EngineCoreOutputs(outputs=[joined(parts)], weight_version=self._weight_version)
                self.output_queue.put_nowait((request.client_index, freed))
        super().set_weight_version(weight_version)

    def _waits(self, output: EngineCoreOutput) -> bool:
        if output.finished or any(getattr(output, name) is not None for name in _MORE):
            return False
        sampling = self.scheduler.requests[output.request_id].sampling_params
        # Texts that end a response are looked for by the process that answers.
        if sampling is None or sampling.output_kind != RequestOutputKind.FINAL_ONLY or sampling.stop:
            return False
        if output.routed_experts is not None:
            output.routed_experts = output.routed_experts.copy()  # not a view of those of the step's every response
        self._waiting.setdefault(output.request_id, []).append(output)
        return True

    def _with_what_waited(self, output: EngineCoreOutput) -> EngineCoreOutput:
        return joined([*self._waiting.pop(output.request_id, ()), output])


def joined(parts: list[EngineCoreOutput]) -> EngineCoreOutput:
    """The last of a request's consecutive outputs, with the tokens of all: their log-probabilities, nats, [tokens, as
    many as the request wants and the drawn one's], and their experts [tokens, layers, experts of a token]."""
    last = parts[-1]
    last.new_token_ids = list(chain.from_iterable(part.new_token_ids for part in parts))
    last.prefill_stats = parts[0].prefill_stats
    if logprobs := [part.new_logprobs for part in parts if part.new_logprobs is not None]:
        # A row has as many as the request of that step that wants the most; nobody reads more than the narrowest has.
        width = min(part.logprobs.shape[1] for part in logprobs)
        last.new_logprobs = LogprobsLists(
            np.concatenate([part.logprob_token_ids[:, :width] for part in logprobs]),
            np.concatenate([part.logprobs[:, :width] for part in logprobs]),
            np.concatenate([part.sampled_token_ranks for part in logprobs]),
        )
    if experts := [part.routed_experts for part in parts if part.routed_experts is not None]:
        last.routed_experts = np.concatenate(experts)
    return last
