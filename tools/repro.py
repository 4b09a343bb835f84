"""The experiment: teachers, students, baselines, ablations and controls, then docs/results.md from their results.

Each cell is kept when it is done, so the same command goes on after an interruption. `make repro` runs all of it,
`make repro-quick` the main rows of one seed at a smaller scale.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
from pathlib import Path

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.errors import UserError, run_cli
from tools.experiment.cell import Cell, with_needs
from tools.experiment.page import write_page
from tools.experiment.plan import all_cells
from tools.experiment.runner import ROOT, Runner, end_on_sigterm
from tools.experiment.settings import SCALES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="full", help="how much of it (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for models and logs (default: repro/SCALE)")
    parser.add_argument("--results", type=Path, help="folder for the results (default: results/SCALE)")
    parser.add_argument("--page", type=Path, help="page to write (default: docs/results.md, or beside the results)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once, a thread each")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="cells whose name matches, such as 'seed0/half/*'; may be given several times",
    )
    parser.add_argument(
        "--verify", action="store_true", help="make cells that are there again, aside, and compare; needs --only"
    )
    parser.add_argument("--list", action="store_true", help="name the cells, run nothing")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results that are there")
    arguments = parser.parse_args()
    cells = {cell.name: cell for cell in all_cells(SCALES[arguments.scale])}
    names = dict.fromkeys(name for pattern in arguments.only or ["*"] for name in matching(pattern, cells))
    wanted = [cells[name] for name in names]
    if arguments.list:
        print("\n".join(cell.name for cell in wanted))
        return
    work = (arguments.work or ROOT / "repro" / arguments.scale).resolve()
    results = (arguments.results or ROOT / "results" / arguments.scale).resolve()
    device = SCALES[arguments.scale].device
    runner = Runner(work=work, results=results, jobs=arguments.jobs, commit=commit(), device=device)
    end_on_sigterm()
    if not arguments.page_only:
        check_device(device, arguments.scale)
    if arguments.verify:
        if device != "cpu":
            raise UserError(f"--verify: on a GPU, as --scale {arguments.scale} needs, no run repeats to the last digit")
        if not arguments.only:
            raise UserError("--verify: say with --only which cells to make again")
        runner.verify(wanted, with_needs(wanted, cells))
        return
    if not arguments.page_only:
        runner.run(with_needs(wanted, cells))
    default_page = ROOT / "docs" / "results.md" if arguments.scale == "full" else results / "results.md"
    page = arguments.page or default_page
    write_page(page, results, list(cells.values()), SCALES[arguments.scale], arguments.scale)
    print(f"{page}, from {results}")


def check_device(device: str, scale: str) -> None:
    """UserError for a scale that needs a GPU where there is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--scale {scale} needs a GPU and torch sees none; --scale smollm2 runs without one")


def matching(pattern: str, cells: dict[str, Cell]) -> list[str]:
    """The names of `cells` that match a pattern of --only."""
    names = fnmatch.filter(cells, pattern)
    if not names:
        raise UserError(f"--only {pattern}: no cell has such a name; --list names them")
    return names


def commit() -> str:
    """The commit that runs, with a plus where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    run_cli(main)
