"""The responses of an evaluation, drawn by a vLLM server."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import OneRankError, RolloutFailed, UserError
from padd_ds.evaluation.generate import GenerationOptions, Response, progress_bar, prompt_ids, read_response
from padd_ds.evaluation.kept import Share
from padd_ds.evaluation.scoring import Draw
from padd_ds.hf import end_token_ids
from padd_ds.rollout.vllm.client import AS_STARTED, Answer, Client, Request
from padd_ds.rollout.vllm.devices import gpus_of_server
from padd_ds.rollout.vllm.server import Server, ServerFault


@contextmanager
def served_responses(
    source: str,
    skeleton: Any,
    tokenizer: Any,
    max_model_tokens: int,
    options: VllmConfig,
    log_path: Path,
    share: Share,
) -> Iterator[Draw]:
    """What draws this rank's responses: a server of its own, which ends with the block or with this process.

    `skeleton`: the model as `load_skeleton` gives it. UserError where a server does not start. Collective.
    """
    check_servable(source, skeleton.config)
    with tempfile.TemporaryDirectory(prefix="padd-eval-") as folder:
        server = Server(
            model=str(Path(source).expanduser()) if Path(source).expanduser().exists() else source,
            dtype=str(skeleton.dtype).removeprefix("torch."),
            max_model_tokens=max_model_tokens,
            options=options,
            folder=Path(folder),
            log_path=log_path,
        )
        try:
            share.together(lambda: _start(server, share))
            yield partial(draw_responses, server, tokenizer, end_token_ids(skeleton, tokenizer))
        finally:
            server.stop()


def check_servable(source: str, config: Any) -> None:
    """UserError for a model that vLLM loads without a word and computes wrongly."""
    if config.model_type == "glm4_moe" and config.tie_word_embeddings:
        raise UserError(
            f"{source}: vLLM's class of glm4_moe reads no tied head and would repeat one token for ever; write the "
            "head out with tie_word_embeddings false, as padd-export does, or use --backend hf"
        )


def draw_responses(
    server: Server,
    tokenizer: Any,
    end_ids: Sequence[int],
    prompts: Sequence[str],
    options: GenerationOptions,
    seeds: Sequence[int],
    show_progress: bool = True,
) -> Iterator[dict[int, Response]]:
    """As `generate_batches`, but by the server: up to `options.batch_size` requests at once, told as they come.

    A server that fails is started again, up to `max_restarts` times; then, and where it refuses what it is asked,
    OneRankError.
    """
    requests = {
        row: Request(
            token_ids=prompt_ids(prompt, tokenizer),
            n=1,
            seed=seed,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            end_token_ids=tuple(end_ids),
            stop=options.stop,
        )
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    }
    restarts = 0
    with progress_bar(len(requests), show_progress) as progress:
        while requests:
            try:
                for answers in ask(server, requests, options.batch_size):
                    yield {
                        row: read_response(answer.token_ids, end_ids, tokenizer, options)
                        for row, answer in answers.items()
                    }
                    progress.update(len(answers))
                    for row in answers:
                        del requests[row]
            except RolloutFailed as error:
                raise OneRankError(f"vLLM: {error}; see {server.log_path}") from error
            except ServerFault as fault:
                if restarts == server.options.max_restarts:
                    raise OneRankError(
                        f"the vLLM server failed {restarts + 1} times, at last: {fault}; see {server.log_path}; "
                        "finished responses are kept, and the same command goes on behind them"
                    ) from fault
                restarts += 1
                print(f"the vLLM server is started again: {fault}", file=sys.stderr, flush=True)
                _restart(server)


def ask(server: Server, requests: Mapping[int, Request], at_once: int) -> Iterator[dict[int, Answer]]:
    """The answers by the keys of their requests, as they come. ServerFault, behind those that had come by then."""
    client = Client(server.url, server.options.answer_timeout_s)
    came: SimpleQueue[Future[list[Answer]]] = SimpleQueue()
    row_of: dict[Future[list[Answer]], int] = {}
    pool = ThreadPoolExecutor(max_workers=at_once)
    try:
        for row, request in requests.items():
            future = pool.submit(client.generate, request, AS_STARTED)
            row_of[future] = row
            future.add_done_callback(came.put)
        left = len(requests)
        while left:
            # At least one, and what else has come while the one before was checked.
            batch = [came.get() for _ in range(max(came.qsize(), 1))]
            left -= len(batch)
            faults = [fault for future in batch if (fault := future.exception())]
            if answers := {row_of[future]: future.result()[0] for future in batch if not future.exception()}:
                yield answers
            if faults:
                raise faults[0]
    finally:
        # Not waiting for those under way: the server that they wait for is ended, or started again.
        pool.shutdown(wait=False, cancel_futures=True)


def _start(server: Server, share: Share) -> None:
    if share.device is not None and share.device != "cpu":
        # On a machine with GPUs each rank has the one of its own number, `cuda:N`; their servers have as many in a row.
        local_rank, count = int(share.device.rpartition(":")[2]), server.options.tensor_parallel
        server.devices = gpus_of_server(share.rank, local_rank * count, count)
    server.start()
    server.wait_until_ready()


def _restart(server: Server) -> None:
    try:
        server.restart()
    except UserError as error:
        raise OneRankError(str(error)) from error
