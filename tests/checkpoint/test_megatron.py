"""A student exported for megatron-core is the same model there: what docs/export.md shows is what runs here."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from padd_ds.checkpoint.export import ExportOptions, export_run
from padd_ds.checkpoint.megatron_layout import megatron_pieces
from padd_ds.errors import UserError
from tests.checkpoint.made_up_run import ROPE, SIZES, random_student, spread, write_run
from tools.tiny_model import make_tiny_model

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core and torch warn of each other's deprecations
DENSE = {name: SIZES[name] for name in SIZES if "expert" not in name and "dense" not in name and name != "head_dim"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STUDENTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: random_student(),
    "qwen3, a dense layer": lambda: random_student(use_qk_norm=True, first_k_dense_replace=1),
    "qwen2": lambda: random_student(attention_bias=True),
    "no shared experts": lambda: random_student(n_shared_experts=0),
    "linear rope": lambda: random_student(rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0}),
    "llama3 rope": lambda: random_student(
        rope_parameters=ROPE | LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    ),
    "copies of experts": lambda: copied(random_student(n_routed_experts=8)),
    "dense qwen2": lambda: spread(Qwen2ForCausalLM(Qwen2Config(**DENSE))),
    "dense llama": lambda: spread(LlamaForCausalLM(LlamaConfig(**DENSE))),
    "dense qwen3, tied": lambda: spread(make_tiny_model()),
}


@torch.no_grad()
def copied(model: Any) -> Any:
    """Every second expert is its neighbour's copy, told apart by the router alone."""
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight[1::2] = weight[0::2]
    return model


@pytest.fixture
def in_megatron(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the example of the docs on a folder; gives what it defines."""
    page = (repository / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    place = '"students/joint-megatron"'
    assert place in code
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)

    def run(folder: Path, change: str = "") -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(code.replace(place, repr(str(folder))).replace(*change.split("->") if change else ("", "")), names)
        return names

    yield run
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def export(folder: Path, model: Any, **options: Any) -> Path:
    write_run(folder / "run", model)
    export_run(ExportOptions(run=folder / "run", output=folder / "out", format="megatron", **options))
    return folder / "out"


@torch.no_grad()
def deviation(model: Any, found: dict[str, Any]) -> float:
    expected = model(input_ids=found["ids"], use_cache=False).logits
    return float((found["logits"] - expected).abs().mean() / expected.abs().mean())


@torch.no_grad()
def chosen(routers: list[Any], forward: Callable[[], Any], of: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
    """The experts of every token, sorted, layer by layer."""
    found: list[torch.Tensor] = []
    hooks = [one.register_forward_hook(lambda _, __, output: found.append(of(output))) for one in routers]
    forward()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_gptmodel_computes_the_students_logits(name: str, tmp_path: Path, in_megatron: Any) -> None:
    model = STUDENTS[name]()
    found = in_megatron(export(tmp_path, model))
    assert deviation(model, found) < 3e-6
    assert found["logits"].std() > 0.1
    if not hasattr(model.config, "n_routed_experts"):
        return
    theirs = chosen(
        [layer.mlp.router for layer in found["model"].decoder.layers if hasattr(layer.mlp, "router")],
        lambda: found["model"](found["ids"], found["positions"], found["hidden_from"]),
        lambda output: output[1].nonzero()[:, 1].view(found["ids"].shape[1], -1),
    )
    ours = chosen(
        [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")],
        lambda: model(input_ids=found["ids"], use_cache=False),
        lambda output: output[2].sort(dim=-1).values,
    )
    assert len(ours) == model.config.num_hidden_layers - model.config.first_k_dense_replace
    assert all(torch.equal(*pair) for pair in zip(theirs, ours, strict=True))
    assert len({tuple(row) for row in torch.cat(ours).tolist()}) > 3


def swap_experts(layer: Any) -> None:
    first, second = (expert.linear_fc2.weight for expert in layer.mlp.experts.local_experts[:2])
    first.data, second.data = second.data.clone(), first.data.clone()


def swap_gate_and_up(layer: Any) -> None:
    weight = layer.mlp.shared_experts.linear_fc1.weight
    weight.data = torch.cat(weight.data.chunk(2)[::-1])


def drop_bias(layer: Any) -> None:
    layer.mlp.router.expert_bias.zero_()


def swap_query_groups(layer: Any) -> None:
    weight = layer.self_attention.linear_qkv.weight
    weight.data = torch.cat(weight.data.chunk(2)[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [swap_experts, swap_gate_and_up, drop_bias, swap_query_groups])
def test_the_comparison_sees_a_mistake_of_the_layout(
    spoil: Callable[[Any], None], tmp_path: Path, in_megatron: Any
) -> None:
    model = random_student()
    found = in_megatron(export(tmp_path, model))
    spoil(found["model"].decoder.layers[1])
    with torch.no_grad():
        found["logits"] = found["model"](found["ids"], found["positions"], found["hidden_from"])
    assert deviation(model, found) > 1e-3


@pytest.mark.slow
def test_megatron_pads_the_vocabulary_when_it_loads(tmp_path: Path, in_megatron: Any) -> None:
    model = random_student()
    padded = '**settings["gpt_model"]->**(settings["gpt_model"] | {"vocab_size": 128})'
    found = in_megatron(export(tmp_path, model), padded)
    assert found["logits"].shape[-1] == 128
    found["logits"] = found["logits"][..., : model.config.vocab_size]
    assert deviation(model, found) < 3e-6


@pytest.mark.slow
def test_norms_in_front_of_experts_have_both_names(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    folder = export(tmp_path, random_student(first_k_dense_replace=1), dtype="bfloat16")
    found = dist_checkpointing.load_tensors_metadata(str(folder / "release"))
    for layer, names in enumerate([("mlp.linear_fc1.layer_norm_weight",), ("pre_mlp_layernorm.weight",)]):
        assert all(f"decoder.layers.{layer}.{name}" in found for name in names)
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in found
    assert found["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].global_shape == (6, 48, 48)
    assert found["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    assert found["decoder.layers.1.mlp.router.weight"].dtype == torch.bfloat16
    settings = json.loads((folder / "megatron_config.json").read_text())
    assert settings["dtype"] == "bfloat16" and settings["transformer_config"]["bf16"] is True


def test_query_key_and_value_stand_in_turn_for_each_group() -> None:
    config = random_student().config
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    (piece,) = [
        p for p in megatron_pieces(config, names) if p.key.endswith("layers.0.self_attention.linear_qkv.weight")
    ]
    # Six query heads of 8 rows in two groups, whose rows carry the number of their head.
    query = torch.arange(6.0).repeat_interleave(8)[:, None]
    key, value = (torch.arange(2.0).repeat_interleave(8)[:, None] + first for first in (10, 20))
    heads = piece.build(query, key, value)[::8, 0].tolist()
    assert heads == [0, 1, 2, 10, 20, 3, 4, 5, 11, 21]


@pytest.mark.slow
def test_a_file_that_went_bad_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from padd_ds.checkpoint import megatron

    write = megatron.write_checkpoint

    def spoiled(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        values = random_student().state_dict()["model.layers.1.self_attn.o_proj.weight"].numpy().tobytes()
        (path,) = (path for path in folder.glob("*.distcp") if values in path.read_bytes())
        whole = bytearray(path.read_bytes())
        whole[whole.index(values)] ^= 1
        path.write_bytes(whole)

    monkeypatch.setattr(megatron, "write_checkpoint", spoiled)
    with pytest.raises(UserError, match=r"decoder\.layers\.1\.self_attention\.linear_proj\.weight"):
        export(tmp_path, random_student())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"n_group": 2}, "n_group"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        (
            {"rope_parameters": ROPE | LLAMA3 | {"original_max_position_embeddings": 64}},
            "original_max_position_embeddings",
        ),
    ],
)
def test_what_gptmodel_cannot_be_is_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_student(**settings))
    with pytest.raises(UserError, match=rf"config\.json: {named}.* is .*megatron"):
        export_run(ExportOptions(run=tmp_path / "run", output=tmp_path / "out", format="megatron"))
    assert not (tmp_path / "out").exists()


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", spread(LlamaForCausalLM(LlamaConfig(**DENSE, attention_bias=True))))
    with pytest.raises(UserError, match=r"self_attn\.[a-z]_proj\.bias"):
        export_run(ExportOptions(run=tmp_path / "run", output=tmp_path / "out", format="megatron"))


def test_megatron_core_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", random_student())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "megatron" else find(name))
    with pytest.raises(UserError, match="pip install"):
        export_run(ExportOptions(run=tmp_path / "run", output=tmp_path / "out", format="megatron"))


@pytest.mark.slow
def test_the_command_says_nothing_of_transformer_engine_and_leaves_no_group(repository: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_student())
    command = ["-m", "padd_ds.export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *command, "--format", "megatron"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Warning" not in done.stderr and "Transformer Engine" not in done.stderr + done.stdout
    assert "tensors of step 1" in done.stdout and "off those of the live student" in done.stdout
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release\n"


def test_loading_in_transformers_gives_the_model_back(tmp_path: Path) -> None:
    """The made-up run is what it is taken for."""
    model = random_student()
    write_run(tmp_path / "run", model)
    export_run(ExportOptions(run=tmp_path / "run", output=tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 9, 7, 4]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
