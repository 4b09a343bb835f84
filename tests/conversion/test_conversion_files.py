"""Files that a conversion reads and writes: calibration data, shards, targets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from padd_ds.conversion.calibration import PADDING, TextFile, token_rows, token_windows
from padd_ds.conversion.families import layer_map
from padd_ds.conversion.targets import (
    FILE_NAME,
    LayerTargets,
    load_targets,
    save_targets,
)
from padd_ds.conversion.writer import write_index, write_shard
from padd_ds.data.problems import Problem
from padd_ds.data.split import DEFAULT_FRACTIONS, split_problems
from padd_ds.errors import UserError
from tests.conversion.tiny_teachers import byte_tokenizer


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_rows_are_questions_in_their_template_with_their_solutions(tmp_path: Path) -> None:
    records = [{"question": "1+1?", "answer": 2}, {"question": "q", "answer": "abc"}]
    path = write_records(tmp_path / "data.jsonl", records)
    tokenizer = byte_tokenizer()
    file = TextFile(path=path, field="question,answer", template="Q: {question} ")
    rows_WT = token_rows(file, "--tokens", tokenizer, 17)
    assert [tokenizer.decode(row[row != PADDING]) for row in rows_WT] == ["Q: 1+1? 2</s>", "Q: q ab"]
    assert (rows_WT != PADDING).sum() == 17


def test_absent_field_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_records(tmp_path / "data.jsonl", [{"text": "a"}, {"question": "b"}])
    with pytest.raises(UserError, match=r"data.jsonl, line 2: no field text \(there: question\)"):
        list(TextFile(path=path).read(byte_tokenizer()))


def test_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(UserError, match="line 3: not JSON"):
        list(TextFile(path=path).read(byte_tokenizer()))


def test_windows_hold_the_first_tokens_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("abcdefgh" * 100, encoding="utf-8")
    tokenizer = byte_tokenizer()
    windows_WT = token_windows(TextFile(path=path), "--tokens", tokenizer, 600)
    assert windows_WT.shape == (2, 256)
    assert tokenizer.decode(windows_WT.flatten()) == "abcdefgh" * 64


def test_records_are_separated_by_the_end_token(tmp_path: Path) -> None:
    path = write_records(tmp_path / "data.jsonl", [{"text": "ab"}, {"text": "c"}])
    tokenizer = byte_tokenizer()
    windows_WT = token_windows(TextFile(path=path), "--tokens", tokenizer, 5)
    assert tokenizer.decode(windows_WT[0]) == "ab</s>c</s>"


@pytest.mark.parametrize("text", ["", "short"])
def test_file_with_too_few_tokens_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"data.txt: holds {len(text)} tokens, and --calibration-tokens asks for 100"):
        token_windows(TextFile(path=path), "--calibration-tokens", byte_tokenizer(), 100)


def test_a_part_holds_the_questions_that_training_leaves_out(tmp_path: Path) -> None:
    problems = [Problem(question=f"{number} + {number}?", answer=str(2 * number)) for number in range(100)]
    records = [{"q": problem.question, "a": problem.answer} for problem in problems]
    path = write_records(tmp_path / "data.jsonl", records)
    for fractions in (None, {"A": 0.5, "B": 0.0, "C": 0.4, "D": 0.1}):
        parts = split_problems(problems, fractions or DEFAULT_FRACTIONS).parts
        for part in ("A", "C"):
            file = TextFile(path=path, field="q,a", part=part, fractions=fractions)
            assert list(file.read(byte_tokenizer())) == [f"{p.question}{p.answer}" for p in parts[part]]


def test_shards_are_named_finally_from_the_start_and_indexed(tmp_path: Path) -> None:
    shards = [{"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}, {"c": torch.arange(5)}]
    for number, tensors in enumerate(shards, start=1):
        write_shard(tmp_path, number, 2, tensors)
    write_index(tmp_path, 2)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 4 + 2 * 2 + 5 * 8
    for name, tensor in {**shards[0], **shards[1]}.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_layer_map_follows_the_paper() -> None:
    assert layer_map(4, 4) == [0, 1, 2, 3]
    assert layer_map(4, 6) == [0, 1, 3, 4]
    assert layer_map(6, 4) == [0, 0, 1, 2, 2, 3]


def example_layer(prior: bool) -> LayerTargets:
    return LayerTargets(
        assignment_F=torch.tensor([0, 1, 2, 1, 0, 2]),
        centroids_EC=torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
        activation_mean_E=torch.tensor([0.5, 1.5]) if prior else None,
        expert_prior_E=torch.tensor([0.25, 0.75]) if prior else None,
    )


@pytest.mark.parametrize("prior", [True, False])
def test_targets_come_back_as_they_were_saved(tmp_path: Path, prior: bool) -> None:
    layers = [example_layer(prior), example_layer(prior)]
    save_targets(tmp_path, layers, [0, 1], prior_temperature=0.3, cluster="weights", router="random")
    targets = load_targets(tmp_path)
    assert targets.assignment_LF.tolist() == [[0, 1, 2, 1, 0, 2]] * 2
    assert targets.assignment_LF.dtype == torch.int32
    assert torch.equal(targets.centroids[1], layers[1].centroids_EC)
    assert (targets.prior_temperature, targets.cluster, targets.router) == (0.3, "weights", "random")
    assert targets.layer_map_L.tolist() == [0, 1]
    if prior:
        assert targets.expert_prior_LE is not None
        assert targets.expert_prior_LE.tolist() == [[0.25, 0.75]] * 2
    else:
        assert targets.expert_prior_LE is None


def test_absent_targets_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"padd_targets.safetensors: no such file"):
        load_targets(tmp_path)


def test_truncated_targets_are_named(tmp_path: Path) -> None:
    save_targets(tmp_path, [example_layer(True)], [0], prior_temperature=0.3, cluster="weights", router="random")
    whole = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole[:-10])
    with pytest.raises(UserError, match="damaged"):
        load_targets(tmp_path)
