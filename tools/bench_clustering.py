"""Time and objective of balanced k-means beside k-means-constrained and scikit-learn, as a Markdown table.

All start from the same k-means++ centres of the same fp32 features and run on the same number of threads, in turn;
times are the least of the repeats. CPU time tells more where the machine is shared, wall time where threads are
several. scikit-learn's Lloyd has no size constraint: it bounds the time from below.

Shapes: P points, C features of a point, E clusters, R rank.
"""

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.conversion.clustering import kmeans_from_centres, kmeans_plus_plus, within_cluster_cost
from padd_ds.errors import UserError, run_cli

RANK = 64
NOISE = 0.5  # standard deviation, beside a structure of standard deviation 1
PEERS = {"k-means-constrained": "k_means_constrained", "scikit-learn": "sklearn.cluster"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """labels_P, and the assignments of points to centres that were made on the way."""

    labels_P: torch.Tensor
    assignments: int


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one run: by the clock, and of the process on all its threads."""

    wall_s: float
    cpu_s: float


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.points % arguments.clusters:
        raise UserError(f"--clusters {arguments.clusters} does not divide --points {arguments.points}")
    modules = {peer: imported(peer) for peer in arguments.peers}
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(arguments.seed)
    points_PC = FEATURES[arguments.features](arguments.points, arguments.width, generator)
    start_EC = kmeans_plus_plus(points_PC, arguments.clusters, generator)
    contestants = make_contestants(points_PC, start_EC, arguments, modules)
    times, outcomes = race(contestants, arguments.repeats, arguments.threads)
    print(table(points_PC, arguments, times, outcomes))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--points", type=int, default=4864, help="neurons")
    parser.add_argument("--width", type=int, default=896, help="features of a neuron")
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--features", choices=FEATURES, default="low-rank")
    parser.add_argument("--iterations", type=int, default=10, help="at most")
    parser.add_argument("--constrained-iterations", type=int, help="of k-means-constrained, where not as many")
    parser.add_argument("--peers", choices=PEERS, nargs="*", default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the features and of the start centres")
    return parser


def imported(peer: str):
    """The module of a peer. UserError if it is not installed."""
    try:
        return importlib.import_module(PEERS[peer])
    except ImportError as error:
        raise UserError(f"--peers {peer}: {error}; install it, or leave it out") from error


def gaussian(n_points: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[P, C] independent standard normal features: no structure to find."""
    return torch.randn(n_points, width, generator=generator)


def low_rank(n_points: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[P, C]: RANK overlapping groups of unequal sizes in RANK directions of falling strength, then noise."""
    centre_ER = torch.randn(RANK, RANK, generator=generator)
    share_E = torch.rand(RANK, generator=generator) + 0.1
    group_P = torch.multinomial(share_E, n_points, replacement=True, generator=generator)
    strength_R = torch.arange(1, RANK + 1).rsqrt()
    place_PR = (centre_ER[group_P] + torch.randn(n_points, RANK, generator=generator)) * strength_R
    structure_PC = place_PR @ torch.randn(RANK, width, generator=generator)
    noise_PC = torch.randn(n_points, width, generator=generator)
    return structure_PC / structure_PC.square().mean().sqrt() + NOISE * noise_PC


FEATURES = {"gaussian": gaussian, "low-rank": low_rank}


def make_contestants(
    points_PC: torch.Tensor, start_EC: torch.Tensor, arguments: argparse.Namespace, modules: dict
) -> dict[str, Callable[[], Outcome]]:
    """A run for every line of the table, by its text."""
    n_clusters, size = len(start_EC), len(points_PC) // len(start_EC)
    points, start = points_PC.numpy(), start_EC.numpy()

    def ours() -> Outcome:
        found = kmeans_from_centres(points_PC, start_EC, arguments.iterations)
        return Outcome(labels_P=found.assignment_P, assignments=len(found.costs))

    def constrained() -> Outcome:
        iterations = arguments.constrained_iterations or arguments.iterations
        settings = {"size_min": size, "size_max": size, "n_init": 1, "tol": 0, "n_jobs": 1, "max_iter": iterations}
        kind = modules["k-means-constrained"].KMeansConstrained
        found = kind(n_clusters, init=start.copy(), **settings).fit(points)
        # It assigns once more after the last mean.
        return Outcome(labels_P=torch.as_tensor(found.labels_).long(), assignments=found.n_iter_ + 1)

    def unconstrained() -> Outcome:
        settings = {"algorithm": "lloyd", "n_init": 1, "tol": 0, "max_iter": arguments.iterations}
        found = modules["scikit-learn"].KMeans(n_clusters, init=start.copy(), **settings).fit(points)
        return Outcome(labels_P=torch.as_tensor(found.labels_).long(), assignments=found.n_iter_ + 1)

    runs: dict[str, Callable[[], Outcome]] = {f"balanced k-means (torch {torch.__version__})": ours}
    for peer in modules:
        if peer == "scikit-learn":
            runs[f"scikit-learn {version(peer)}, KMeans, lloyd, tol=0, no sizes"] = unconstrained
        else:
            runs[f"{peer} {version(peer)}, size_min=size_max={size}, tol=0, n_jobs=1"] = constrained
    return runs


def race(
    contestants: dict[str, Callable[[], Outcome]], repeats: int, threads: int
) -> tuple[dict[str, Times], dict[str, Outcome]]:
    """(least times, outcome) of every contestant; they take turns."""
    times = dict.fromkeys(contestants, Times(wall_s=float("inf"), cpu_s=float("inf")))
    outcomes = {}
    runs = [name for _ in range(repeats) for name in contestants]
    progress = tqdm(runs, desc="clustering", unit="run", dynamic_ncols=True)
    with limited_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both peers warn when the iterations end first
        for name in progress:
            progress.set_postfix_str(name.partition(",")[0])
            wall, cpu = time.perf_counter(), time.process_time()
            outcomes[name] = contestants[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[name] = Times(wall_s=min(times[name].wall_s, wall), cpu_s=min(times[name].cpu_s, cpu))
    return times, outcomes


def limited_threads(threads: int):
    """A context in which numpy's and scikit-learn's native code uses as many threads as torch does."""
    return importlib.import_module("threadpoolctl").threadpool_limits(threads)


def table(
    points_PC: torch.Tensor, arguments: argparse.Namespace, times: dict[str, Times], outcomes: dict[str, Outcome]
) -> str:
    """Ratios are to the first line, ours; the objective is that of the labels with their own means."""
    lines = [
        f"{arguments.points} x {arguments.width}, {arguments.clusters} clusters, {arguments.features} features, "
        f"seed {arguments.seed}, {arguments.threads} thread(s), least of {arguments.repeats}",
        "",
        "| method | assignments | wall s | per assignment | ratio | CPU s | per assignment | ratio "
        "| objective | ratio | sizes |",
        "|" + "---|" * 11,
    ]
    ours: list[float] = []
    for name, outcome in outcomes.items():
        wall, cpu = times[name].wall_s / outcome.assignments, times[name].cpu_s / outcome.assignments
        cost = objective(points_PC, outcome.labels_P, arguments.clusters)
        ours = ours or [wall, cpu, cost]
        sizes = torch.bincount(outcome.labels_P, minlength=arguments.clusters)
        lines.append(
            f"| {name} | {outcome.assignments} "
            f"| {times[name].wall_s:.3f} | {wall:.4f} | {wall / ours[0]:.2f} "
            f"| {times[name].cpu_s:.3f} | {cpu:.4f} | {cpu / ours[1]:.2f} "
            f"| {cost:.6g} | {cost / ours[2]:.5f} | {int(sizes.min())} to {int(sizes.max())} |"
        )
    return "\n".join(lines)


def objective(points_PC: torch.Tensor, labels_P: torch.Tensor, n_clusters: int) -> float:
    """Within-cluster sum of squares; clusters of any sizes."""
    sizes_E = torch.bincount(labels_P, minlength=n_clusters).clamp(min=1)
    sums_EC = torch.zeros(n_clusters, points_PC.shape[1]).index_add_(0, labels_P, points_PC)
    return within_cluster_cost(points_PC, sums_EC / sizes_E[:, None], labels_P)


if __name__ == "__main__":
    run_cli(main)
