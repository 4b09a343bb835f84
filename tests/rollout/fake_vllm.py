"""An HTTP server that answers as vLLM's does, with the faults that a test asks for; run by path, a process.

Its responses tell the weights that they were made by: the first token is the first value of the tensor `w`.
"""

import base64
import contextlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from padd_ds.rollout.vllm.exchange import read_part
from padd_ds.rollout.vllm.network import go_to_meeting, join, receive

END = 2
CPU = torch.device("cpu")


class FakeVllm:
    """`faults`: what to do to the next requests, in order: an answer's change, `hang`, `die`, or nothing (None)."""

    def __init__(self, port: int = 0, tokens: int = 1000) -> None:
        self.port, self.tokens = port, tokens
        self.faults: list[Any] = []
        self.version, self.first, self.seen, self.routes = "default", 0, [], []
        self.restarts = 0
        self.tells_experts: tuple[int, int, int] | None = None
        """Hidden layers, experts of a token, routed experts."""
        self.received: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told = {"/get_world_size": {"world_size": 1}, "/weight_info": {"weight_version": fake.version}}
                self.answer(200, told.get(self.path, {}))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                with fake.lock:
                    fake.routes.append(self.path)
                    fault = fake.faults.pop(0) if fake.faults else None
                if fault == "hang":
                    time.sleep(3)
                if self.path == "/padd/end":
                    threading.Thread(target=fake.restart).start()  # as its supervisor would
                if fault == "die" or self.path == "/padd/end":
                    self.connection.close()
                    return
                if isinstance(fault, int):
                    self.answer(fault, {"error": "planted"})
                    return
                told = fake.act(self.path, body)
                self.answer(200, fault(told) if callable(fault) else told)

            def answer(self, code: int, body: Any) -> None:
                text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that waited no longer
                    self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """As a server that comes back: with the weights that it had at first."""
        self.stop()
        self.restarts += 1
        self.version, self.first = "default", 0
        self.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def act(self, route: str, body: Any) -> Any:
        if route == "/update_weight_version":
            self.version = body["new_version"]
        if route == "/init_weight_transfer_engine":
            meeting = body["init_info"]
            store = go_to_meeting(meeting["address"], meeting["port"], meeting["timeout_s"])
            self.group = join(store, meeting["first_rank"], meeting["world"], CPU, meeting["timeout_s"])
        if route == "/update_weights":
            tensors = self.weights(body["update_info"])
            self.received |= {name: (tensor.shape, float(tensor.double().sum())) for name, tensor in tensors.items()}
            self.first = int(tensors.get("w", [self.first])[0])
        if route != "/inference/v1/generate":
            return {}
        sampling = body["sampling_params"]
        self.seen.append(body)
        choices = [self.choice(index, sampling) for index in range(sampling["n"])]
        for choice in choices:
            n_tokens = len(body["token_ids"]) + len(choice["token_ids"]) - 1
            choice["routed_experts"] = npy(routes(n_tokens, *self.tells_experts)) if self.tells_experts else None
        return {"choices": choices[::-1]}

    def weights(self, told: dict[str, Any]) -> dict[str, torch.Tensor]:
        if "part" in told:
            return dict(receive(self.group, told["part"], CPU))
        return dict(pair for part in told["parts"] for pair in read_part(part))

    def choice(self, index: int, sampling: dict[str, Any]) -> dict[str, Any]:
        token_ids = [self.first, sampling["seed"] % self.tokens + index, END][: sampling["max_tokens"]]
        content = [{"token_id": token, "logprob": -0.5 * place} for place, token in enumerate(token_ids)]
        return {
            "index": index,
            "token_ids": token_ids,
            "finish_reason": "stop" if token_ids[-1] == END else "length",
            "weight_versions": [{"version": self.version, "start": 0, "end": len(token_ids)}],
            "logprobs": {"content": content},
        }


def routes(n_tokens: int, layers: int, top_k: int, experts: int) -> np.ndarray:
    """[tokens, layers, top_k], by place."""
    first = np.arange(n_tokens)[:, None, None] + 3 * np.arange(layers)[None, :, None]
    return ((first + np.arange(top_k)) % experts).astype(np.uint8)


def npy(array: np.ndarray) -> str:
    """As vLLM sends it."""
    file = BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def fake_interpreter(path: Path) -> str:
    """An executable at `path` that stands for a Python with vLLM, whose server is this one."""
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo 0.32.0; else shift; exec {sys.executable} {__file__} "$@"; fi\n'
    )
    path.chmod(0o755)
    return str(path)


if __name__ == "__main__":
    served = FakeVllm(int(sys.argv[sys.argv.index("--port") + 1]), tokens=10)
    served.restart = lambda: os._exit(1)  # type: ignore[method-assign]
    if "--enable-return-routed-experts" in sys.argv and os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        model = json.loads(Path(sys.argv[sys.argv.index("--model") + 1], "config.json").read_text())
        served.tells_experts = tuple(  # type: ignore[assignment]
            model[key] for key in ("num_hidden_layers", "num_experts_per_tok", "n_routed_experts")
        )
    threading.Event().wait()
