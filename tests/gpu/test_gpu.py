"""The path on one GPU (`make test-gpu`): every ZeRO stage beside the CPU, bf16, resume, export."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from padd_ds import convert
from tests.train_inputs import REPOSITORY, make_inputs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LEARNING = {"micro_batch_size": 2, "optimizer": {"learning_rate": 1e-3}, "steps": 3}
WARMUP = LEARNING | {"stage": "warmup", "warmup": {"batch_size": 4}}
FIELDS = {"solution": "question"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for any run, but with a student that the teacher was converted to."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    converted(folder / "teacher", folder / "converted", "cpu")
    return folder


def weights(model: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(model).state_dict()


def converted(teacher: Path, output: Path, device: str) -> dict[str, torch.Tensor]:
    text = output.with_suffix(".txt")
    text.write_text("".join(f"{a} plus {b} is {a + b}\n" for a in range(40) for b in range(40)))
    sizes = ["--experts", "8", "--top-k", "4", "--calibration", str(text), "--calibration-tokens", "4096"]
    convert.main(["--teacher", str(teacher), "--output", str(output), "--device", device, *sizes])
    return weights(output)


def gpu_tree(name: str) -> dict[str, Any]:
    """A JSON of ds_configs/ for this one GPU."""
    tree: dict[str, Any] = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    tree["expert_parallel"]["autoep_size"] = 1
    return tree


def fp32_tree(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": 1, "use_grouped_mm": False},
    }


def started(
    inputs: Path, folder: Path, tree: dict[str, Any], *options: str, device: str = "cuda", **settings: Any
) -> list[dict[str, Any]]:
    """The metrics of a run in `folder`; AssertionError with its last words if it fails."""
    folder.mkdir(exist_ok=True)
    (folder / "deepspeed.json").write_text(json.dumps(tree))
    run = yaml.safe_load((inputs / "run.yaml").read_text())
    run |= {"run_dir": str(folder / "run"), "deepspeed": str(folder / "deepspeed.json"), **settings}
    run["model"] = {
        "student": str(inputs / "converted"),
        "teacher": str(inputs / "teacher"),
        **settings.get("model", {}),
    }
    run["data"] = {"source": str(inputs / "data.jsonl"), "part": "all", "fields": FIELDS}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    environment |= {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    command = [sys.executable, "padd_ds/train.py", "--config", str(folder / "run.yaml"), *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def exported(folder: Path) -> Path:
    command = [sys.executable, "-m", "padd_ds.export", "--run", str(folder / "run"), "--output", str(folder / "model")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "model"


@pytest.fixture(scope="module")
def on_the_cpu(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return started(inputs, tmp_path_factory.mktemp("cpu"), fp32_tree(2), device="cpu", **WARMUP)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_in_fp32_are_those_of_the_cpu(
    stage: int, inputs: Path, tmp_path: Path, on_the_cpu: list[dict[str, Any]]
) -> None:
    for here, there in zip(started(inputs, tmp_path, fp32_tree(stage), **WARMUP), on_the_cpu, strict=True):
        for name in ("loss_lm", "loss_kd", "loss_init"):
            assert here[name] == pytest.approx(there[name], rel=1e-4), name


@pytest.mark.parametrize("name", ["gpu_zero2_ep1", "gpu_zero3_ep8", "gpu_zero3_ep8_offload"])
@pytest.mark.parametrize("stage", ["warmup", "joint"])
def test_bf16_learns_and_its_export_is_what_was_trained(name: str, stage: str, inputs: Path, tmp_path: Path) -> None:
    metrics = started(inputs, tmp_path, gpu_tree(name), **(WARMUP if stage == "warmup" else LEARNING))
    assert len(metrics) == 3
    before, after = weights(inputs / "converted"), weights(exported(tmp_path))
    assert before.keys() == after.keys()
    experts = [name for name in after if ".experts." in name]
    assert all(not torch.equal(after[name], before[name].to(after[name].dtype)) for name in experts)


def test_bf16_is_near_fp32(inputs: Path, tmp_path: Path, on_the_cpu: list[dict[str, Any]]) -> None:
    first = started(inputs, tmp_path, gpu_tree("gpu_zero2_ep1"), **WARMUP)[0]
    for name in ("loss_lm", "loss_kd"):
        assert first[name] == pytest.approx(on_the_cpu[0][name], rel=0.02), name


@pytest.mark.parametrize("stage", ["warmup", "joint"])
def test_a_resumed_run_continues_the_losses(stage: str, inputs: Path, tmp_path: Path) -> None:
    settings = WARMUP if stage == "warmup" else LEARNING
    tree = gpu_tree("gpu_zero2_ep1")
    whole = started(inputs, tmp_path / "whole", tree, **settings)
    started(inputs, tmp_path / "halved", tree, **settings | {"steps": 1})
    halved = started(inputs, tmp_path / "halved", tree, "--resume", **settings)
    names = ("loss_lm", "loss_kd") if stage == "warmup" else ("loss_kd", "response_tokens", "router_entropy_nats")
    for name in names:
        assert [step[name] for step in halved] == pytest.approx([step[name] for step in whole], rel=1e-3), name


def test_a_dense_teacher_is_tuned(inputs: Path, tmp_path: Path) -> None:
    tree = gpu_tree("gpu_zero2_ep1")
    model = {"student": str(inputs / "teacher"), "teacher": None}
    assert len(started(inputs, tmp_path, tree, **LEARNING | {"stage": "teacher_grpo", "model": model})) == 3


@pytest.mark.parametrize(
    "option", ["activation_checkpointing=true", "model.expert_compute=masked", "model.teacher_placement=sharded"]
)
def test_options_run(option: str, inputs: Path, tmp_path: Path) -> None:
    assert len(started(inputs, tmp_path, gpu_tree("gpu_zero2_ep1"), option, **LEARNING)) == 3


def test_a_conversion_is_that_of_the_cpu(inputs: Path, tmp_path: Path) -> None:
    by_cpu, by_gpu = (converted(inputs / "teacher", tmp_path / device, device) for device in ("cpu", "cuda"))
    assert by_cpu.keys() == by_gpu.keys()
    for name in by_cpu:
        torch.testing.assert_close(
            by_gpu[name], by_cpu[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


ATTENTION = """
import torch
from padd_ds.engine.ranks import start_ranks, stop_ranks
device = start_ranks().device
for length in range(32, 321, 32):
    # Every score is -120: what is padded within a kernel must not count as 0.
    q, k, v = (torch.full((1, 1, length, 64), 0.1, device=device, dtype=torch.bfloat16) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -120 * 64**0.5
    q.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    assert q.grad.isfinite().all(), length
stop_ranks()
"""


def test_masked_attention_has_finite_gradients_at_every_length() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", ATTENTION], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
