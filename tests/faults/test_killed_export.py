"""An export that is killed leaves nothing or all of it, and nothing that stands in the way of the next one."""

import random
import time
from pathlib import Path

import pytest

from tests.checkpoint.made_up_run import random_student, write_run
from tests.commands import Command

KILLS = 10


def export(run: Path, output: Path) -> Command:
    return Command("-m", "padd_ds.export", "--run", run, "--output", output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_an_export_killed_at_random_moments_is_whole_or_absent(tmp_path: Path) -> None:
    run, dice = tmp_path / "run", random.Random(0)
    write_run(run, random_student())
    export(run, tmp_path / "first" / "model").wait()  # its start is that of the server too
    started_s = time.monotonic()
    export(run, tmp_path / "expected" / "model").wait()
    whole_s = time.monotonic() - started_s
    expected = contents(tmp_path / "expected" / "model")
    assert "config.json" in expected
    killed = 0
    for attempt in range(3 * KILLS):
        output = tmp_path / str(attempt) / "model"
        command = export(run, output)
        time.sleep(dice.uniform(0, whole_s))
        command.kill()
        killed += command.wait() != 0
        if not output.exists():
            assert export(run, output).wait() == 0
        assert contents(output) == expected
        if killed == KILLS:
            return
    raise AssertionError(f"only {killed} of {3 * KILLS} exports were killed before they had ended")
