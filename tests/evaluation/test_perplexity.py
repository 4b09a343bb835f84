import math

import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.evaluation.perplexity import perplexity, solution_perplexity
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.tiny import tiny_student

TEXT = "The quick brown fox jumps over the lazy dog, " * 4


@pytest.fixture(scope="module")
def model():
    return tiny_student(vocabulary=len(VOCABULARY))


def test_it_equals_a_loop_that_predicts_one_token_at_a_time(model):
    tokenizer = character_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    nlls = []
    for start in (0, 16, 32):
        for place in range(1, 16):
            with torch.no_grad():
                logits_V = model(torch.tensor([ids[start : start + place]])).logits[0, -1].double()
            nlls.append(-logits_V.log_softmax(-1)[ids[start + place]].item())
    measured = perplexity(model, tokenizer, TEXT, window=16, max_windows=3, batch_size=2)
    assert measured.nll_mean_nats == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
    assert measured.value == pytest.approx(math.exp(measured.nll_mean_nats))
    assert (measured.tokens, measured.windows, measured.window) == (45, 3, 16)


def test_an_indifferent_model_has_the_perplexity_of_its_vocabulary(model):
    indifferent = tiny_student(vocabulary=len(VOCABULARY))
    torch.nn.init.zeros_(indifferent.lm_head.weight)
    measured = perplexity(indifferent, character_tokenizer(), TEXT, window=8)
    assert measured.value == pytest.approx(len(VOCABULARY), rel=1e-5)


def test_batch_size_changes_nothing(model):
    one, four = (perplexity(model, character_tokenizer(), TEXT, 16, batch_size=size) for size in (1, 4))
    assert one.nll_mean_nats == pytest.approx(four.nll_mean_nats, rel=1e-6)


def test_bad_windows_are_refused(model):
    with pytest.raises(UserError, match="at least 2"):
        perplexity(model, character_tokenizer(), TEXT, window=1)
    with pytest.raises(UserError, match="less than one window of 1000"):
        perplexity(model, character_tokenizer(), TEXT, window=1000)


def test_a_model_without_finite_logits_has_none():
    broken = tiny_student(vocabulary=len(VOCABULARY))
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(UserError, match=r"not finite \(mean loss nan nats\): .*check its weights"):
        perplexity(broken, character_tokenizer(), TEXT, window=16)
    with pytest.raises(UserError, match="not finite"):
        solution_perplexity(broken, character_tokenizer(), ["2+2="], ["4"])


def test_solutions_are_scored_as_if_each_stood_alone(model):
    tokenizer = character_tokenizer()
    prompts, solutions = ["2+2=", "a long question?"], ["4", "a long answer"]
    nlls = []
    for prompt, solution in zip(prompts, solutions, strict=True):
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = [*tokenizer(prompt + solution, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nlls += [-logprobs_TV[place - 1, ids[place]].item() for place in range(start, len(ids))]
    measured = solution_perplexity(model, tokenizer, prompts, solutions)
    assert measured.tokens == len(nlls) == len("4") + len("a long answer") + 2
    assert measured.nll_mean_nats == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
