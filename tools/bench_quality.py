"""How much of a dense model's perplexity its untrained students keep, by share of the FFN active and by options."""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.errors import UserError, run_cli

EXPERTS = 32


@dataclass(frozen=True)
class Row:
    """A conversion: shared slices, routed ones per token, and the options beside them."""

    name: str
    shared: int
    top_k: int
    options: str


ROWS = [
    Row("activations", 8, 16, "--refit"),
    Row("weights", 8, 16, "--cluster weights --refit"),
    Row("random", 8, 16, "--cluster random --refit"),
    Row("activations", 8, 8, "--refit"),
    Row("weights", 8, 8, "--cluster weights --refit"),
    Row("random", 8, 8, "--cluster random --refit"),
    Row("activations", 2, 6, "--refit"),
    Row("activations, no refit", 8, 16, ""),
    Row("activations, no refit, no regrouping", 8, 16, "--regroup-rounds 0"),
    Row("activations, refit, no regrouping", 8, 16, "--refit --regroup-rounds 0"),
    Row("activations, no refit, centroid router", 8, 16, "--router centroid"),
    Row("weights, centroid router (the paper's)", 8, 16, "--cluster weights --router centroid"),
    Row("activations, --restarts 4", 8, 16, "--refit --restarts 4"),
    Row("activations, --overcluster 4", 8, 16, "--refit --overcluster 4"),
    Row("mixed", 8, 16, "--cluster mixed --refit"),
    Row("weights, gate and up", 8, 16, "--cluster weights --weight-features gate+up --refit"),
    Row("weights, gate, up and down", 8, 16, "--cluster weights --weight-features gate+up+down --refit"),
    Row("activations, --dense-layers 3", 8, 15, "--refit --dense-layers 3"),
    Row("activations, --replicate 2", 8, 16, "--refit --replicate 2"),
    Row("random", 2, 6, "--cluster random --refit"),
    Row("weights", 2, 6, "--cluster weights --refit"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, type=Path, help="dense checkpoint, such as tools/smollm2.py writes")
    parser.add_argument("--calibration", required=True, type=Path, help="text to calibrate on (WikiText-2 validation)")
    parser.add_argument("--evaluation", required=True, type=Path, help="text to report on (WikiText-2 test)")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--evaluation-tokens", type=int, default=16384)
    parser.add_argument("--rows", help="numbers of the rows to measure, separated by commas (default: all)")
    arguments = parser.parse_args()
    chosen = range(len(ROWS)) if arguments.rows is None else [int(number) for number in arguments.rows.split(",")]
    print("| FFN active | groups and options | perplexity | times dense |\n|---|---|---|---|")
    for number in chosen:
        print(measured(ROWS[number], arguments), flush=True)


def measured(row: Row, arguments: argparse.Namespace) -> str:
    """A row of the table; its conversion is deleted afterwards."""
    counts = ["--experts", EXPERTS, "--shared-experts", row.shared, "--top-k", row.top_k, *row.options.split()]
    with tempfile.TemporaryDirectory() as scratch:
        student = Path(scratch) / "student"
        command = [sys.executable, "-m", "padd_ds.convert", "--teacher", arguments.teacher, "--output", student]
        command += counts
        for name in ("calibration", "evaluation"):
            command += [f"--{name}", getattr(arguments, name)]
            command += [f"--{name}-tokens", getattr(arguments, f"{name}_tokens")]
        result = subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, check=False)
        if result.returncode != 0:
            raise UserError(f"padd-convert {row.options} ended with exit code {result.returncode}")
        contents = json.loads((student / "padd_conversion.json").read_text(encoding="utf-8"))
    perplexity, active = contents["perplexity"], contents["slices"]["ffn_active_share"]
    ratio = perplexity["student"] / perplexity["teacher"]
    return f"| {active:.1%} | {row.name} | {perplexity['student']:.2f} | {ratio:.3f} |"


if __name__ == "__main__":
    run_cli(main)
