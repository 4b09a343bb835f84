"""The page of a conversion: its tables and drawings, from the figures alone."""

from typing import Any

from padd_ds.report.conversion_page import conversion_page
from padd_ds.report.numbers import TIMES

COST = {"active_parameters": 75, "total_parameters": 120, "flops_per_token": 1500, "prefill_flops_per_token": 1200}


def figures(**changes: Any) -> dict[str, Any]:
    layer = {
        "objective": 1.0,
        "iterations": 3,
        "silhouette": -0.1,
        "between_cluster_share": 0.2,
        "size_variation": 0.0,
        "load_variation": 0.3,
        "expected_load": [0.5, 0.3, 0.2],
        "shared_contribution": 0.4,
        "reconstruction_error": 0.05,
    }
    contents = {
        "teacher": {"source": "models/<dense>", "model_type": "llama"},
        "versions": {"torch": "2"},
        "options": {"cluster": "activations", "refit": True, "dtype": "bfloat16"},
        "tokens_used": {"calibration": 512},
        "slices": {"slice_width": 8, "shared": 1, "routed": 3, "top_k": 2, "ffn_active_share": 0.75},
        "exactness": {
            "largest_error": 1.5e-6,
            "logits_error": 1e-6,
            "student_rounding_error": 0.004,
            "teacher_rounding_error": 0.008,
        },
        "perplexity": {"teacher": 10.0, "student": 12.5, "random": 15.0},
        "costs": {"attention_context_tokens": 1024, "teacher": COST, "student": COST},
        "layers": [layer, {**layer, "reconstruction_error": 0.15}],
        "controls": {"random": [layer, layer]},
    }
    return {**contents, **changes}


def test_page_tells_perplexities_costs_and_proof() -> None:
    page = conversion_page(figures())
    assert "models/<dense>" not in page and "&lt;dense&gt;" in page
    assert "<td>12.5</td><td>1.25</td>" in page
    assert '<th scope="row">control: random groups</th><td>15</td><td>1.5</td>' in page
    assert f"1.5{TIMES}10⁻⁶ before the refit" in page
    assert "75% of the FFN active" in page


def test_every_metric_is_drawn_and_the_load_mapped() -> None:
    page = conversion_page(figures())
    assert page.count("<svg") == 6
    for title in ("Reconstruction error", "Load variation", "Silhouette", "Expected load"):
        assert title in page
    assert "mean 0.1" in page  # of the student's two reconstruction errors


def test_what_is_not_known_is_left_out() -> None:
    unknown = {"load_variation": None, "expected_load": None, "shared_contribution": None, "reconstruction_error": None}
    layers = [{**layer, **unknown} for layer in figures()["layers"]]
    page = conversion_page(figures(layers=layers, controls={}, perplexity={}))
    assert page.count("<svg") == 2
    assert "Reconstruction error" not in page
    assert "<td>-</td>" in page


def test_page_of_an_existing_student_has_no_slices_proof_or_costs() -> None:
    perplexity = {"teacher": 10.0, "student": 11.0, "student before": 9.0}
    contents = figures(student={"source": "models/moe"}, perplexity=perplexity)
    for absent in ("slices", "exactness", "costs"):
        contents.pop(absent)
    page = conversion_page(contents)
    assert "New routers for moe" in page
    assert "student before" in page
