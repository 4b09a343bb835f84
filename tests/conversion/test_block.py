"""A layer on its own computes what it computes in its model; so does the head in pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from padd_ds.conversion import head
from padd_ds.conversion.block import Block, load_block
from padd_ds.conversion.head import Head
from tests.conversion.tiny_teachers import make_teacher

WINDOWS_BT = torch.arange(18 * 24).view(18, 24) * 37 % 256


def block_of(folder: Path, config: Any, layer: int, dtype: torch.dtype = torch.float32) -> Block:
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{layer}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return load_block(config, layer, inside, tensors["model.norm.weight"], dtype, "cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make_teacher(tmp_path_factory.mktemp("qwen") / "teacher", "qwen3", num_hidden_layers=3)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_blocks_after_each_other_are_the_model(qwen: tuple[Path, Any]) -> None:
    folder, model = qwen
    states_BTD = model.model.embed_tokens(WINDOWS_BT)
    expected = model.model(WINDOWS_BT, output_hidden_states=True).hidden_states
    for layer in range(3):
        block = block_of(folder, model.config, layer)
        after_BTD, x_BTD = block.attend(states_BTD)
        states_BTD = block.forward(states_BTD)
        assert torch.equal(after_BTD + block.feed(x_BTD), states_BTD)
        if layer < 2:
            assert torch.allclose(states_BTD, expected[layer + 1], rtol=1e-5, atol=1e-5)
    assert torch.allclose(block.normalise(states_BTD, None), expected[3], rtol=1e-5, atol=1e-5)


def test_rounding_a_block_keeps_its_buffers(qwen: tuple[Path, Any]) -> None:
    folder, model = qwen
    states_BTD = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    rounded = block_of(folder, model.config, 1, torch.bfloat16).cast(torch.float32).forward(states_BTD)
    assert torch.equal(
        block_of(folder, model.config, 1).cast(torch.bfloat16).cast(torch.float32).forward(states_BTD), rounded
    )
    assert not torch.allclose(block_of(folder, model.config, 1).forward(states_BTD), rounded, rtol=1e-4)


@pytest.mark.parametrize("change", [{"drop": "mlp.up_proj.weight"}, {"add": "mlp.gate.weight"}])
def test_tensor_too_few_or_too_many_is_refused(qwen: tuple[Path, Any], change: dict[str, str]) -> None:
    folder, model = qwen
    tensors = load_file(folder / "model.safetensors")
    inside = {name[len("model.layers.0.") :]: t for name, t in tensors.items() if name.startswith("model.layers.0.")}
    inside.pop(change.get("drop", ""), None)
    inside.update({name: torch.zeros(2, 2) for name in [change.get("add")] if name})
    with pytest.raises(RuntimeError, match=next(iter(change.values()))):
        load_block(model.config, 0, inside, tensors["model.norm.weight"], torch.float32, "cpu")


@pytest.mark.parametrize("rows", [1000, 100, 7])
def test_head_in_pieces_gives_logits_and_likelihood(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(head, "ROWS_AT_A_TIME", rows)
    monkeypatch.setattr(head, "TOKENS_AT_A_TIME", 17)
    generator = torch.Generator().manual_seed(0)
    head_VD, states_BTD = torch.randn(260, 8, generator=generator), torch.randn(18, 24, 8, generator=generator)
    pieces = Head(lambda start, stop: head_VD[start:stop], 260, "cpu")
    logits_BTV = states_BTD @ head_VD.T
    assert torch.allclose(pieces.logits(states_BTD), logits_BTV, rtol=1e-5, atol=1e-5)
    expected = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), WINDOWS_BT[:, 1:].flatten())
    assert pieces.nll_mean_nats(states_BTD, WINDOWS_BT) == pytest.approx(float(expected), rel=1e-5)
