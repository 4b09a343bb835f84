"""padd-convert: a dense language model becomes a mixture-of-experts student."""

import argparse
from pathlib import Path

from padd_ds.conversion.options import (
    CLUSTERINGS,
    DTYPE_NAMES,
    PARTS,
    ROUTERS,
    ConversionOptions,
)
from padd_ds.errors import run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; its names are the fields of ConversionOptions."""
    parser = argparse.ArgumentParser(prog="padd-convert", description=__doc__)
    parser.add_argument("--teacher", required=True, help="Hugging Face folder or hub id of the dense model")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    parser.add_argument("--experts", required=True, type=int, help="slices that every FFN is cut into (N)")
    parser.add_argument("--shared-experts", default=1, type=int, help="of those, always on (S, default 1)")
    parser.add_argument("--top-k", required=True, type=int, help="routed slices per token (K, of the N - S)")
    parser.add_argument("--cluster", default="activations", choices=CLUSTERINGS, help="how neurons are grouped")
    parser.add_argument("--router", default="calibrated", choices=ROUTERS, help="where the router comes from")
    parser.add_argument("--calibration", type=Path, help="text or .jsonl file of calibration data")
    parser.add_argument(
        "--calibration-field", default="text", help="JSONL field, or several separated by commas (default text)"
    )
    parser.add_argument(
        "--calibration-part",
        choices=PARTS,
        help="use only this part of the JSONL records, as training cuts them by the hash of the question, which is the "
        "first --calibration-field; A is what training never sees",
    )
    parser.add_argument("--calibration-tokens", default=16384, type=int, help="tokens used of it (default 16384)")
    parser.add_argument("--prior-temperature", default=0.3, type=float, help="xi of the expert prior (default 0.3)")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the written weights (default: the teacher's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the teacher")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check the options, convert, tell the result."""
    options = ConversionOptions(**vars(parse_args(argv)))
    # Imported here, so that --help and mistakes in the options are answered at once.
    from padd_ds.conversion.pipeline import convert

    report = convert(options)
    student = report.contents["costs"]["student"]
    print(
        f"wrote {report.output}: equal to its teacher to {report.exactness.largest_error:.1e} with all experts active; "
        f"{student['active_parameters'] / 1e6:.1f}M of {student['total_parameters'] / 1e6:.1f}M parameters active"
    )


def cli() -> None:
    """Entry point of the `padd-convert` command."""
    run_cli(main)


if __name__ == "__main__":
    cli()
