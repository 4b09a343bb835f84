"""The rollout servers of a node of their own: started, watched, started again, ended."""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch

from padd_ds.config.schema import RunConfig
from padd_ds.errors import UserError
from padd_ds.files import write_text_whole
from padd_ds.rollout.vllm.devices import visible_gpus
from padd_ds.rollout.vllm.server import ANYWHERE, Server, is_healthy

_POLL_S = 0.5


def servers_of_this_node(config: RunConfig, dtype: str, folder: Path) -> list[Server]:
    """One for every vllm.tensor_parallel GPUs of this node, not started; on a CPU one. Their logs go to `folder`."""
    options = config.vllm
    return [
        Server(
            model=config.model.student,
            dtype=dtype,
            max_model_tokens=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
            options=options,
            folder=None,
            log_path=folder / f"server_{socket.gethostname()}_{number}.log",
            port=options.port + number if options.port else 0,
            host=ANYWHERE,
            devices=devices,
            trust_remote_code=config.model.trust_remote_code,
            tells_experts=config.servers_tell_experts,
        )
        for number, devices in enumerate(_shares(options.tensor_parallel))
    ]


def serve(servers: Sequence[Server], host: str, urls_file: Path, say: Callable[[str], None]) -> None:
    """Keep the servers until an exception, such as a signal's, ends them; `urls_file` is there while they are ready.

    UserError, from the server's log, for one that does not start, or ends vllm.max_restarts times more before it was
    ready again.
    """
    ended = [0] * len(servers)
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        urls = [f"http://{host}:{urlsplit(server.url).port}" for server in servers]
        write_text_whole(urls_file, "".join(f"{url}\n" for url in urls))
        say(f"ready: {' '.join(urls)}")
        while True:
            time.sleep(_POLL_S)
            for number, server in enumerate(servers):
                if server.has_ended:
                    ended[number] += 1
                    if ended[number] > server.options.max_restarts:
                        raise UserError(f"{urls[number]} ended {ended[number]} times in a row: {server.cause()}")
                    say(f"{urls[number]} ended and is started again: {server.cause()}")
                    server.stop()
                    server.start()
                elif ended[number] and is_healthy(server.url):
                    ended[number] = 0
                    say(f"ready again: {urls[number]}")
    finally:
        urls_file.unlink(missing_ok=True)
        for server in servers:
            server.stop()


def _shares(tensor_parallel: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES says to each server."""
    if not torch.cuda.is_available():
        return [None]
    names = visible_gpus()
    if len(names) % tensor_parallel:
        raise UserError(
            f"vllm.tensor_parallel {tensor_parallel} does not divide the {len(names)} GPUs of {socket.gethostname()}"
        )
    return [",".join(names[first : first + tensor_parallel]) for first in range(0, len(names), tensor_parallel)]
