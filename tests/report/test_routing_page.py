"""The analysis of a routing as a page."""

import json
from typing import Any

import pytest

from padd_ds.report.routing_files import write_routing_files
from padd_ds.report.routing_page import routing_page, routing_summary
from tests.report.test_page import Outline

LAYERS, EXPERTS = [1, 2], 3
EVEN = [[0.5, 0.25, 0.25]] * 2
PAIRS = [[[1.0, 0.2, -0.4], [0.2, 1.0, 0.5], [-0.4, 0.5, 1.0]]] * 2


def association(value: float) -> dict[str, Any]:
    return {
        "value": value,
        "interval_95": [0.1, 0.3],
        "shuffled_mean": 0.01,
        "shuffled_95": 0.02,
        "p_value": 0.005,
        "by_layer": [value, value],
        "interval_95_by_layer": [[0.1, 0.3]] * 2,
        "shuffled_mean_by_layer": [0.01, 0.01],
    }


def course(checkpoint: str, consistency: float) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint,
        "consistency": consistency,
        "consistency_by_layer": [consistency] * 2,
        "shift": 0.1,
        "shift_by_layer": [0.1, 0.1],
        "shift_edges": [1e-4, 1e-2],
        "shift_counts": [1, 5, 2],
    }


def analysis(**changes: Any) -> dict[str, Any]:
    headline = {
        "max_violation": 0.5,
        "dead_experts": 1,
        "entropy_nats": 0.9,
        "shift": 0.123,
        "flips": 0.25,
        "shift_edges": [1e-4, 1e-2],
        "shift_counts": [1, 5, 2],
        "max_violation_by_layer": [0.5, 0.5],
        "load_share_by_layer": EVEN,
    }
    routing = {
        "headline": headline,
        "rows": 8,
        "tokens": 100,
        "layers": LAYERS,
        "experts": EXPERTS,
        "experts_per_token": 2,
        "score_function": "softmax",
        "subjects": {"<b>algebra</b>": 5, "geometry": 3},
        "specialisation": {
            "nmi": association(0.2),
            "esi_nats": association(0.25),
            "resamples": 1000,
            "shuffles": 200,
            "seed": 0,
            "share_by_subject": {"<b>algebra</b>": EVEN, "geometry": [[0.2, 0.4, 0.4]] * 2},
        },
        "load": {
            "dead_experts_by_layer": [0, 1],
            "load_entropy_nats_by_layer": [1.0, 1.0],
            "router_entropy_nats_by_layer": [0.8, 0.9],
        },
        "sampled_tokens": 100,
        "output_similarity": PAIRS,
        "coactivation": PAIRS,
        "shift": {"shift_by_layer": [0.1, 0.15], "flips_by_layer": [0.2, 0.3]},
        "over_training": [course("runs/step_1", 0.5), course("runs/step_2", 0.75)],
        "clusters": {
            "agreement": 0.75,
            "chance": 0.5,
            "agreement_by_layer": [0.7, 0.8],
            "chance_by_layer": [0.5, 0.5],
            "teacher_share_by_layer": EVEN,
        },
    }
    return {
        "settings": {"model": "students/<i>joint</i>", "data": "data/test.jsonl"},
        "versions": {"torch": "2"},
        "routing": routing | changes,
    }


def test_every_part_is_drawn_and_nothing_of_the_data_is_markup():
    html = routing_page(analysis())
    assert Outline(html).headings == [
        *("Routing of i>", "Result", "Subjects", "NMI per layer", "<b>algebra</b>"),
        *("geometry", "Load", "Load", "Entropy per layer", "Change since the other checkpoint"),
        *("Distribution of the router shift", "Router shift per layer", "Flips per layer", "Over training"),
        *("Expert consistency per layer", "Distribution of the shift from each", "The teacher's clusters"),
        *("Agreement per layer", "Load that the teacher suggests", "Experts", "Output similarity, layer 1"),
        *("Co-activation, layer 1", "Output similarity, layer 2", "Co-activation, layer 2", "Layers", "Settings"),
    ]
    assert "<b>algebra" not in html and "<i>joint" not in html
    assert "://" not in html.replace("http://www.w3.org", "")
    assert "<script" not in html
    assert "0.1 to 0.3" in html and "0.01 (95 of 100 below 0.02)" in html
    # The mean of 0.2, -0.4 and 0.5, either way round.
    assert ">0.1<" in html and "1 of 6" in html and "75.0 %" in html


def test_what_was_not_measured_is_left_out():
    without = {"specialisation": None, "subjects": {}, "shift": None, "clusters": None, "over_training": []}
    html = routing_page(analysis(**without, experts_per_token=1))
    shown = Outline(html).headings
    assert not {"Subjects", "Change since the other checkpoint", "Over training", "The teacher's clusters"} & set(shown)
    assert "Co-activation, layer 1" not in shown


def test_the_summary_is_a_line_each():
    lines = routing_summary(analysis()["routing"]).splitlines()
    assert lines[0].split("  ")[0] == "NMI of expert and subject"
    assert lines[0].endswith("0.2, 95 % 0.1 to 0.3, no association 0.01 (95 of 100 below 0.02), p 0.005")
    assert any("75.0 %, no association 50.0 %" in line for line in lines)
    assert any(line.split("  ")[0] == "Choices that step_1 makes too" and line.endswith("50.0 %") for line in lines)


def test_plots_and_tables(tmp_path):
    write_routing_files(tmp_path, analysis()["routing"])
    layers = (tmp_path / "layers.csv").read_text().splitlines()
    assert layers[0].startswith("layer,NMI,shuffled") and layers[0].endswith(
        'agreement,"consistency, 1","consistency, 2"'
    )
    assert [line.split(",")[0] for line in layers[1:]] == ["1", "2"] and layers[1].endswith("0.7,0.5,0.75")
    experts = (tmp_path / "experts.csv").read_text().splitlines()
    assert experts[:2] == ["layer,expert,load_share,share of <b>algebra</b>,share of geometry", "1,0,0.5,0.5,0.2"]
    assert len(experts) == 1 + len(LAYERS) * EXPERTS
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert "02_b_algebra_b.svg" in drawn and "09_expert_consistency_per_layer.png" in drawn


@pytest.mark.parametrize("experts", [1, 2])
def test_one_expert_and_two(experts):
    square = [[[1.0] * experts] * experts] * 2
    routing = analysis(experts=experts, output_similarity=square, coactivation=square)["routing"]
    assert "Output similarity" in routing_summary(json.loads(json.dumps(routing)))
