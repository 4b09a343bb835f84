"""Training runs as a page, and as files."""

import csv
from pathlib import Path
from xml.etree import ElementTree

import pytest

from padd_ds import evaluate
from padd_ds.errors import UserError
from padd_ds.evaluation.comparison import compare
from padd_ds.report.runs_page import runs_page
from padd_ds.report.source import read_runs
from tests.evaluation.made_up_results import make_result
from tests.report.made_up_run import EXPERTS, LAYERS, make_run, write_lines
from tests.report.test_comparison_page import row_of
from tests.report.test_page import Outline


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two that differ in steps, seed and versions, with few metrics."""
    folders = [make_run(tmp_path / name / "joint", steps) for name, steps in (("=a", 3), ("b", 4))]
    for place, folder in enumerate(folders):
        values = [{"step": step, "reward": 0.25 * (step + place), "gold_unparsable": 0.0} for step in range(3 + place)]
        write_lines(folder / "metrics.jsonl", values)
        (folder / "config.yaml").write_text(f"stage: joint\nseed: {place}\nmodel: {{student: <b>}}\n")
        (folder / "environment.json").write_text(f'{{"packages": {{"torch": "2.{place}"}}, "ranks": 2}}')
    return folders


def test_runs_stand_side_by_side(runs: list[Path]) -> None:
    html = runs_page(read_runs(runs))
    headings = Outline(html).headings
    assert headings[:8] == [
        *("Training of =a/joint, b/joint", "Runs", "Training, side by side", "Reward: reward"),
        *("What differs in the configurations", "Environment", "Joint training (=a/joint)", "Training"),
    ]
    assert headings.count("Load") == 2 and "Joint training (b/joint)" in headings
    assert row_of(html, "=a/joint") == ["joint", "2", "-", "0.5"] and row_of(html, "b/joint")[-1] == "1"
    side = html.split("side by side")[1].split("What differs")[0]
    assert "=a/joint <b>0 → 0.5" in side and "b/joint <b>0.25 → 1" in side
    assert row_of(html, "seed") == ["0", "1"] and row_of(html, "packages.torch") == ["2.0", "2.1"]
    assert '<th scope="row">stage' not in html and "<b>joint" not in html
    assert "://" not in html.replace("http://www.w3.org", "") and "<script" not in html


def test_one_run_is_told_alone(runs: list[Path]) -> None:
    html = runs_page(read_runs(runs[:1]))
    headings = Outline(html).headings
    assert headings[:4] == ["Training of joint", "Runs", "Joint training (joint)", "Training"]
    assert "seed: 0" in html and "&quot;torch&quot;: &quot;2.0&quot;" in html


def test_results_of_the_models_stand_first(tmp_path: Path, runs: list[Path]) -> None:
    results = [
        make_result(tmp_path / "teacher.json", "110011"),
        make_result(tmp_path / "student.json", "100111", costs=(50, 120)),
    ]
    html = runs_page(read_runs(runs), compare(results))
    assert html.index("teacher (teacher)") < html.index("<svg class") < html.index("side by side")
    assert '<a href="#set-0">' in html and '<a href="#runs">' in html and '<a href="#run-2">' in html


def test_page_plots_and_tables_are_written(tmp_path: Path, runs: list[Path]) -> None:
    output = tmp_path / "report.html"
    command = ["--runs", *map(str, runs), "--output", str(output)]
    evaluate.main(command)
    files = tmp_path / "report_files"
    assert sorted(path.name for path in files.iterdir()) == [
        *("experts.csv", "layers.csv", "metrics.csv", "run_1", "run_2", "side_by_side"),
    ]
    drawn = sorted(path.name for path in (files / "run_1").iterdir())
    assert drawn[:4] == ["01_reward.png", "01_reward.svg", "02_failed_responses.png", "02_failed_responses.svg"]
    assert "03_load.png" in drawn and len(drawn) == 2 * 11
    svg = (files / "side_by_side" / "01_reward_reward.svg").read_text()
    ElementTree.fromstring(svg)
    assert "Reward: reward (mean per response)" in svg and ">b/joint<" in svg and "#0000" not in svg
    assert "Load (share" in (files / "run_1" / "03_load.svg").read_text()

    def rows(name: str) -> list[dict[str, str]]:
        with (files / name).open(newline="") as file:
            return list(csv.DictReader(file))

    assert [(row["run"], row["step"], row["reward"]) for row in rows("metrics.csv")][2:4] == [
        ("'=a/joint", "2", "0.5"),
        ("b/joint", "0", "0.25"),
    ]
    layers, experts = rows("layers.csv"), rows("experts.csv")
    assert len(layers) == (3 + 4) * LAYERS and layers[1]["router_shift"] == "0.02"
    assert len(experts) == 2 * LAYERS * EXPERTS and experts[1]["load_share"] == "0.5"
    assert not {"router_shift_edges", "router_shift_counts", "load_share"} & set(layers[0])
    with pytest.raises(UserError, match="already exists"):
        evaluate.main(command)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["{run}"], "--runs makes a page; name it"),
        (["{run}", "--output", "{folder}/report.json"], r"ends in \.html"),
        (["{run}", "{run}", "--output", "{folder}/report.html"], "named twice"),
        (["{folder}", "--output", "{folder}/report.html"], r"metrics\.jsonl: no such file"),
        (["{broken}", "{run}", "--output", "{folder}/report.html"], r"environment\.json: not JSON"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(tmp_path: Path, runs: list[Path], more: list[str], message: str) -> None:
    (runs[1] / "environment.json").write_text("{")
    places = {"run": runs[0], "folder": tmp_path, "broken": runs[1]}
    with pytest.raises(UserError, match=message):
        evaluate.main(["--runs", *(word.format(**places) for word in more)])
    assert not list(tmp_path.glob("*report*"))
