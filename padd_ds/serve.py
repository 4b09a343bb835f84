"""padd-serve: rollout servers on a node of their own, for a training on other nodes."""

import argparse
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from padd_ds.errors import run_cli

EPILOG = """examples:
  padd-serve --config RUN.yaml --urls servers.txt                # on the server's node
  deepspeed padd_ds/train.py --config RUN.yaml vllm.servers=servers.txt vllm.exchange=/shared/folder
The run's YAML and its overrides are those of the training: model, precision, lengths and the section vllm are read.
Whoever reaches the servers can change their weights: run them inside a closed network only."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="padd-serve",
        description="Start vLLM servers on this node, one for every vllm.tensor_parallel GPUs, start again those that "
        "end, and end them all by SIGTERM or Ctrl-C.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="run configuration (YAML), as for padd_ds/train.py")
    parser.add_argument(
        "--urls", type=Path, required=True, metavar="FILE", help="where the servers' URLs stand while they are ready"
    )
    parser.add_argument(
        "--host", default=socket.gethostname(), help="this node's name or address in the URLs (default: %(default)s)"
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="for the servers' logs (default: that of --urls)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the YAML file")
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    parsed = parse_arguments(sys.argv[1:])

    # Imported late, so that --help does not wait for torch.
    from padd_ds.config.deepspeed_json import load_deepspeed_json, precision
    from padd_ds.config.load import load_run_config
    from padd_ds.rollout.vllm.server import check_experts_told, check_installed
    from padd_ds.rollout.vllm.standalone import serve, servers_of_this_node

    config = load_run_config(parsed.config, parsed.overrides)
    dtype = precision(load_deepspeed_json(Path(config.deepspeed)))
    check_installed(config.vllm)
    if config.servers_tell_experts:
        check_experts_told()
    servers = servers_of_this_node(config, dtype, parsed.logs or parsed.urls.parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what Slurm sends to all before the time limit; the trainer needs us
    serve(servers, parsed.host, parsed.urls, lambda text: print(text, flush=True))


def _end(number: int, frame: FrameType | None) -> None:
    # Once is enough: ending the servers takes its time.
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(0)


def cli() -> None:
    run_cli(main)


if __name__ == "__main__":
    cli()
