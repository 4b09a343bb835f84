"""The experiment's runner, statistics and page."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch

from padd_ds.config.load import load_run_config
from padd_ds.errors import UserError
from tests.commands import Command, run_command
from tools import repro
from tools.experiment import runner as runner_module
from tools.experiment.cell import Cell, with_inputs, with_needs
from tools.experiment.page import write_page
from tools.experiment.plan import all_cells
from tools.experiment.result import as_text, current_results, made_hash
from tools.experiment.runner import BIN, MADE, Runner
from tools.experiment.settings import SCALES, SEARCH, TUNED, Scale
from tools.experiment.statistics import over_seeds, paired_over_questions, pooled

SCRIPT = """
import json, pathlib, sys
here, name, read = sys.argv[1:]
if read:
    assert (pathlib.Path(read) / "model").is_dir()
(pathlib.Path(here) / "model").mkdir()
cost = dict.fromkeys(("active_parameters", "total_parameters", "matmul_flops_per_token", "more"), 7)
report = pathlib.Path(here) / "model" / "padd_conversion.json"
report.write_text(json.dumps({"costs": {"student": cost, "teacher": {}}}))
responses = [{"correct": name == "b" or row % 2 == 0} for row in range(4)]
problems = {"pass_at_1": sum(r["correct"] for r in responses) / 4}
headline = {"problems": problems, "samples": None, "routing": None}
document = {"headline": headline, "responses": responses, "sampled_responses": []}
(pathlib.Path(here) / "eval.json").write_text(json.dumps(document))
"""


def made_up_cell(name: str, *needs: str) -> Cell:
    read = f"{{work}}/{needs[0]}" if needs else ""
    command = ("python", "-c", SCRIPT, "{here}", name, read)
    return Cell(name=name, commands=(command,), needs=needs, facts={"kind": name, "seed": 0})


def runner(folder: Path) -> Runner:
    return Runner(work=folder / "work", results=folder / "results", jobs=2, commit="abc")


@pytest.fixture
def cells() -> list[Cell]:
    return [made_up_cell("a"), made_up_cell("b", "a"), made_up_cell("c", "b")]


def test_cells_follow_what_they_need_and_leave_results(cells, tmp_path):
    runner(tmp_path).run(cells)
    result = json.loads((tmp_path / "results" / "b.json").read_text())
    assert (result["greedy"], result["summary"], result["commit"]) == ("1111", "Pass@1 100.0", "abc")
    assert json.loads((tmp_path / "results" / "a.json").read_text())["greedy"] == "1010"


def test_verify_makes_a_cell_again_aside_and_compares(cells, tmp_path):
    with pytest.raises(UserError, match="a: has no result to compare with"):
        runner(tmp_path).verify(cells, cells)
    runner(tmp_path).run(cells)
    before = sorted(path.name for path in (tmp_path / "work").iterdir())
    runner(tmp_path).verify(cells, cells)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == before
    path = tmp_path / "results" / "b.json"
    path.write_text(path.read_text().replace('"1111"', '"1110"'))
    with pytest.raises(UserError, match="b: greedy came out otherwise"):
        runner(tmp_path).verify(cells, cells)


def test_verify_makes_what_a_cell_needs_where_only_results_are_there(cells, tmp_path):
    runner(tmp_path).run(cells)
    results = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    shutil.rmtree(tmp_path / "work")
    runner(tmp_path).verify([cells[1]], cells[:2])
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["a"]
    assert {path.name: path.read_text() for path in (tmp_path / "results").iterdir()} == results


def test_what_is_done_is_not_done_again(cells, tmp_path):
    runner(tmp_path).run(cells)
    assert runner(tmp_path).todo(cells) == []
    (tmp_path / "results" / "c.json").unlink()
    assert runner(tmp_path).todo(cells) == [cells[2]]


def test_a_lost_model_is_made_again_only_where_it_is_needed(cells, tmp_path):
    runner(tmp_path).run(cells)
    (tmp_path / "work" / "b" / MADE).unlink()
    assert runner(tmp_path).todo(cells) == []
    (tmp_path / "results" / "c.json").unlink()
    assert runner(tmp_path).todo(cells) == cells[1:]


def test_what_came_from_another_model_is_made_again(cells, tmp_path):
    runner(tmp_path).run(cells)
    before = {name: (tmp_path / "results" / f"{name}.json").read_text() for name in "abc"}
    # As if a had been lost, and came out otherwise on another machine.
    shutil.rmtree(tmp_path / "work" / "a")
    other = json.loads(before["a"]) | {"made": "another"}
    (tmp_path / "results" / "a.json").write_text(as_text(other))
    assert set(current_results(tmp_path / "results", cells)) == {"a"}
    runner(tmp_path).run(cells)
    assert set(current_results(tmp_path / "results", cells)) == set("abc")
    assert json.loads(before["b"])["read"] == {"a": json.loads(before["a"])["made"]}


def test_a_model_of_other_weights_than_its_result_is_not_built_upon(cells, tmp_path):
    runner(tmp_path).run(cells)
    (tmp_path / "work" / "b" / MADE).write_text(f"{cells[1].fingerprint()} another")
    (tmp_path / "results" / "c.json").unlink()
    assert runner(tmp_path).todo(cells) == cells[1:]


def test_a_model_is_known_by_its_weights(tmp_path):
    (tmp_path / "model").mkdir()
    nothing = made_hash(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert made_hash(tmp_path) == nothing
    (tmp_path / "model" / "model.safetensors").write_bytes(b"one")
    one = made_hash(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"two")
    assert len({nothing, one, made_hash(tmp_path)}) == 3


def test_a_cell_that_is_defined_anew_runs_again(cells, tmp_path):
    runner(tmp_path).run(cells)
    changed = replace(cells[2], commands=(*cells[2].commands, ("python", "-c", "pass")))
    assert runner(tmp_path).todo([*cells[:2], changed]) == [changed]


def test_a_change_reaches_all_that_follows_from_it(tmp_path, repository):
    def changed(root: Path, scale: Scale) -> set[str]:
        before = {cell.name: cell.fingerprint() for cell in all_cells(SCALES["full"])}
        cells = with_inputs(all_cells(scale), root)
        return {cell.name for cell in cells if cell.fingerprint() != before[cell.name]}

    shutil.copytree(repository / "ds_configs", tmp_path / "ds_configs")
    assert not changed(tmp_path, SCALES["full"])
    names = {cell.name for cell in all_cells(SCALES["full"])}
    assert changed(tmp_path, replace(SCALES["full"], teacher_steps=3)) == names
    after_grpo = changed(tmp_path, replace(SCALES["full"], teacher_rollouts=3))
    assert after_grpo == {name for name in names if not name.endswith("teacher-sft")}
    run_file = tmp_path / "ds_configs" / "runs" / "repro_warmup.yaml"
    run_file.write_text("# a remark\n" + run_file.read_text())
    assert not changed(tmp_path, SCALES["full"])
    run_file.write_text(run_file.read_text().replace("batch_size: 32, init", "batch_size: 16, init"))
    found = changed(tmp_path, SCALES["full"])
    assert {"seed5/half/sft", "seed5/half/joint/padd"} <= found
    assert "seed5/half/converted" not in found and "seed0/teacher" not in found


def test_a_failing_command_is_named_and_leaves_no_cell(cells, tmp_path):
    broken = replace(cells[1], commands=(("python", "-c", "print('what went wrong'); raise SystemExit(3)"),))
    with pytest.raises(UserError, match=r"exit code 3; its output is in .*b\.failed\.txt"):
        runner(tmp_path).run([cells[0], broken, cells[2]])
    assert "what went wrong" in (tmp_path / "work" / "b.failed.txt").read_text()
    assert not (tmp_path / "work" / "b").exists() and not (tmp_path / "results" / "b.json").exists()
    assert (tmp_path / "results" / "a.json").exists()


def test_sigterm_ends_what_a_cell_runs(repository, tmp_path):
    started = tmp_path / "started"
    sleeper = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    script = f"""
from pathlib import Path
from tools.experiment.cell import Cell
from tools.experiment.runner import Runner, end_on_sigterm
end_on_sigterm()
folder = Path({str(tmp_path)!r})
cell = Cell(name="a", commands=(("python", "-c", {sleeper!r}),))
Runner(work=folder / "work", results=folder / "results", jobs=1, commit="abc").run([cell])
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=repository)
    for _ in range(600):
        if started.exists() and started.read_text():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_needs_come_first_and_once(cells):
    by_name = {cell.name: cell for cell in cells}
    assert with_needs([cells[2], cells[1]], by_name) == cells


@pytest.mark.parametrize("name", sorted(SCALES))
def test_every_cell_is_named_once_after_what_it_needs(name):
    seen: set[str] = set()
    for cell in all_cells(SCALES[name]):
        assert cell.name not in seen
        assert set(cell.needs) <= seen, cell.name
        seen.add(cell.name)


@pytest.mark.parametrize("scale", ["full", "smollm2", "smollm2-gpu"])
def test_every_training_is_a_configuration_that_loads(repository, scale):
    for cell in all_cells(SCALES[scale]):
        for command in cell.commands:
            if "padd_ds/train.py" in command:
                filled = [word.replace("{here}", "here").replace("{work}", "work") for word in command]
                words = filled[filled.index("--config") + 1 :]
                load_run_config(repository / words[0], words[1:])


def test_pooled_is_the_mean_of_seeds_with_the_error_of_questions():
    seeds = [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
    estimate = pooled(seeds)
    error = math.sqrt(sum(stdev(one) ** 2 / 4 for one in seeds)) / 2
    assert estimate.mean == 0.5
    assert estimate.high - estimate.mean == pytest.approx(1.959964 * error, rel=1e-6)


def test_over_seeds_is_students_t():
    # 2.776 is the 97.5 % quantile of t with 4 degrees of freedom.
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    estimate = over_seeds(values)
    assert (estimate.mean, estimate.low) == (3.0, pytest.approx(3 - 2.776445 * stdev(values) / math.sqrt(5), rel=1e-6))
    assert over_seeds([2.0]).low == -math.inf


def test_paired_questions_see_a_small_steady_difference():
    right = [[float((row * 7) % 10 < 5) for row in range(200)]]
    left = [[max(value, float(row % 20 == 1)) for row, value in enumerate(right[0])]]
    estimate = paired_over_questions(left, right)
    assert estimate.mean == pytest.approx(fmean(left[0]) - fmean(right[0]))
    assert estimate.low > 0 and estimate.p_value < 0.01
    assert pooled(left).low < pooled(right).high


def made_up_result(cell: Cell, greedy: str) -> dict:
    routing = {"shift": 0.01, "nmi": 0.02, "esi_nats": 0.03, "max_violation": 0.4}
    samples = {"pass_at_1": 0.5, "samples": 4}
    return {
        "cell": cell.name,
        **cell.facts,
        "commit": "abc",
        "fingerprint": cell.fingerprint(),
        "commands": [list(command) for command in cell.commands],
        "seconds": 60.0,
        "cost": {"active_parameters": 500000, "total_parameters": 1000000, "matmul_flops_per_token": 1000000},
        "headline": {"problems": {"pass_at_1": 0.5}, "samples": samples, "routing": routing},
        "greedy": greedy,
        "sampled": "4222" if greedy == "1110" else "2222",
        "curves": {name: [0.1, 0.2, 0.3] for name in ("reward_correct", "load_max_violation", "router_shift")},
    }


def test_the_page_has_every_row_its_figures_and_its_commands(tmp_path):
    cells = all_cells(SCALES["full"])
    for cell in cells:
        path = tmp_path / "results" / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        greedy = "1110" if cell.facts.get("method") == "padd" else "1010"
        path.write_text(json.dumps(made_up_result(cell, greedy)))
    write_page(tmp_path / "page.md", tmp_path / "results", cells, SCALES["full"])
    text = (tmp_path / "page.md").read_text()
    assert f"{len(cells)} of {len(cells)} cells are there" in text.replace("\n", " ")
    for title in ("Teacher (GRPO)", "Dense-GRPO", "RSPO", "w/o I:", "sign-literal", "random-clusters"):
        assert title in text
    assert "| **PADD** | 0, 1, 2, 3, 4 | 0.5 of 1 | 75.0 (" in text and "+25.0 (" in text
    overview = text.split("## Overview")[1].split("## ")[0]
    for seeds in ("0, 1, 2, 3, 4", "5, 6, 7", "8, 9, 10"):
        assert overview.count(f"| greedy | {seeds} |") == overview.count(f"| sampled | {seeds} |") == 1
        assert f"\n| **Teacher (GRPO)** | {seeds} | " in text
    assert overview.count("| 75.0 (") == 3 and overview.count("Dense-GRPO: +25.0 (") == 3
    assert overview.count("| 62.5 (") == 3 and overview.count("Dense-GRPO: +12.5 (") == 3
    searches = text.split("## The search, ")[1:]
    assert len(searches) == len(SCALES["full"].searched) == 1
    for part in searches:
        search = part.split("## ")[0]
        assert search.count("| PADD |") == len(SEARCH["padd"])
        assert search.count("| **`") == len(SEARCH)
    for figure in (tmp_path / "page").iterdir():
        assert f"(page/{figure.name})" in text
    assert len(list((tmp_path / "page").iterdir())) == 13


def test_parts_without_padd_itself_make_a_page_all_the_same(tmp_path):
    every = {cell.name: cell for cell in all_cells(SCALES["full"])}
    parts = [cell for cell in every.values() if cell.facts.get("method") == "without-i"]
    for cell in with_needs(parts, every):
        path = tmp_path / "results" / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made_up_result(cell, "1010")))
    write_page(tmp_path / "page.md", tmp_path / "results", all_cells(SCALES["full"]), SCALES["full"])
    assert "w/o I" not in (tmp_path / "page.md").read_text()


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no result"):
        write_page(tmp_path / "page.md", tmp_path / "results", all_cells(SCALES["full"]), SCALES["full"])
    assert not (tmp_path / "page.md").exists()


def test_several_patterns_choose_what_any_of_them_matches():
    words = ["tools/repro.py", "--list", "--only", "seed5/half/sft", "--only", "seed6/half/[sc]*t*d"]
    assert run_command(*words).stdout.split() == ["seed5/half/sft", "seed6/half/converted"]
    refused = run_command(*words, "--only", "seed99/*")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --only seed99/*: no cell has such a name")


def forked(command, *, env, stdout, **options):
    """A Popen of this environment's python, or of a script beside it."""
    words = command[1:] if command[0] == str(BIN / "python") else command
    return Command(*words, environment=env, log=Path(stdout.name))


@pytest.mark.slow
def test_the_path_to_padd_runs_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner_module, "subprocess", SimpleNamespace(Popen=forked, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(repro, "end_on_sigterm", lambda: None)

    def told(*more: str) -> str:
        words = ["repro.py", "--scale", "smallest", "--only", "seed0/half/joint/padd", "--work", tmp_path / "work"]
        words += ["--results", tmp_path / "results", "--page", tmp_path / "page.md", *more]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        repro.main()
        return capsys.readouterr().err

    told()
    result = json.loads((tmp_path / "results" / "seed0" / "half" / "joint" / "padd.json").read_text())
    assert len(result["greedy"]) == 14 and result["headline"]["routing"]["shift"] >= 0
    assert "| **PADD** | 0 | 0." in (tmp_path / "page.md").read_text()
    assert "5 cells, 5 of them done" in told()
    assert "seed0/half/joint/padd: the same greedy, sampled, headline and curves" in told("--verify")


@pytest.mark.parametrize("shape", SCALES["full"].searched)
def test_what_the_rows_have_is_the_best_of_their_search(repository, shape):
    means: dict[str, dict[str, float]] = {}
    for result in current_results(repository / "results" / "full", all_cells(SCALES["full"])).values():
        if (result["kind"], result.get("shape")) == ("search", shape):
            headline = result["headline"]
            mean = headline["problems"]["pass_at_1"] + headline["samples"]["pass_at_1"]
            means.setdefault(result["row"], {})[result["options"]] = mean
    complete = {row: found for row, found in means.items() if len(found) == len(SEARCH[row])}
    assert complete
    for row, found in complete.items():
        assert max(found, key=lambda options: found[options]) == " ".join(TUNED[shape][row]), row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_scale_that_needs_a_gpu_says_so(monkeypatch, tmp_path):
    words = ["--scale", "smollm2-gpu", "--work", str(tmp_path), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["repro.py", *words])
    monkeypatch.setattr(repro, "end_on_sigterm", lambda: None)
    with pytest.raises(UserError, match="needs a GPU"):
        repro.main()
    assert list(tmp_path.iterdir()) == []
