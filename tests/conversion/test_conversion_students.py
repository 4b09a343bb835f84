"""Converted students: plain folders that equal their teachers with all experts active."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from padd_ds.conversion import sweep
from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.pipeline import convert
from padd_ds.conversion.targets import load_targets

TOKENS = torch.arange(64).view(2, 32) * 37 % 256


def options(teacher: Path, output: Path, calibration: Path | None, **changes: Any) -> ConversionOptions:
    settings: dict[str, Any] = {"experts": 8, "shared_experts": 2, "top_k": 3, "calibration_tokens": 1024}
    return ConversionOptions(teacher=str(teacher), output=output, calibration=calibration, **{**settings, **changes})


def load_all_active(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.num_experts_per_tok = config.n_routed_experts
    config.routed_scaling_factor = float(config.n_routed_experts)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    for layer in model.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.weight.data.zero_()
    return model.eval()


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors.update(load_file(path))
    return tensors


@torch.no_grad()
def relative_error(teacher: Any, student: Any) -> float:
    expected, actual = teacher(TOKENS).logits, student(TOKENS).logits
    return float((expected - actual).abs().max() / expected.abs().max())


def test_some_experts_active_differ_from_the_teacher(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    convert(options(llama_teacher, tmp_path / "student", calibration_file))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert relative_error(AutoModelForCausalLM.from_pretrained(llama_teacher).eval(), student) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_student_passes_its_check(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path, dtype: str
) -> None:
    report = convert(options(llama_teacher, tmp_path / "student", calibration_file, dtype=dtype))
    assert report.exactness.largest_error <= 1e-5
    assert report.exactness.student_rounding_error is not None
    assert 0 < report.exactness.student_rounding_error <= report.exactness.teacher_rounding_error
    tensors = stored_tensors(tmp_path / "student")
    assert tensors["lm_head.weight"].dtype == getattr(torch, dtype)
    assert tensors["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_tensors_are_stored_per_expert_under_their_public_names(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    convert(options(llama_teacher, tmp_path / "student", calibration_file))
    index = json.loads((tmp_path / "student/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(tmp_path / "student").items()}
    assert shapes.keys() == index["weight_map"].keys()
    assert shapes["model.layers.1.mlp.experts.5.gate_proj.weight"] == (8, 32)
    assert shapes["model.layers.1.mlp.experts.5.down_proj.weight"] == (32, 8)
    assert shapes["model.layers.1.mlp.shared_experts.up_proj.weight"] == (16, 32)
    assert shapes["model.layers.1.mlp.gate.weight"] == (6, 32)
    assert shapes["lm_head.weight"] == (260, 32)
    assert "model.layers.1.mlp.experts.6.gate_proj.weight" not in shapes


def test_tokenizer_and_chat_template_travel(tmp_path: Path, llama_teacher: Path, calibration_file: Path) -> None:
    convert(options(llama_teacher, tmp_path / "student", calibration_file))
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "student", llama_teacher))
    messages = [{"role": "user", "content": "1 + 1 = ?"}]
    assert ours.chat_template == theirs.chat_template
    assert ours.apply_chat_template(messages, tokenize=False) == "<s>1 + 1 = ?</s>"
    assert ours("naïve 東京")["input_ids"] == theirs("naïve 東京")["input_ids"]
    assert ours.eos_token == "</s>"


@pytest.mark.parametrize("cluster", ["activations", "random"])
def test_same_seed_gives_the_same_bytes(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path, cluster: str
) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        convert(options(llama_teacher, tmp_path / name, calibration_file, seed=seed, cluster=cluster))
    for file in ("model-00002-of-00004.safetensors", "padd_targets.safetensors"):
        one, two, other = ((tmp_path / name / file).read_bytes() for name in ("one", "two", "other"))
        assert one == two
        assert one != other


@pytest.mark.parametrize("cluster", ["activations", "weights", "mixed", "random", "contiguous"])
@pytest.mark.parametrize("router", ["calibrated", "centroid", "random"])
def test_every_cluster_and_router_converts(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path, cluster: str, router: str
) -> None:
    report = convert(options(llama_teacher, tmp_path / "student", calibration_file, cluster=cluster, router=router))
    assert all(layer["size_variation"] == 0 for layer in report.layers)
    targets = load_targets(tmp_path / "student")
    assert (targets.cluster, targets.router) == (cluster, router)


@pytest.mark.parametrize("cluster", ["weights", "random", "contiguous"])
def test_without_data_a_student_has_no_prior(tmp_path: Path, llama_teacher: Path, cluster: str) -> None:
    report = convert(options(llama_teacher, tmp_path / "student", None, cluster=cluster, router="centroid"))
    targets = load_targets(tmp_path / "student")
    assert targets.expert_prior_LE is None
    assert report.layers[0]["load_variation"] is None
    assert report.exactness.largest_error <= 1e-5


def test_contiguous_keeps_the_routed_neurons_in_order(tmp_path: Path, llama_teacher: Path) -> None:
    convert(options(llama_teacher, tmp_path / "student", None, cluster="contiguous", router="centroid"))
    for assignment_F in load_targets(tmp_path / "student").assignment_LF:
        routed = assignment_F[assignment_F < 6]
        assert torch.equal(routed, routed.sort().values)


def test_shared_slices_of_the_first_layer_do_not_depend_on_the_grouping(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    shared = []
    for cluster in ("activations", "weights", "random", "contiguous"):
        convert(options(llama_teacher, tmp_path / cluster, calibration_file, cluster=cluster, regroup_rounds=0))
        shared.append(load_targets(tmp_path / cluster).assignment_LF[0] >= 6)
    assert all(torch.equal(other, shared[0]) for other in shared[1:])


def test_assignment_names_the_neurons_of_every_expert(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    convert(options(llama_teacher, tmp_path / "student", calibration_file))
    targets = load_targets(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    teacher = AutoModelForCausalLM.from_pretrained(llama_teacher)
    for layer in range(2):
        gate_FD = teacher.model.layers[layer].mlp.gate_proj.weight
        for expert in range(6):
            neurons = (targets.assignment_LF[layer] == expert).nonzero().flatten()
            fused = student.model.layers[layer].mlp.experts.gate_up_proj[expert]
            assert torch.equal(fused[:8], gate_FD[neurons])


def test_report_counts_the_parameters_that_the_models_have(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    report = convert(options(llama_teacher, tmp_path / "student", calibration_file))
    costs = report.contents["costs"]
    teacher = AutoModelForCausalLM.from_pretrained(llama_teacher)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    expert = sum(p[0].numel() for p in student.model.layers[0].mlp.experts.parameters())
    assert costs["teacher"]["total_parameters"] == teacher.num_parameters()
    assert costs["student"]["total_parameters"] == student.num_parameters()
    assert costs["student"]["active_parameters"] == student.num_parameters() - 2 * (6 - 3) * expert
    assert report.contents == json.loads((tmp_path / "student/padd_conversion.json").read_text())


def test_existing_output_is_replaced_with_overwrite(tmp_path: Path, llama_teacher: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/old").write_text("old")
    convert(options(llama_teacher, tmp_path / "student", None, cluster="weights", router="centroid", overwrite=True))
    assert not (tmp_path / "student/old").exists()
    assert (tmp_path / "student/config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_refit_lowers_the_error_and_leaves_the_proof_to_the_plain_slices(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    plain, refitted = (
        convert(options(llama_teacher, tmp_path / str(refit), calibration_file, refit=refit)) for refit in (False, True)
    )
    assert refitted.exactness.largest_error <= 1e-5
    for before, after in zip(plain.layers[:1], refitted.layers[:1], strict=True):
        assert after["reconstruction_error"] < 0.9 * before["reconstruction_error"]
    same, changed = (stored_tensors(tmp_path / name) for name in ("False", "True"))
    differ = {name for name in same if not torch.equal(same[name], changed[name]) and name.startswith("model.layers.0")}
    assert differ
    assert all("down_proj" in name for name in differ)


def test_perplexities_are_those_of_the_written_models(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    text = {"evaluation": calibration_file, "evaluation_tokens": 600, "controls": True}
    report = convert(options(llama_teacher, tmp_path / "student", calibration_file, **text))
    tokenizer = AutoTokenizer.from_pretrained(llama_teacher)
    ids_BT = torch.tensor(tokenizer(calibration_file.read_text())["input_ids"][:512]).view(2, 256)
    for who, folder in (("teacher", llama_teacher), ("student", tmp_path / "student")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = float(model(ids_BT, labels=ids_BT).loss.exp())
        assert report.contents["perplexity"][who] == pytest.approx(expected, rel=1e-4)
    random = convert(options(llama_teacher, tmp_path / "random", calibration_file, cluster="random", **text))
    assert report.contents["perplexity"]["random"] == pytest.approx(random.contents["perplexity"]["student"], rel=1e-5)
    assert report.contents["controls"].keys() == {"random", "contiguous"}


def test_copies_hold_every_routed_weight_as_often_and_change_little(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path
) -> None:
    text = {"evaluation": calibration_file, "evaluation_tokens": 1024}
    single, double = (
        convert(options(llama_teacher, tmp_path / str(copies), calibration_file, replicate=copies, **text))
        for copies in (1, 2)
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    assert student.config.n_routed_experts == 12
    costs = [report.contents["costs"]["student"] for report in (single, double)]
    assert costs[1]["total_parameters"] == student.num_parameters()
    router_rows = 2 * 6 * 32
    assert costs[1]["active_parameters"] == costs[0]["active_parameters"] + router_rows
    tensors = stored_tensors(tmp_path / "2")
    for expert in range(6):
        for part in ("gate", "up", "down"):
            first, second = (f"model.layers.0.mlp.experts.{index}.{part}_proj.weight" for index in (expert, expert + 6))
            assert torch.equal(tensors[first], tensors[second])
    perplexity = [report.contents["perplexity"]["student"] for report in (single, double)]
    assert perplexity[1] == pytest.approx(perplexity[0], rel=0.2)
    load_E = torch.tensor(double.layers[0]["expected_load"])
    assert load_E[:6].sum() == pytest.approx(0.5, abs=0.15)


def test_part_of_a_copy_is_drawn_anew(tmp_path: Path, llama_teacher: Path, calibration_file: Path) -> None:
    report = convert(
        options(llama_teacher, tmp_path / "student", calibration_file, replicate=2, reinit_share=0.5, refit=True)
    )
    assert report.exactness.largest_error <= 1e-5
    tensors = stored_tensors(tmp_path / "student")
    for expert in range(6):
        original, copy = (
            tensors[f"model.layers.0.mlp.experts.{index}.gate_proj.weight"] for index in (expert, expert + 6)
        )
        assert int((original != copy).any(dim=1).sum()) == 4
        down, down_copy = (
            tensors[f"model.layers.0.mlp.experts.{index}.down_proj.weight"] for index in (expert, expert + 6)
        )
        assert torch.equal((down != down_copy).any(dim=0), (original != copy).any(dim=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": "weights", "weight_features": "gate+up+down"},
        {"cluster": "mixed", "weight_features": "gate+up"},
        {"overcluster": 4},
        {"restarts": 5},
    ],
)
def test_ways_to_group_give_other_groups_of_the_same_sizes(
    tmp_path: Path, llama_teacher: Path, calibration_file: Path, changes: dict[str, Any]
) -> None:
    plain = {"cluster": changes.get("cluster", "activations"), "regroup_rounds": 0}
    reports = {
        name: convert(options(llama_teacher, tmp_path / name, calibration_file, **{**plain, **added}))
        for name, added in {"plain": {}, "changed": changes}.items()
    }
    assert all(layer["size_variation"] == 0 for layer in reports["changed"].layers)
    assignments = [load_targets(tmp_path / name).assignment_LF for name in reports]
    assert not torch.equal(*assignments)
    if "restarts" in changes:
        first = [report.layers[0]["objective"] for report in reports.values()]
        assert first[1] <= first[0]


def test_first_layers_stay_dense(tmp_path: Path, llama_teacher: Path, calibration_file: Path) -> None:
    text = {"evaluation": calibration_file, "evaluation_tokens": 512, "controls": True}
    report = convert(options(llama_teacher, tmp_path / "student", calibration_file, dense_layers=1, **text))
    paths = (tmp_path / "student", llama_teacher)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in paths)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)
    assert relative_error(teacher, load_all_active(tmp_path / "student")) <= 1e-5
    assert len(report.layers) == 1
    assert load_targets(tmp_path / "student").layer_map_L.tolist() == [1]
    # Of two layers one is whole, of the other 5 of 8 slices are active.
    assert report.contents["slices"]["ffn_active_share"] == pytest.approx((1 + 5 / 8) / 2)
    assert report.contents["costs"]["student"]["total_parameters"] == student.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(llama_teacher)
    ids_BT = torch.tensor(tokenizer(calibration_file.read_text())["input_ids"][:512]).view(2, 256)
    with torch.no_grad():
        expected = float(student(ids_BT, labels=ids_BT).loss.exp())
    assert report.contents["perplexity"]["student"] == pytest.approx(expected, rel=1e-4)


def test_padding_of_rows_leaves_no_trace(tmp_path: Path, llama_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    records = [{"question": "sum of " + "x" * n, "solution": "is " + "1" * (40 - n)} for n in range(0, 40, 2)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = {"calibration_field": "question,solution", "calibration_tokens": 900, "replicate": 2, "even_load": True}
    convert(options(llama_teacher, tmp_path / "one", path, **rows))
    embed = sweep.embed
    monkeypatch.setattr(sweep, "embed", lambda weights, ids_WT: embed(weights, ids_WT.where(ids_WT >= 0, 77)))
    convert(options(llama_teacher, tmp_path / "other", path, **rows))
    one, other = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "other")
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
