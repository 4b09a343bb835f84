"""A random checkpoint is one that transformers loads whole."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tools.random_checkpoint import SHAPES, write_checkpoint


def test_it_loads_without_a_tensor_missing_or_left_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", SHAPES["tiny"], torch.bfloat16, seed=0)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
