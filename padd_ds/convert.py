"""padd-convert: a dense language model becomes a mixture-of-experts student."""

import argparse
from pathlib import Path

from padd_ds.conversion.options import (
    CLUSTERINGS,
    DTYPE_NAMES,
    PARTS,
    ROUTERS,
    WEIGHT_FEATURES,
    ConversionOptions,
)
from padd_ds.data.split import add_part_fractions
from padd_ds.errors import run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; its names are the fields of ConversionOptions."""
    parser = argparse.ArgumentParser(prog="padd-convert", description=__doc__)
    parser.add_argument("--teacher", required=True, help="Hugging Face folder or hub id of the dense model")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    parser.add_argument("--experts", type=int, help="slices that every FFN is cut into (N)")
    parser.add_argument("--shared-experts", default=1, type=int, help="of those, always on (S, default 1)")
    parser.add_argument("--top-k", type=int, help="routed slices per token (K, of the N - S)")
    parser.add_argument(
        "--student",
        help="existing MoE model (folder or hub id) that gets its router from the teacher and keeps its experts, "
        "instead of a new student; --experts, --shared-experts and --top-k are then its own",
    )
    _add_grouping(parser.add_argument_group("groups, router and fit"))
    _add_sizes(parser.add_argument_group("other sizes"))
    _add_texts(parser.add_argument_group("texts"))
    parser.add_argument("--prior-temperature", default=0.3, type=float, help="xi of the expert prior (default 0.3)")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the written weights (default: the teacher's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the teacher")
    return parser.parse_args(argv)


def _add_grouping(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cluster", default="activations", choices=CLUSTERINGS, help="how neurons are grouped")
    group.add_argument(
        "--weight-features",
        default="gate",
        choices=WEIGHT_FEATURES,
        help="weights that --cluster weights and mixed compare neurons by (default gate)",
    )
    group.add_argument(
        "--restarts", default=1, type=int, metavar="N", help="k-means searches per layer, the best counts (default 1)"
    )
    group.add_argument(
        "--overcluster",
        default=1,
        type=int,
        metavar="M",
        help="let k-means make M clusters per group and merge them by average linkage (default 1: none to merge)",
    )
    group.add_argument(
        "--regroup-rounds",
        default=4,
        type=int,
        metavar="N",
        help="refine the groups of --cluster activations or mixed N times towards what a router can foresee "
        "(default 4)",
    )
    group.add_argument("--router", default="calibrated", choices=ROUTERS, help="where the router comes from")
    group.add_argument(
        "--even-load",
        action="store_true",
        help="choose the router's selection bias so that the calibration tokens spread evenly over the experts; worse "
        "before training, but training then need not move the load",
    )
    group.add_argument(
        "--refit",
        action="store_true",
        help="fit down_proj to what the routing leaves active, on the calibration data; better before training, but "
        "with all experts active the student is then no longer its teacher",
    )


def _add_sizes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--replicate",
        default=1,
        type=int,
        metavar="R",
        help="copies of every routed expert, each for its own kind of token: R times the capacity at the same cost "
        "per token (default 1)",
    )
    group.add_argument(
        "--dense-layers", default=0, type=int, metavar="K", help="first layers that stay as they are (default 0)"
    )
    group.add_argument(
        "--reinit-share",
        default=0.0,
        type=float,
        metavar="P",
        help="share of the neurons of all copies but the first that are drawn anew (default 0)",
    )


def _add_texts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--calibration", type=Path, help="text or .jsonl file of calibration data")
    group.add_argument(
        "--calibration-field",
        default="text",
        help="JSONL field of the texts; or QUESTION,SOLUTION, two fields of records that are taken as training shows "
        "them, one row each (default text)",
    )
    group.add_argument(
        "--calibration-template",
        default="plain",
        help="how a question of QUESTION,SOLUTION is asked, as data.template in a run file (default plain)",
    )
    group.add_argument(
        "--calibration-part",
        choices=PARTS,
        help="use only this part of the JSONL records, as training cuts them by the hash of the question, which is the "
        "first --calibration-field; A is what training never sees",
    )
    add_part_fractions(group)
    group.add_argument("--calibration-tokens", default=16384, type=int, help="tokens used of it (default 16384)")
    group.add_argument("--evaluation", type=Path, help="text or .jsonl file to report the perplexity on")
    group.add_argument("--evaluation-tokens", default=16384, type=int, help="tokens used of it (default 16384)")
    group.add_argument(
        "--controls", action="store_true", help="report the perplexity of random and contiguous groups beside it"
    )


def main(argv: list[str] | None = None) -> None:
    """Check the options, convert, tell the result."""
    options = ConversionOptions(**vars(parse_args(argv)))
    # Imported here, so that --help and mistakes in the options are answered at once.
    from padd_ds.conversion.existing import convert_existing
    from padd_ds.conversion.pipeline import convert
    from padd_ds.report.conversion_page import conversion_page

    if options.student is not None:
        contents = convert_existing(options, conversion_page)
        print(
            f"wrote {options.output}: {options.student} with the routers of {len(contents['layers'])} layers replaced"
        )
        _print_perplexities(contents["perplexity"])
        return
    report = convert(options, conversion_page)
    student = report.contents["costs"]["student"]
    before = " before the refit" if options.refit else ""
    print(
        f"wrote {report.output}: equal to its teacher to {report.exactness.largest_error:.1e} with all experts "
        f"active{before}; {student['active_parameters'] / 1e6:.1f}M of "
        f"{student['total_parameters'] / 1e6:.1f}M parameters active"
    )
    _print_perplexities(report.contents["perplexity"])


def _print_perplexities(perplexity: dict[str, float]) -> None:
    for who, value in perplexity.items():
        print(f"perplexity of {who}: {value:.2f} ({value / perplexity['teacher']:.3f} of the teacher's)")


def cli() -> None:
    """Entry point of the `padd-convert` command."""
    run_cli(main)


if __name__ == "__main__":
    cli()
