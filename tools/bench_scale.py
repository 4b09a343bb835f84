"""Memory and time of converting a 7B-shaped checkpoint, against copying it and the arithmetic of its clustering."""

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.errors import run_cli
from padd_ds.hf import DTYPES
from tools.random_checkpoint import SHAPES, write_checkpoint

CHUNK_BYTES = 1 << 24
GEMM_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shared-experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--checkpoint", type=Path, help="random checkpoint to use (default: write one, then delete it)")
    parser.add_argument("--calibration", type=Path, help="text file; with it the activations path is measured instead")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where to put the files, about three times the model"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        teacher = arguments.checkpoint or Path(scratch) / "teacher"
        if arguments.checkpoint is None:
            write_checkpoint(teacher, SHAPES[arguments.shape], DTYPES["bfloat16"], seed=0)
        print(report(measure(arguments, teacher, Path(scratch))))


def measure(arguments: argparse.Namespace, teacher: Path, scratch: Path) -> dict[str, float]:
    """Seconds and bytes of the copy, of the conversion, and of the bound."""
    copy_s = copy_with_checksums(teacher, scratch / "copy")
    shutil.rmtree(scratch / "copy")
    student = scratch / "student"
    started_s = time.monotonic()
    subprocess.run(convert_command(arguments, teacher, student), check=True)
    convert_s = time.monotonic() - started_s
    figures = json.loads((student / "padd_conversion.json").read_text(encoding="utf-8"))
    flops = clustering_flops(figures, SHAPES[arguments.shape]["width"])
    rate = gemm_flops_per_second(arguments.experts - arguments.shared_experts, SHAPES[arguments.shape])
    return {
        "copy_s": copy_s,
        "convert_s": convert_s,
        "clustering_bound_s": flops / rate,
        "gemm_gflops": rate / 1e9,
        "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "student_off_fp32": figures["exactness"]["student_distance_to_fp32"],
        "teacher_off_fp32": figures["exactness"]["teacher_rounding_error"],
        "checkpoint_gib": sum(path.stat().st_size for path in teacher.iterdir()) / 2**30,
    }


def convert_command(arguments: argparse.Namespace, teacher: Path, student: Path) -> list[str]:
    counts = ["--experts", arguments.experts, "--shared-experts", arguments.shared_experts, "--top-k", arguments.top_k]
    if arguments.calibration is None:
        data = ["--cluster", "weights", "--router", "centroid"]
    else:
        data = ["--calibration", arguments.calibration, "--calibration-tokens", arguments.calibration_tokens]
    command = [sys.executable, "-m", "padd_ds.convert", "--teacher", teacher, "--output", student, *counts, *data]
    return [str(word) for word in command]


def copy_with_checksums(source: Path, target: Path) -> float:
    """Seconds to read, hash and write every file of a folder once, in one thread."""
    target.mkdir()
    started_s = time.monotonic()
    for path in tqdm(sorted(source.iterdir()), desc="copying", unit="file", dynamic_ncols=True):
        digest = hashlib.sha256()
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            while chunk := reader.read(CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
    return time.monotonic() - started_s


def clustering_flops(figures: dict[str, Any], width: int) -> float:
    """Of the distances alone: every start centre, every iteration, 2 per point, feature and cluster."""
    slices = figures["slices"]
    points, clusters = slices["routed"] * slices["slice_width"], slices["routed"]
    iterations = sum(layer["iterations"] for layer in figures["layers"])
    return 2.0 * points * width * clusters * (iterations + len(figures["layers"]))


def gemm_flops_per_second(clusters: int, shape: dict[str, int]) -> float:
    """The rate of an fp32 matrix product of the clustering's shape on this machine."""
    points_PC, centres_CE = torch.randn(shape["ffn"], shape["width"]), torch.randn(shape["width"], clusters)
    done, started_s = 0, time.monotonic()
    while (passed_s := time.monotonic() - started_s) < GEMM_SECONDS:
        points_PC @ centres_CE
        done += 1
    return 2.0 * shape["ffn"] * shape["width"] * clusters * done / passed_s


def report(measured: dict[str, float]) -> str:
    """The measurements as a Markdown table."""
    bound_s = measured["copy_s"] + measured["clustering_bound_s"]
    rows = {
        "checkpoint": f"{measured['checkpoint_gib']:.1f} GiB",
        "peak memory of padd-convert": f"{measured['peak_gib']:.2f} GiB",
        "copy with checksums": f"{measured['copy_s']:.0f} s",
        "distances of the clustering at the machine's GEMM rate": f"{measured['clustering_bound_s']:.0f} s "
        f"({measured['gemm_gflops']:.0f} GFLOP/s)",
        "padd-convert": f"{measured['convert_s']:.0f} s, {measured['convert_s'] / bound_s:.2f} times the two together",
    }
    off = "{student_off_fp32:.2e}, the bf16 teacher's by {teacher_off_fp32:.2e}".format_map(measured)
    rows["bf16 student's logits off the fp32 teacher's, relative"] = off
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    run_cli(main)
