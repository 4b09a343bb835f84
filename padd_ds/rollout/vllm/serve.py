"""vLLM's own HTTP server, by its own command line; run by path inside vLLM's interpreter."""

import os
import signal
import sys
from typing import Any

import vllm.v1.engine.core
from vllm.entrypoints.launchers.api_server.entry import main
from vllm.platforms import current_platform

from padd_ds.rollout.vllm.whole import WholeResponses

# Here and not below: a process that is spawned runs this file, too, but under another name.
vllm.v1.engine.core.EngineCoreProc = WholeResponses


class Ending:
    """Middleware of servers that a trainer on another node uses: POST /padd/end ends the process, hung or not."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/padd/end":
            os.kill(os.getpid(), signal.SIGKILL)
        await self._app(scope, receive, send)


if __name__ == "__main__":
    if current_platform.is_cpu():
        # vLLM 0.32 takes back the draw of a seeded request whose prompt it has read in part, and a CPU's generator
        # cannot: its engine dies. First, so that arguments of the user's overrule it.
        sys.argv.insert(1, "--no-enable-chunked-prefill")
        # Only whole blocks of a prompt are shared by its group's responses, and vLLM's are of 128 tokens on a CPU.
        sys.argv[1:1] = ["--block-size", "32"]
        if sys.argv[sys.argv.index("--tensor-parallel-size") + 1] == "1":
            # A worker of its own would poll for a second after its last message, on cores that training could use.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM's condition on a CPU
            sys.argv[1:1] = ["--distributed-executor-backend", "uni"]
    main()
