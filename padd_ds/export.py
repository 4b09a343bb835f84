"""padd-export: a run folder becomes a plain Hugging Face checkpoint, or one of megatron-core."""

import argparse
import sys
from pathlib import Path

from padd_ds.errors import run_cli


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="padd-export",
        description="Turn a checkpoint of a run into a plain Hugging Face folder that transformers and vLLM load.",
        epilog="example: padd-export --run runs/joint --output students/joint",
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder (with checkpoints/ in it)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint to export; default: the newest whole one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as trained")
    parser.add_argument(
        "--format",
        choices=("hf", "megatron"),
        default="hf",
        help="hf (default), or megatron: a distributed checkpoint for megatron-core's GPTModel",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the logits of what is exported with the live student's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    return parser.parse_args(arguments)


def main() -> None:
    parsed = parse_arguments(sys.argv[1:])

    # Imported late, so that --help does not wait for torch.
    from padd_ds.checkpoint.export import ExportOptions, export_run

    options = ExportOptions(
        run=parsed.run,
        output=parsed.output,
        step=parsed.step,
        dtype=parsed.dtype,
        format=parsed.format,
        check=not parsed.no_check,
        overwrite=parsed.overwrite,
    )
    summary = export_run(options)
    print(f"{parsed.output}: {summary.tensors} tensors of step {summary.step}, {summary.gib:.2f} GiB; {summary.check}")


def cli() -> None:
    run_cli(main)


if __name__ == "__main__":
    cli()
