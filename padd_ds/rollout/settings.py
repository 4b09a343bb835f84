"""Generation by the caller's settings alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig


@contextmanager
def callers_settings_alone(model: Any) -> Iterator[None]:
    """Inside the block `model.generate` does not read the checkpoint's generation_config.

    transformers takes each setting that the caller leaves out (repetition_penalty, min_p, suppress_tokens, ...) from
    there, even where the caller passes a GenerationConfig. So the caller must give end and pad tokens too.
    """
    checkpoints = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = checkpoints
