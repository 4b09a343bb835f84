"""What the training benchmark makes of the seconds that it measured; a run of it is what `make bench-train` does."""

from pathlib import Path

from tests.commands import REPOSITORY, run_command
from tests.train_inputs import make_inputs
from tools.bench_train import table


def test_ours_is_compared_turn_by_turn_with_the_fastest_of_theirs() -> None:
    seconds = {"eager": [4.0, 4.0], "grouped_mm": [1.0, 2.0], "dispatched": [0.5, 1.0]}
    rows = [line.split(" | ") for line in table(seconds, tokens=300, flops=6e9, rate=8e9).splitlines()]
    assert rows[0][1] == "tokens/s beside grouped_mm"
    by_name = {row[0]: row[1:] for row in rows[2:]}
    assert by_name["| padd_ds, dispatched"] == ["2.00 (2.00 to 2.00)", "400", "1.000 |"]
    assert by_name["| transformers, grouped_mm"] == ["1.00 (1.00 to 1.00)", "200", "0.500 |"]
    assert by_name["| transformers, eager"][0].startswith("0.38 (")


def test_the_steps_of_training_take_turns_with_transformers_own(tmp_path: Path) -> None:
    run = make_inputs(tmp_path)
    words = ["stage=warmup", "warmup.batch_size=4", "micro_batch_size=2", "--only", "grouped_mm", "masked"]
    tool = REPOSITORY / "tools" / "bench_train.py"
    command = run_command(tool, "--config", run / "run.yaml", *words, "--steps", "2")
    assert command.returncode == 0, command.stderr
    told = command.stdout[command.stdout.index("4 rows a step, ") :]
    _, padding, _, *table, _, where = told.splitlines()
    assert " % of what transformers' class reads is padding" in padding
    assert [line.split(" | ")[0] for line in table if line.startswith("| ")] == [
        *("| experts", "| transformers, grouped_mm", "| padd_ds, masked")
    ]
    assert where.startswith(f"a warm-up of {run / 'run.yaml'}; ")
