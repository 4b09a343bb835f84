import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.evaluation.generate import GenerationOptions, generate_responses
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.tiny import tiny_student

PROMPTS = ["3 + 4", "What is 12 - 5?", "a", "The sum of 1, 2 and 3 is", "x = 9 *", "3 + 4"]


@pytest.fixture(scope="module")
def model():
    return tiny_student(vocabulary=len(VOCABULARY))


def options(**changes):
    return GenerationOptions(**{"max_new_tokens": 12, "batch_size": 4} | changes)


def one_at_a_time(model, tokenizer, prompt, max_new_tokens):
    """Greedy decoding without cache, padding or batch."""
    ids, generated = tokenizer(prompt, add_special_tokens=False).input_ids, []
    while len(generated) < max_new_tokens and (not generated or generated[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            generated.append(model(torch.tensor([ids + generated])).logits[0, -1].argmax().item())
    return generated


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_batches_give_what_a_direct_loop_gives_in_the_order_of_the_prompts(model, batch_size):
    tokenizer = character_tokenizer()
    responses = generate_responses(model, tokenizer, PROMPTS, options(batch_size=batch_size))
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = one_at_a_time(model, tokenizer, prompt, 12)
        ended = ids[-1] == tokenizer.eos_token_id
        assert response.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert (response.tokens, response.ended) == (len(ids), ended)


class Scripted(torch.nn.Module):
    """Stands in for a model whose every response is `script`, padded as `generate` pads."""

    def __init__(self, script: list[list[int]], eos: int | list[int] = 1) -> None:
        super().__init__()
        self.script, self.device = script, torch.device("cpu")
        self.config = type("Config", (), {"max_position_embeddings": 64})
        self.generation_config = type("Generation", (), {"eos_token_id": eos})

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor(self.script)], dim=1)


def scripted(text: str, tokenizer, width: int) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids + [tokenizer.pad_token_id] * (width - len(ids))


def test_end_token_is_counted_and_what_follows_is_not():
    tokenizer = character_tokenizer()
    model = Scripted([scripted(text, tokenizer, 6) for text in ("12<eos>", "123456", "<eos>")])
    responses = generate_responses(model, tokenizer, ["a", "b", "c"], options(max_new_tokens=6))
    assert [response.text for response in responses] == ["12", "123456", ""]
    assert [(response.tokens, response.ended) for response in responses] == [(3, True), (6, False), (1, True)]


def test_every_end_token_of_the_checkpoint_ends_a_response():
    tokenizer = character_tokenizer()
    other = tokenizer("~", add_special_tokens=False).input_ids[0]
    model = Scripted([scripted("12~", tokenizer, 4)], eos=[1, other])
    assert generate_responses(model, tokenizer, ["a"], options())[0].text == "12"


def test_stop_text_is_cut_off_and_ends_the_response():
    tokenizer = character_tokenizer()
    model = Scripted([scripted("12\nQ:", tokenizer, 6), scripted("123456", tokenizer, 6)])
    first, second = generate_responses(model, tokenizer, ["a", "b"], options(stop=("\n",)))
    assert (first.text, first.tokens, first.ended) == ("12", 3, True)
    assert (second.text, second.ended) == ("123456", False)


def test_stop_text_really_stops_generation(model):
    tokenizer = character_tokenizer()
    whole = generate_responses(model, tokenizer, ["3 + 4"], options())[0].text
    stop = whole[4:6]
    stopped = generate_responses(model, tokenizer, ["3 + 4"], options(stop=(stop,)))[0]
    assert stopped.ended
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.tokens == whole.index(stop) + 2


def test_prompts_that_do_not_fit_are_named_before_any_work(model):
    tokenizer = character_tokenizer()
    with pytest.raises(UserError, match="problem 2 has 120 prompt tokens"):
        generate_responses(model, tokenizer, ["a", "b" * 120], options())
    with pytest.raises(UserError, match="no tokens"):
        generate_responses(model, tokenizer, ["a", ""], options())


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 0}, {"batch_size": 0}, {"stop": ("",)}, {"temperature": -1.0}, {"top_p": 0.0}]
)
def test_bad_options_are_refused(change):
    with pytest.raises(UserError):
        options(**change)
