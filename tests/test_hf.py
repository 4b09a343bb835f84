"""What is told of a hub's model that is not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from padd_ds.conversion.teacher import local_folder
from padd_ds.errors import UserError
from padd_ds.hf import load_tokenizer, offline_remedy, read_config


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
