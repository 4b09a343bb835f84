"""Models and tokenizers, and what is told of those that cannot be read or are not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from padd_ds.conversion.teacher import local_folder
from padd_ds.errors import UserError
from padd_ds.hf import load_tokenizer, offline_remedy, read_config
from tests.tiny import tiny_student
from tools.tiny_model import make_tokenizer


@pytest.mark.parametrize("load", [read_config, load_tokenizer, local_folder])
def test_a_model_that_is_not_in_the_cache_is_told_with_why_nothing_was_downloaded(load: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match=r"^owner/none: .*; HF_HUB_OFFLINE=1 .*`hf download owner/none` before"):
        load("owner/none")


def test_nothing_is_added_where_downloads_would_not_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert offline_remedy("owner/none", OSError())
    assert not offline_remedy(str(tmp_path), OSError())
    assert not offline_remedy("owner/none", ValueError())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not offline_remedy("owner/none", OSError())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (None, "config.json holds no JSON object"),
        ({"hidden_size": "abc"}, "field 'hidden_size': TypeError: .* expected int, got str"),
        ({"dtype": "none"}, "no attribute 'none'"),
    ],
)
def test_a_config_that_is_none_is_told_in_one_line(tmp_path: Path, change: dict[str, str] | None, told: str) -> None:
    tiny_student().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([] if change is None else config | change), encoding="utf-8")
    with pytest.raises(UserError, match=f"{tmp_path}: no readable model config .*{told}") as raised:
        read_config(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_the_home_folder_has_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert load_tokenizer("~/model").get_vocab() == make_tokenizer().get_vocab()
