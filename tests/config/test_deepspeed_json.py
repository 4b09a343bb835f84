"""The DeepSpeed JSON: what DeepSpeed would swallow in silence is refused."""

import inspect
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.module_inject import auto_ep_config

from padd_ds.config.deepspeed_json import (
    EXPERT_PARALLEL_KEYS,
    TOP_LEVEL_KEYS,
    check_batches,
    check_grouped_products,
    check_parallelism,
    load_deepspeed_json,
)
from padd_ds.errors import UserError
from tests.world import deepspeed_tree, joint_config


def write(tmp_path: Path, tree: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    return path


def test_every_json_of_the_repository_loads(repository: Path) -> None:
    paths = sorted((repository / "ds_configs").glob("*.json"))
    assert paths
    for path in paths:
        tree = load_deepspeed_json(path)
        size = tree["expert_parallel"]["autoep_size"]
        assert check_parallelism(path, tree, size, 4 * size) == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"expert_parallel": {"enabled": True, "autoep_sise": 2}}, "did you mean autoep_size?"),
        ({"gradient_clipping": "auto"}, 'gradient_clipping is "auto"'),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'zero_optimization.reduce_bucket_size is "auto"'),
        ({"optimizer": {"type": "Adam"}}, "set by the run configuration (optimizer.*)"),
        ({"train_batch_size": 8}, "take it out of the JSON"),
        ({"expert_parallel": True}, "expert_parallel must be a mapping"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "set by the run configuration (activation_checkpoin",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, deepspeed_tree(2) | change)
    with pytest.raises(UserError) as raised:
        load_deepspeed_json(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "widths", "fits"),
    [
        ({}, (16, 4), True),
        ({}, (16, 6), False),
        ({}, (18, 8), False),
        ({"bf16": {"enabled": True}}, (16, 4), False),
        ({"bf16": {"enabled": True}}, (16, 8), True),
    ],
)
def test_grouped_products_take_the_widths_that_torch_takes(
    change: dict[str, Any], widths: tuple[int, int], fits: bool
) -> None:
    tree = deepspeed_tree(1) | {"expert_parallel": {"enabled": True}} | change
    dtype = torch.bfloat16 if "bf16" in change else torch.float32
    x_ND = torch.randn(4, widths[0], dtype=dtype, requires_grad=True)
    w_EFD = torch.randn(2, widths[1], widths[0], dtype=dtype, requires_grad=True)
    named = {"hidden_size": widths[0], "moe_intermediate_size": widths[1]}
    with nullcontext() if fits else pytest.raises(RuntimeError, match="16 bytes"):
        y_NF = torch._grouped_mm(x_ND, w_EFD.mT, offs=torch.tensor([2, 4], dtype=torch.int32))
        y_NF.square().sum().backward()
    with nullcontext() if fits else pytest.raises(UserError, match="set use_grouped_mm to false"):
        check_grouped_products(Path("ds.json"), tree, named)
    check_grouped_products(Path("ds.json"), {"expert_parallel": {"use_grouped_mm": False}}, named)


@pytest.mark.parametrize(("text", "message"), [("{", "not readable as JSON"), ("[]", "must hold a mapping")])
def test_what_is_no_json_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_deepspeed_json(path)


def offloading(stage: int, key: str, device: str = "cpu") -> dict[str, Any]:
    tree = deepspeed_tree(1, stage=stage)
    return tree | {"zero_optimization": {**tree["zero_optimization"], key: {"device": device}}}


@pytest.mark.parametrize(
    ("tree", "world", "experts", "message"),
    [
        (deepspeed_tree(2), 3, 4, "3 ranks cannot be split into groups of autoep_size 2"),
        (deepspeed_tree(4), 4, 6, "6 routed experts cannot be split over autoep_size 4"),
        (deepspeed_tree(0), 2, 4, "must be a positive integer"),
        (deepspeed_tree(1, stage=4), 1, 4, "stage 4 is not supported"),
        ({"zero_optimization": {"stage": 2}}, 2, 4, "expert_parallel is missing"),
        (offloading(2, "offload_param"), 1, 4, "offload_param needs ZeRO stage 3 or higher, and it is 2"),
        (offloading(0, "offload_optimizer"), 1, 4, "offload_optimizer needs ZeRO stage 1 or higher, and it is 0"),
        (offloading(3, "offload_param", "nvme"), 1, 4, "device nvme is not supported; use cpu"),
    ],
)
def test_sizes_that_do_not_fit_are_named(tree: dict[str, Any], world: int, experts: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_parallelism(Path("ds.json"), tree, world, experts)


def test_masked_experts_have_an_exchange_of_their_own() -> None:
    tree = deepspeed_tree(2)
    assert check_parallelism(Path("ds.json"), tree, 2, 4, "masked") == 2
    tree["expert_parallel"]["comm_backend"] = "deepep"
    with pytest.raises(UserError, match=r"comm_backend is deepep, but model\.expert_compute=masked .* take it out"):
        check_parallelism(Path("ds.json"), tree, 2, 4, "masked")


def test_batches_must_be_dealt_out_evenly() -> None:
    check_batches(joint_config(), 2)
    with pytest.raises(UserError, match=r"rollout\.prompts 2 is not divisible by 4 ranks; set rollout\.prompts=4,"):
        check_batches(joint_config(), 4)
    with pytest.raises(UserError, match=r"updates_per_rollout 3 does not divide the 4 responses"):
        check_batches(joint_config(policy={"updates_per_rollout": 3}), 2)


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    """Nothing that DeepSpeed reads in the expert_parallel section is refused, and no key is known that it lacks."""
    root = Path(deepspeed.__file__).parent
    source = inspect.getsource(auto_ep_config.parse_autoep_config)
    read = {part.split('"')[1] for part in source.split("param_dict.get(")[1:]}
    assert read | {"expert_w3"} == EXPERT_PARALLEL_KEYS  # that one is read by subscript
    definitions = [*root.rglob("*constants.py"), *root.rglob("*config*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in definitions)
    missing = [key for key in TOP_LEVEL_KEYS if f'"{key}"' not in text and f"'{key}'" not in text]
    assert not missing
