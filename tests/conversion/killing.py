"""Kills conversions at random moments; run as a program, with one thread, because it forks.

Arguments: teacher, calibration file, an empty folder. Exit code 0 where every result had the same bytes.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.pipeline import convert

KILLS = 20


def main(teacher: str, calibration: str, folder: str) -> None:
    output = Path(folder) / "student"
    options = ConversionOptions(
        teacher=teacher,
        output=output,
        experts=8,
        shared_experts=2,
        top_k=3,
        calibration=Path(calibration),
        calibration_tokens=1024,
        evaluation=Path(calibration),
        evaluation_tokens=512,
        refit=True,
    )
    ended, whole_s = run_in_child(options)
    assert ended
    expected = contents(output)
    output.rename(Path(folder) / "undisturbed")

    dice, killed, resumed = random.Random(0), 0, 0
    while killed < KILLS:
        # Within the time of a whole conversion, but short enough that several kills hit the same one.
        ended, _ = run_in_child(options, kill_after_s=dice.uniform(0, 0.6) * whole_s)
        killed += not ended
        # A kill behind the renaming leaves a whole folder too.
        assert output.exists() or not ended
        if output.exists():
            resumed += 1
            assert contents(output) == expected
            output.rename(Path(folder) / f"after-{resumed}")
    run_in_child(options)
    assert contents(output) == expected
    assert not list(Path(folder).glob(".*"))
    print(f"{killed} kills, {resumed + 1} resumed to the same {sum(map(len, expected.values()))} bytes")


def run_in_child(options: ConversionOptions, kill_after_s: float | None = None) -> tuple[bool, float]:
    """Whether the conversion ended by itself, and how long it took; killed after a time where one is given."""
    started_s = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            convert(options)
            os._exit(0)
        finally:
            os._exit(1)
    while time.monotonic() - started_s < (kill_after_s if kill_after_s is not None else 120):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return True, time.monotonic() - started_s
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, time.monotonic() - started_s


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main(*sys.argv[1:])
