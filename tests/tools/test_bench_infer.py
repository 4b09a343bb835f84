"""The benchmark of inference: its figures, and one run of tiny models."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.planning.shape import shape_of
from tests.tiny import tiny_student
from tools import bench_infer
from tools.bench_infer import Load, Seconds, bytes_per_token, flops_per_token, measure, table, take_turns
from tools.tiny_model import make_tiny_model, make_tokenizer

ONE = Load(batch=2, prompt_tokens=6, new_tokens=4)


def student() -> Any:
    return tiny_student(vocabulary=len(make_tokenizer()))


def test_speeds_are_those_of_the_same_turn() -> None:
    shapes = {"student": shape_of(student().config, ""), "teacher": shape_of(make_tiny_model().config, "")}
    ours = Seconds(prefill=[1.0, 2.0, 3.0], decode=[4.0, 8.0, 12.0])
    theirs = Seconds(prefill=[2.0, 4.0, 6.0], decode=[1.0, 2.0, 3.0])
    rows = table([ONE], [{"student": ours, "teacher": theirs}], shapes, 4).splitlines()[2:]
    assert rows[0].startswith("| 2 | prefill | 2.00 (2.00 to 2.00) | ")
    assert rows[1].startswith("| 2 | decode | 0.25 (0.25 to 0.25) | ")


def test_operations_and_bytes_are_those_of_a_count_by_hand() -> None:
    model = student()
    shape, config = shape_of(model.config, ""), model.config
    named = dict(model.named_parameters())
    table_size = named["model.embed_tokens.weight"].numel()
    routed = sum(value.numel() for name, value in named.items() if ".mlp.experts." in name)
    read = sum(value.numel() for value in named.values()) - table_size - routed
    active = read + routed * config.num_experts_per_tok // config.n_routed_experts
    vectors = sum(value.numel() for value in named.values() if value.dim() == 1)
    attention = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim
    assert flops_per_token(shape, ONE, "decode") == 2 * (active - vectors) + attention * 8
    without_head = active - vectors - table_size * 5 / 6
    assert flops_per_token(shape, ONE, "prefill") == pytest.approx(2 * without_head + attention * 6)
    # Two tokens with two of four experts each miss a quarter of them.
    caches = 2 * 8 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert bytes_per_token(shape, ONE, "decode", 4) == pytest.approx(4 * (read + 0.75 * routed + caches) / 2)


def test_decoding_goes_on_behind_the_prompt() -> None:
    model, seen = student(), []
    model.register_forward_hook(
        lambda module, inputs, named, output: seen.append((named["input_ids"].shape[1], output.logits[:, -1])),
        with_kwargs=True,
    )
    ids_BT = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(1))
    prefill_s, decode_s = measure(model, ids_BT, 6)
    assert prefill_s > 0 and decode_s > 0 and [length for length, _ in seen] == [6, 1, 1, 1, 1]
    with torch.no_grad():
        torch.testing.assert_close(seen[-1][1], model(input_ids=ids_BT).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_the_first_turn_warms_up() -> None:
    taken = take_turns({"student": student(), "teacher": make_tiny_model()}, ONE, 64, turns=3)
    assert all(len(one.prefill) == len(one.decode) == 3 for one in taken.values())


def test_a_run_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (("student", student()), ("teacher", make_tiny_model())):
        model.save_pretrained(tmp_path / name)
    command = ["bench_infer.py", "--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    command += ["--batch-sizes", "1", "3", "--prompt-tokens", "5", "--new-tokens", "2", "--turns", "2"]
    monkeypatch.setattr(bench_infer, "memory_of", {"student": 30.0, "teacher": 20.0}.__getitem__)
    monkeypatch.setattr(sys, "argv", [*command, "--experts", "eager"])
    bench_infer.main()
    told = capsys.readouterr().out
    assert [told.count(f"| {batch} | {phase} |") for batch in (1, 3) for phase in ("prefill", "decode")] == [1] * 4
    assert "peak memory: student 30 MiB, teacher 20 MiB (1.50)" in told and "load average" in told
    monkeypatch.setattr(sys, "argv", [*command, "--only", "teacher"])
    bench_infer.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) > 0
    monkeypatch.setattr(sys, "argv", [*command, "--new-tokens", "500"])
    with pytest.raises(UserError, match=r"student: prompt and new tokens are 505, its context 128; lower"):
        bench_infer.main()
    monkeypatch.setattr(sys, "argv", [*command, "--experts", "magic"])
    with pytest.raises(UserError, match="--experts magic: transformers has no such way"):
        bench_infer.main()
