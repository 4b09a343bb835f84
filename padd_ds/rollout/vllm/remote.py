"""Servers on nodes of their own: their list, and what a trainer does when one of them fails."""

import time
from pathlib import Path
from urllib.parse import urlsplit

from padd_ds.config.sections import VllmConfig
from padd_ds.errors import UserError
from padd_ds.rollout.vllm.client import Client
from padd_ds.rollout.vllm.server import is_healthy

_POLL_S = 0.2


def listed_servers(options: VllmConfig) -> list[str]:
    """The base URLs in vllm.servers or in the file that it names; UserError for what is none."""
    assert options.servers is not None
    source, urls = "vllm.servers", options.servers
    if isinstance(urls, str):
        path = Path(urls)
        if not path.is_file():
            raise UserError(f"vllm.servers {path}: no such file; give a file of a URL a line, as padd-serve writes it")
        source, urls = f"{source} {path}", path.read_text(encoding="utf-8").split()
    urls = [url.rstrip("/") for url in urls]
    if not urls:
        raise UserError(f"{source}: names no server; give a URL of each, such as http://node7:8000")
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or urls.count(url) > 1:
            twice = " twice" if urls.count(url) > 1 else ""
            raise UserError(f"{source}: {url}{twice}; give the URL of each server once, such as http://node7:8000")
    return urls


def places_of(world: int, servers: int) -> list[int]:
    """The place of each rank's server in the list: neighbours share one, and no server has two ranks more than
    another. UserError for a server without a rank."""
    if servers > world:
        raise UserError(
            f"vllm.servers lists {servers} servers for {world} ranks, each of which asks one: list {world} at most, of "
            "more vllm.tensor_parallel each"
        )
    return [rank * servers // world for rank in range(world)]


class RemoteServer:
    """A server that another process (`padd-serve`) starts again whenever it ends."""

    def __init__(self, url: str, options: VllmConfig) -> None:
        self.url = url
        self._options = options

    def wait_until_ready(self) -> None:
        """UserError where that takes too long."""
        deadline = time.monotonic() + self._options.start_timeout_s
        while not is_healthy(self.url):
            if time.monotonic() > deadline:
                raise UserError(
                    f"the rollout server {self.url} did not answer in vllm.start_timeout_s "
                    f"{self._options.start_timeout_s:g}; start padd-serve there, or see its log"
                )
            time.sleep(_POLL_S)

    def restart(self) -> None:
        """Have it end, unless it is new already, and wait for the next."""
        client = Client(self.url, timeout_s=5.0)
        if not client.is_new():
            client.end()
        self.wait_until_ready()
