"""What a checkpoint would like to be sampled with does not reach training or evaluation."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from padd_ds.evaluation.generate import GenerationOptions, generate_responses
from padd_ds.rollout.generation import HuggingFaceRollout, Prompts, Sampling
from padd_ds.rollout.settings import callers_settings_alone
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.tiny import tiny_student

WISHES = [{"repetition_penalty": 5.0}, {"min_p": 0.9}, {"suppress_tokens": list(range(3, 40))}]
"""Of checkpoints; each changes what the tiny model answers, where it is followed."""


def student(wishes: dict[str, Any]) -> Any:
    model = tiny_student(vocabulary=len(VOCABULARY))
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, **wishes)
    return model


def rollout(model: Any, temperature: float) -> torch.Tensor:
    engine = HuggingFaceRollout(model=model, end_token_ids=(1,), pad_token_id=0, ranks_in_step=False)
    prompts = torch.tensor([[0, 0, 9, 7, 12], [5, 8, 30, 11, 4]])
    asked = Prompts(ids_PT=prompts, mask_PT=(prompts != 0).long(), seeds=[0, 100])
    return engine.generate(asked, Sampling(group_size=4, max_new_tokens=12, temperature=temperature)).ids_BR


@pytest.mark.parametrize("wishes", WISHES, ids=lambda wishes: next(iter(wishes)))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rollout_is_that_of_a_checkpoint_without_wishes(wishes: dict[str, Any], temperature: float) -> None:
    model = student(wishes)
    before = model.generation_config.to_dict()
    assert torch.equal(rollout(model, temperature), rollout(student({}), temperature))
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("wishes", WISHES, ids=lambda wishes: next(iter(wishes)))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_so_is_what_evaluation_generates(wishes: dict[str, Any], temperature: float) -> None:
    texts = []
    for model in (student(wishes), student({})):
        torch.manual_seed(0)
        options = GenerationOptions(max_new_tokens=12, batch_size=2, temperature=temperature)
        texts.append([r.text for r in generate_responses(model, character_tokenizer(), ["3 + 4", "a"] * 3, options)])
    assert texts[0] == texts[1]


def test_the_checkpoints_settings_come_back_after_an_error() -> None:
    model = student({"repetition_penalty": 5.0})
    with pytest.raises(KeyError), callers_settings_alone(model):
        assert model.generation_config.repetition_penalty is None
        raise KeyError
    assert model.generation_config.repetition_penalty == 5.0
