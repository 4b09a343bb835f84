"""The report of a run folder as a page."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from padd_ds.errors import UserError
from padd_ds.report import TableRow, write_report
from tests.report.made_up_run import EXPERTS, LAYERS, make_run, metrics, routing, write_lines

VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """Headings in order, and a check that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and re.fullmatch(r"h[1-4]", self.open[-1]):
            self.headings.append(data.strip())


def report(folder: Path, *runs: Path) -> str:
    path = folder / "report.html"
    rows = [TableRow("teacher", 39.4, 0.5, 0.4, 0.6, 100, 1000, 1000, 2000.0)]
    write_report(path, title="A < B", subtitle="made up", rows=rows, runs=list(runs), notes=["a note & more"])
    return path.read_text(encoding="utf-8")


def test_every_section_is_there(tmp_path: Path) -> None:
    html = report(tmp_path, make_run(tmp_path / "first"))
    assert Outline(html).headings == [
        *("A < B", "Results", "Joint training (first)", "Training", "Language-model loss", "Distillation loss"),
        *("Initialisation loss", "Policy loss", "Auxiliary loss", "Reward", "Response length", "Failed responses"),
        *("Groups without spread", "Router shift and policy ratio", "Penalised ratio", "Clipped tokens"),
        *("KL to the reference", "Flips of expert choice", "Gradient of each term", "Gradient norm"),
        *("Load violation", "Router entropy", "Throughput", "Time per phase"),
        *("Routing by layer and expert", "Load", "Selection bias", "Averaged advantage", "Experts of rewarded tokens"),
        *("Load violation per layer", "Router shift per layer", "Flips per layer"),
        *("Flips against the rollout per layer", "Distribution of the router shift"),
        *("Responses", "Settings"),
    ]
    assert "On average λΓ was 2 % of" in html
    assert "3 of 12 experts had no token" in html
    assert "the largest is 2 spreads" in html
    assert "The distance between the two loads is 0.2 of 1" in html
    assert "KL to the reference <b>0.5" in html and "auxiliary loss <b>0.5" in html
    assert "a note &amp; more" in html
    assert "stage: joint" in html and "&quot;ranks&quot;: 2" in html
    assert "no data" not in html.split("</style>")[1]


def test_the_page_needs_no_network_and_runs_nothing(tmp_path: Path) -> None:
    html = report(tmp_path, make_run(tmp_path / "run"))
    assert re.findall(r"https?://|@import|url\((?!#)|\bon\w+=", html) == []
    assert not {"script", "link", "iframe", "object"} & set(Outline(html).tags)
    assert len(html) < 300_000


def test_a_malicious_response_is_shown_as_text(tmp_path: Path) -> None:
    attack = '</pre></article><script>alert(1)</script><img src=x onerror="alert(2)"> \' & &amp;'
    html = report(tmp_path, make_run(tmp_path / "run", response=attack))
    assert not {"script", "img"} & set(Outline(html).tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=&quot;alert(2)&quot;&gt;" in html
    assert "&amp; &amp;amp;" in html


def test_samples_are_of_the_first_and_the_last_step_and_long_ones_are_cut(tmp_path: Path) -> None:
    html = report(tmp_path, make_run(tmp_path / "run", steps=5, response="x" * 2100))
    assert re.findall(r'<p class="hint">(Step \d+)</p>', html) == ["Step 0", "Step 4"]
    assert html.count("x" * 2000 + " … (100 more characters)") == 2


def test_a_run_of_one_step_works(tmp_path: Path) -> None:
    html = report(tmp_path, make_run(tmp_path / "run", steps=1))
    assert "<b>0.5</b>" in html and "→ 0.5" not in html
    assert html.count("<svg class=") == 29


def test_metrics_that_a_run_lacks_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [{"step": 0, "loss_lm": 2.0}, {"step": 1, "loss_lm": float("nan")}])
    html = report(tmp_path, run)
    headings = Outline(html).headings
    assert "Language-model loss" in headings and "Reward" not in headings and "Time per phase" not in headings
    assert "<b>2 (1 not finite)</b>" in html


def test_a_log_plot_of_zeros_says_that_there_is_nothing_to_draw(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [{"step": 0, "router_shift": 0.0}])
    assert 'shift Γ <b>0</b></li></ul></div><p class="no-data">no data</p>' in report(tmp_path, run)


def test_an_empty_run_says_no_data_everywhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    html = report(tmp_path, tmp_path / "run")
    assert html.count(">no data<") == 5
    assert Outline(html).headings[2] == "Run (run)"


def test_a_bias_on_the_logits_is_shown_and_an_unused_one_is_said_to_be_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    line = routing(0)
    line["selection_bias"], line["logit_bias"] = line["logit_bias"], line["selection_bias"]
    write_lines(run / "routing" / "routing.jsonl", [line])
    html = report(tmp_path, run)
    assert "Logit bias" in Outline(html).headings
    assert "0 for every expert" in html


def test_routing_that_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    line = routing(0)
    line["advantage_ema"] = [[0.0] * EXPERTS] * LAYERS
    line["load_share_unrewarded"] = [[0.0] * EXPERTS] * LAYERS
    line["router_flips"] = [0.0] * LAYERS
    del line["router_shift"], line["router_flips_rollout"], line["router_shift_counts"]
    write_lines(run / "routing" / "routing.jsonl", [line])
    headings = Outline(report(tmp_path, run)).headings
    shown = headings[headings.index("Routing by layer and expert") + 1 : headings.index("Responses")]
    assert shown == ["Load", "Selection bias", "Load violation per layer"]


def test_a_map_over_steps_leaves_out_the_records_that_lack_its_values(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    older = {name: value for name, value in routing(0).items() if name != "router_shift"}
    write_lines(run / "routing" / "routing.jsonl", [older, routing(1)])
    assert "Router shift per layer" in Outline(report(tmp_path, run)).headings


def test_a_missing_metrics_file_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run/metrics\.jsonl: no such file"):
        report(tmp_path, make_run(tmp_path / "good"), tmp_path / "run")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\n{"step": 1, "lo', r"metrics\.jsonl, line 2: not JSON"),
        ("samples.jsonl", "[1]\n", r"samples\.jsonl, line 1: not an object with a \"step\""),
        ("config.yaml", "stage: [\n", r"config\.yaml: not YAML"),
        ("metrics.jsonl", '{"step": 0, "é": 1}\n', r"metrics\.jsonl, line 1: is not UTF-8"),
    ],
)
def test_a_broken_file_is_named_on_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as error:
        report(tmp_path, run)
    assert "\n" not in str(error.value)


def test_a_folder_as_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write_report(tmp_path, title="", subtitle="", rows=[], runs=[], notes=[])


def test_a_report_is_the_same_when_written_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [metrics(step) for step in range(40)])
    assert report(tmp_path, run) == report(tmp_path, run)
