"""padd-plan: what a run will need, before it runs."""

import argparse
import json
import sys
from pathlib import Path

from padd_ds.errors import UserError, run_cli
from padd_ds.files import write_text_whole

EPILOG = """examples:
  padd-plan --config ds_configs/runs/joint.yaml --cluster ds_configs/clusters/h100.yaml
  padd-plan --config RUN.yaml --cluster CLUSTER.yaml --nodes 16 --mean-response 1500 rollout.prompts=128
  padd-plan --config RUN.yaml --cluster CLUSTER.yaml --validate   # exit code 2 where it cannot fit
Only the models' config.json are read, from their folders or the hub."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="padd-plan",
        description="Memory of a rank by part, communication, computation and time of a training step, and the ZeRO "
        "stage and expert-parallel size to take.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="run configuration (YAML), as for padd_ds/train.py")
    parser.add_argument("--cluster", type=Path, required=True, help="nodes, devices, memory and speeds (YAML)")
    parser.add_argument("--nodes", type=int, help="in place of the cluster's number of nodes")
    parser.add_argument("--devices-per-node", type=int, help="in place of the cluster's, where fewer are used")
    parser.add_argument("--mean-prompt", type=int, metavar="TOKENS", help="default: the longest that is allowed")
    parser.add_argument("--mean-response", type=int, metavar="TOKENS", help="default: the longest that is allowed")
    parser.add_argument(
        "--server-nodes", type=int, metavar="N", help="further nodes for vllm.servers (default, where there are: 1)"
    )
    parser.add_argument("--validate", action="store_true", help="exit code 2 where the run as configured cannot fit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the YAML file")
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    parsed = parse_arguments(sys.argv[1:])
    for option in ("mean_prompt", "mean_response", "server_nodes"):
        if (given := getattr(parsed, option)) is not None and given < 1:
            raise UserError(f"--{option.replace('_', '-')} {given} must be at least 1")

    # Imported late, so that --help does not wait for torch.
    from padd_ds.planning.plan import make_plan

    plan = make_plan(
        parsed.config,
        parsed.overrides,
        parsed.cluster,
        nodes=parsed.nodes,
        devices_per_node=parsed.devices_per_node,
        mean_prompt=parsed.mean_prompt,
        mean_response=parsed.mean_response,
        server_nodes=parsed.server_nodes,
    )
    print(plan.text)
    if parsed.json is not None:
        write_text_whole(parsed.json, json.dumps(plan.facts, indent=1) + "\n")
    if parsed.validate and not plan.fits:
        raise UserError(f"{parsed.config}: does not fit {parsed.cluster}; the plan above says what does")


def cli() -> None:
    run_cli(main)


if __name__ == "__main__":
    cli()
