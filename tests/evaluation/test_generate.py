import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig

from padd_ds.errors import UserError
from padd_ds.evaluation import generate
from padd_ds.evaluation.generate import GenerationOptions, generate_responses, read_response
from padd_ds.evaluation.rolling import SEGMENT, can_roll
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


def test_waiting_prompts_take_the_places_of_finished_responses(model, monkeypatch):
    tokenizer = character_tokenizer()
    prompts = [f"{number} + {text}" for number in range(4) for text in PROMPTS]
    long = {prompt: one_at_a_time(model, tokenizer, prompt, 40) for prompt in prompts}
    # Ends a third of the responses early.
    common = Counter(token for ids in long.values() for token in ids)
    ends = next(
        [tokenizer.eos_token_id, token] for token in common if 6 < sum(token in ids for ids in long.values()) < 18
    )
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(model, "forward", seen(model.forward, shapes))
    responses = generate_responses(model, tokenizer, prompts, options(max_new_tokens=40, batch_size=6))
    for prompt, response in zip(prompts, responses, strict=True):
        end = next((place for place, token in enumerate(long[prompt]) if token in ends), None)
        assert response.text == tokenizer.decode(long[prompt][:end], skip_special_tokens=True)
        assert (response.tokens, response.ended) == (40 if end is None else end + 1, end is not None)
    rows = [shape[0] for shape in shapes]
    assert max(rows) == 6
    # Four batches, each as long as its longest response, would take 160 passes.
    assert len(rows) < 140


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_long_responses_are_drawn_as_in_one_batch(model, monkeypatch, batch_size):
    tokenizer = character_tokenizer()
    prompts = [f"{number}{text}" for number in range(2) for text in PROMPTS]
    drawn = options(max_new_tokens=40, temperature=1.0, batch_size=batch_size)
    rolled = generate_responses(model, tokenizer, prompts, drawn)
    monkeypatch.setattr(generate, "can_roll", lambda _: False)
    assert rolled == generate_responses(model, tokenizer, prompts, replace(drawn, batch_size=12))
    assert len({response.tokens for response in rolled}) > 2


@pytest.mark.parametrize("begins", [SEGMENT - 3, SEGMENT - 1, SEGMENT, 2 * SEGMENT - 2])
def test_a_stop_text_across_the_border_of_segments_is_seen(model, begins):
    tokenizer = character_tokenizer()
    prompts = [f"{number}{text}" for number in range(4) for text in PROMPTS]
    whole = {prompt: tokenizer.decode(one_at_a_time(model, tokenizer, prompt, 40)) for prompt in prompts}
    prompt, text = next(
        (prompt, text)
        for prompt, text in whole.items()
        if len(text) == 40 and text.index(text[begins : begins + 4]) == begins
    )
    stop = (text[begins : begins + 4],)
    response = generate_responses(model, tokenizer, [prompt], options(max_new_tokens=40, stop=stop))[0]
    assert (response.text, response.tokens, response.ended) == (text[:begins], begins + 4, True)


def seen(forward, shapes):
    """`forward`, noting the shapes of what goes in."""

    @functools.wraps(forward)
    def noting(*arguments, **more):
        shapes.append(tuple(more["input_ids"].shape))
        return forward(*arguments, **more)

    return noting


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "windowed": MistralConfig(
        **SIZES, num_key_value_heads=1, vocab_size=len(VOCABULARY), sliding_window=4, eos_token_id=1
    ),
    "without position ids": BloomConfig(
        hidden_size=16, n_layer=2, n_head=2, vocab_size=len(VOCABULARY), eos_token_id=1
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_whose_cache_is_not_cut_take_whole_batches(name):
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(OTHERS[name]).eval()
    assert not can_roll(other)
    responses = generate_responses(other, tokenizer, PROMPTS, options())
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = one_at_a_time(other, tokenizer, prompt, 12)
        assert response.text == tokenizer.decode(ids, skip_special_tokens=True)


def read(text: str, **changes):
    tokenizer = character_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return read_response(ids, [tokenizer.eos_token_id], tokenizer, options(**changes))


def test_end_token_is_counted_and_what_follows_is_not():
    assert [(r.text, r.tokens, r.ended) for r in map(read, ("12<eos><pad><pad>", "123456", "<eos>"))] == [
        ("12", 3, True),
        ("123456", 6, False),
        ("", 1, True),
    ]


def test_stop_text_is_cut_off_and_ends_the_response():
    first, second = read("12\nQ:", stop=("\n",)), read("123456", stop=("\n",))
    assert (first.text, first.tokens, first.ended) == ("12", 3, True)
    assert (second.text, second.ended) == ("123456", False)


def test_every_end_token_of_the_checkpoint_ends_a_response(model, monkeypatch):
    tokenizer = character_tokenizer()
    whole = one_at_a_time(model, tokenizer, "3 + 4", 12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, whole[3]])
    first = whole.index(whole[3])
    response = generate_responses(model, tokenizer, ["3 + 4"], options())[0]
    assert (response.tokens, response.ended) == (first + 1, True)
    assert response.text == tokenizer.decode(whole[:first], skip_special_tokens=True)


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
