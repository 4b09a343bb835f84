"""Routing on worked solutions: against one text at a time, and between checkpoints."""

import copy

import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.evaluation.routing import find_routers, measure_routing
from tests.tiny import tiny_student
from tools.tiny_model import make_tiny_model, make_tokenizer

PROMPTS = ["1 plus 2?", "gcd 12 18?", "7 mod 3?"]
SOLUTIONS = ["1+2=3#3", "6,0#6", "#1"]
SUBJECTS = ["addition", "gcd", "modulo"]


@pytest.fixture
def model():
    return tiny_student(vocabulary=len(make_tokenizer()))


def measured(model, other=None, batch_size=2, subjects=SUBJECTS):
    return measure_routing(model, make_tokenizer(), PROMPTS, SOLUTIONS, subjects, other, batch_size)


@torch.no_grad()
def lone_choices(model):
    """[texts][layers]: chosen experts [T, K], every text run alone and without padding."""
    tokenizer, found = make_tokenizer(), []
    for prompt, solution in zip(PROMPTS, SOLUTIONS, strict=True):
        ids = tokenizer(prompt).input_ids + tokenizer(solution).input_ids + [tokenizer.eos_token_id]
        states = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        layers = []
        for layer, hidden in zip(model.model.layers, states, strict=False):
            attended = layer.self_attn(
                layer.input_layernorm(hidden),
                attention_mask=None,
                position_embeddings=model.model.rotary_emb(hidden, torch.arange(len(ids))[None]),
            )[0]
            x = layer.post_attention_layernorm(hidden + attended)[0]
            layers.append((x @ layer.mlp.gate.weight.T).sigmoid().topk(layer.mlp.gate.top_k).indices)
        found.append(layers)
    return found


def test_load_is_that_of_texts_run_alone(model):
    choices = lone_choices(model)
    result = measured(model)
    assert result.tokens == sum(len(layers[0]) for layers in choices)
    for layer in range(2):
        counts = torch.bincount(torch.cat([layers[layer].flatten() for layers in choices]), minlength=4)
        assert result.load_share_by_layer[layer] == pytest.approx((counts / counts.sum()).tolist(), abs=1e-6)


def test_batches_change_nothing(model):
    one, three = measured(model, batch_size=1), measured(model, batch_size=3)
    assert one.nmi == pytest.approx(three.nmi, abs=1e-9)
    assert one.load_share_by_layer == three.load_share_by_layer
    assert one.entropy_nats == pytest.approx(three.entropy_nats, abs=1e-6)


def test_an_unchanged_router_has_neither_shift_nor_flips(model):
    result = measured(model, copy.deepcopy(model))
    assert (result.shift, result.flips) == (0.0, 0.0)
    assert sum(result.shift_counts) == result.tokens


def test_a_changed_router_shifts(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for router in find_routers(other):
            router.gate.weight.neg_()
    result = measured(model, other)
    assert result.shift > 0.01 and result.flips > 0.1


def test_a_bias_flips_choices_without_a_shift(model):
    other = copy.deepcopy(model)
    for router in find_routers(other)[1:]:
        router.gate.e_score_correction_bias[0] += 10
    result = measured(model, other)
    assert result.shift == pytest.approx(0.0, abs=1e-7)
    assert result.flips > 0


def test_without_subjects_there_is_no_specialisation(model):
    result = measured(model, subjects=[None] * 3)
    assert result.nmi is None and result.esi_nats is None and result.nmi_by_layer == []


def test_dense_models_and_other_shapes_are_refused(model):
    with pytest.raises(UserError, match="routing of a qwen3 cannot be measured"):
        measured(make_tiny_model())
    with pytest.raises(UserError, match="differ in layers or experts"):
        measured(model, tiny_student(n_experts=6, vocabulary=len(make_tokenizer())))
