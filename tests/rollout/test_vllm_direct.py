"""Weights past a model's loader: recorded from one loading, and only where nothing is repacked."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from padd_ds.rollout.vllm.direct import Recorder
from padd_ds.rollout.vllm.exchange import WeightBoard

Loader = Callable[[nn.Module, dict[str, torch.Tensor]], None]


class Computing(nn.Module):
    """Two experts' gates and ups in one parameter, as servers fuse them, a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(2, 6, 4), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2), requires_grad=False)


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"{expert}.{part}" for expert in range(2) for part in ("gate", "up")]
    tensors = {name: torch.randn(3, 4, generator=generator) for name in names}
    return tensors | {"norm": torch.randn(4, generator=generator), "bias": torch.randn(2, generator=generator)}


def load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Fused into a tensor of its own first, which then goes over; the bias at once."""
    fused, norm = torch.empty(2, 6, 4), torch.empty(4, dtype=torch.bfloat16)
    for name, tensor in tensors.items():
        if name == "bias":
            model.bias.data.copy_(tensor)
        elif name == "norm":
            norm.copy_(tensor)
        else:
            expert, part = name.split(".")
            fused[int(expert)].narrow(0, 0 if part == "gate" else 3, 3).copy_(tensor)
    fused.copy_(fused)
    model.fused.data.copy_(fused)
    model.norm.data.copy_(norm)


def load_repacked(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    load(model, tensors)
    model.fused.data.copy_(model.fused.flip(-1))


def load_in_part(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """One up projection comes by a way that is no copy from the file."""
    load(model, tensors | {"1.up": tensors["1.up"] * 1})


def load_nothing(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Its zeros are no weights."""


def recorded(board: WeightBoard, model: nn.Module, loader: Loader) -> Recorder:
    recorder = Recorder(model)
    with recorder:
        loader(model, dict(recorder.read(board.parts)))
    return recorder


def write(board: WeightBoard, tensors: dict[str, torch.Tensor]) -> None:
    board.write("experts", {name: tensor for name, tensor in tensors.items() if "." in name})
    board.write("rest", {name: tensor for name, tensor in tensors.items() if "." not in name})


def test_further_weights_go_where_the_loader_puts_them(tmp_path: Path) -> None:
    board, model, expected = WeightBoard(tmp_path, 0), Computing(), Computing()
    write(board, checkpoint(1))
    recorder = recorded(board, model, load)
    assert recorder.not_as_in_files() == []
    write(board, checkpoint(2))
    recorder.plan().apply(board.parts)
    load(expected, checkpoint(2))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


@pytest.mark.parametrize("loader", [load_repacked, load_in_part, load_nothing])
def test_what_does_not_come_straight_from_the_files_is_named(tmp_path: Path, loader: Loader) -> None:
    board = WeightBoard(tmp_path, 0)
    write(board, checkpoint(1))
    named = recorded(board, Computing(), loader).not_as_in_files()
    assert named == (["fused", "norm", "bias"] if loader is load_nothing else ["fused"])


def test_what_pads_a_parameter_is_zero_again(tmp_path: Path) -> None:
    board, model = WeightBoard(tmp_path, 0), nn.Module()
    model.bias = nn.Parameter(torch.zeros(5), requires_grad=False)
    board.write("rest", {"bias": torch.tensor([1.0, 2.0])})
    recorder = Recorder(model)
    with recorder:
        model.bias.data[:2].copy_(dict(recorder.read(board.parts))["bias"])
    assert recorder.not_as_in_files() == []
    plan = recorder.plan()
    model.bias.data[4] = 1
    assert recorder.not_as_in_files() == ["bias"]
    board.write("rest", {"bias": torch.tensor([3.0, 4.0])})
    plan.apply(board.parts)
    assert model.bias.tolist() == [3, 4, 0, 0, 0]


def test_a_tensor_beside_the_parameters_is_named(tmp_path: Path) -> None:
    board, model = WeightBoard(tmp_path, 0), Computing()
    model.register_buffer("scale", torch.zeros(2))
    write(board, checkpoint(1))

    def loader(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        load(model, tensors)
        model.scale.copy_(tensors["bias"])

    assert recorded(board, model, loader).not_as_in_files() == ["what was loaded beside the parameters"]


def test_weights_of_another_layout_do_not_fit(tmp_path: Path) -> None:
    board, model = WeightBoard(tmp_path / "one", 0), Computing()
    write(board, checkpoint(1))
    plan = recorded(board, model, load).plan()
    assert plan.fits(board.parts)
    # As many bytes, by other names.
    other = WeightBoard(tmp_path / "other", 0)
    write(other, {name.replace("1.gate", "2.gate"): tensor for name, tensor in checkpoint(1).items()})
    assert not plan.fits(other.parts)
