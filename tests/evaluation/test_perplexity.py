import math

import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.evaluation.perplexity import perplexity
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
