"""The whole analysis, on planted routings and on every family."""

import copy
from math import log

import pytest
import torch

from padd_ds.conversion.targets import ConversionTargets
from padd_ds.errors import UserError
from padd_ds.evaluation.clusters import TeacherClusters
from padd_ds.evaluation.routers import find_routers
from padd_ds.evaluation.routing import Text
from padd_ds.evaluation.routing_analysis import analyse_routing, changes_since, check_alike, coactivation
from tests.evaluation.routed_models import FAMILIES, routed_model
from tests.tiny import tiny_student
from tools.tiny_model import make_tiny_model, make_tokenizer

TOKENIZER = make_tokenizer()
LETTERS = ("aaaa", "bbbb", "cccc", "dddd")
TEXT = Text(
    prompts=[letters[:length] for letters in LETTERS for length in (2, 3, 4)],
    solutions=[""] * 12,
    subjects=[letters[0] for letters in LETTERS for _ in range(3)],
)


def planted_model(family: str = "qwen3_moe"):
    """Every token's expert in every layer is that of its letter; the end token goes with the letter a."""
    model = routed_model(family, len(TOKENIZER), num_experts_per_tok=1)
    with torch.no_grad():
        for parameter in model.base_model.layers.parameters():
            parameter.zero_() if parameter.dim() > 1 else None
        embedding = model.get_input_embeddings().weight.zero_()
        for place, letter in enumerate("abcd"):
            embedding[TOKENIZER(letter).input_ids[0], place] = 1.0
        embedding[TOKENIZER.eos_token_id, 0] = 1.0
        for router in find_routers(model):
            router.gate.weight.copy_(torch.eye(4, 32))
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_a_planted_routing_gives_what_follows_by_hand(family):
    found = analyse_routing(planted_model(family), TOKENIZER, TEXT, batch_size=5)
    # Nine letters and three ends of text per subject; ends go to the expert of a.
    shares = found["specialisation"]["share_by_subject"]
    assert shares["a"] == [[1, 0, 0, 0]] * 2
    assert shares["b"] == [[0.25, 0.75, 0, 0]] * 2
    # P(a) = (1 + 3/4) / 4 = 7/16, each other 3/16; H(E|C) = 3/4 of H(1/4).
    entropy = -(7 / 16 * log(7 / 16) + 9 / 16 * log(3 / 16))
    inside = -(0.25 * log(0.25) + 0.75 * log(0.75)) * 3 / 4
    measured = found["specialisation"]
    assert measured["esi_nats"]["value"] == pytest.approx(entropy - inside)
    assert measured["nmi"]["value"] == pytest.approx((entropy - inside) / (entropy * log(4)) ** 0.5)
    assert measured["nmi"]["p_value"] < 0.01 and measured["nmi"]["shuffled_95"] < measured["nmi"]["value"]
    assert found["load"]["load_entropy_nats_by_layer"] == pytest.approx([entropy] * 2)
    assert found["headline"]["max_violation"] == pytest.approx(4 * 7 / 16 - 1)
    assert (found["tokens"], found["experts"], found["experts_per_token"]) == (48, 4, 1)


def test_an_expert_that_nobody_chooses_is_dead():
    text = Text(prompts=TEXT.prompts[:9], solutions=[""] * 9, subjects=TEXT.subjects[:9])
    found = analyse_routing(planted_model(), TOKENIZER, text)
    assert found["load"]["dead_experts_by_layer"] == [1, 1]
    assert found["coactivation"][0] == torch.diag(torch.tensor([1.0, 1, 1, 0])).tolist()


def test_subjects_dealt_out_anew_leave_no_association():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(400, generator=generator).tolist()
    prompts = [LETTERS[place % 4][:3] for place in range(400)]
    subjects = [LETTERS[place // 100][0] for place in order]
    found = analyse_routing(planted_model(), TOKENIZER, Text(prompts=prompts, solutions=[""] * 400, subjects=subjects))
    nmi = found["specialisation"]["nmi"]
    assert nmi["value"] < 0.02 and nmi["interval_95"][0] < 0.005 and nmi["p_value"] > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_alike_in_any_batches(family):
    model = routed_model(family, len(TOKENIZER))
    other = copy.deepcopy(model)
    with torch.no_grad():
        find_routers(other)[0].gate.get_parameter(
            next(name for name, _ in find_routers(other)[0].gate.named_parameters() if name.endswith("weight"))
        ).neg_()
    found = analyse_routing(model, TOKENIZER, TEXT, other)
    alone = analyse_routing(model, TOKENIZER, TEXT, other, batch_size=1)
    assert found["coactivation"] == alone["coactivation"]
    assert found["shift"]["flips_by_layer"] == alone["shift"]["flips_by_layer"]
    assert found["shift"]["flips_by_layer"][0] > 0.2 and found["shift"]["shift_by_layer"][0] > 0.01
    assert found["headline"]["entropy_nats"] == pytest.approx(alone["headline"]["entropy_nats"], abs=1e-6)
    assert torch.tensor(found["output_similarity"][0]).diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-4)


def test_consistency_with_an_earlier_checkpoint_worked_by_hand():
    model, other = planted_model(), planted_model()
    with torch.no_grad():
        # In the first layer c and d are each other's experts there.
        find_routers(other)[0].gate.weight.copy_(torch.eye(4, 32)[[0, 1, 3, 2]])
    found = changes_since(model, TOKENIZER, TEXT, other, batch_size=5)
    # They are 3/16 of the tokens each.
    assert found["consistency_by_layer"] == pytest.approx([10 / 16, 1.0])
    assert found["consistency"] == pytest.approx(13 / 16)
    assert found["shift_by_layer"][0] > 0 and found["shift_by_layer"][1] == 0
    assert sum(found["shift_counts"]) == 48 and found["shift"] == pytest.approx(found["shift_by_layer"][0] / 2)


def test_coactivation_worked_by_hand():
    # Tokens choose {0, 1}, {0, 1}, {0, 2}; expert 3 is dead.
    pairs_EE = torch.tensor([[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    expected = torch.tensor([[1, 2 / 3, 1 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    assert torch.allclose(coactivation(pairs_EE[None])[0].float(), expected)


def clusters(teacher, n_experts=4, layers=(0, 1), neurons=64):
    targets = ConversionTargets(
        expert_prior_LE=None,
        activation_mean_LE=None,
        assignment_LF=(torch.arange(neurons) % (n_experts + 1)).repeat(len(layers), 1),
        centroids=(),
        layer_map_L=torch.tensor(layers),
        prior_temperature=1.0,
        cluster="balanced",
        router="calibrated",
    )
    return TeacherClusters(teacher=teacher, targets=targets, n_layers=len(layers), n_experts=4)


@torch.no_grad()
def test_agreement_with_the_clusters_that_fire_most():
    teacher, model = make_tiny_model(), planted_model()
    found = analyse_routing(model, TOKENIZER, TEXT, clusters=clusters(teacher), batch_size=5)
    agreed, slots = [0, 0], 0
    tops = [[], []]
    for prompt in TEXT.prompts:
        ids = torch.tensor([[*TOKENIZER(prompt).input_ids, TOKENIZER.eos_token_id]])
        letters = ["abcd".index(letter) for letter in prompt] + [0]
        states = teacher.model(input_ids=ids, output_hidden_states=True).hidden_states
        for place, layer in enumerate(teacher.model.layers):
            hidden, rotary = states[place], teacher.model.rotary_emb(states[place], torch.arange(ids.shape[1])[None])
            attended = layer.self_attn(layer.input_layernorm(hidden), attention_mask=None, position_embeddings=rotary)
            x = layer.post_attention_layernorm(hidden + attended[0])[0]
            h = (torch.nn.functional.silu(x @ layer.mlp.gate_proj.weight.T) * (x @ layer.mlp.up_proj.weight.T)).abs()
            top = torch.stack([h[:, e::5].mean(-1) for e in range(4)], -1).argmax(-1).tolist()
            tops[place] += top
            agreed[place] += sum(one == other for one, other in zip(top, letters, strict=True))
        slots += len(letters)
    assert found["clusters"]["agreement_by_layer"] == pytest.approx([count / slots for count in agreed])
    own = [7 / 16, 3 / 16, 3 / 16, 3 / 16]
    chance = [sum(own[e] * top.count(e) / slots for e in range(4)) for top in tops]
    assert found["clusters"]["chance_by_layer"] == pytest.approx(chance, abs=1e-6)


def test_clusters_of_another_teacher_or_of_copies_are_refused():
    with pytest.raises(UserError, match="is not the one"):
        clusters(make_tiny_model(ffn_size=32))
    with pytest.raises(UserError, match="is not the one"):
        clusters(make_tiny_model(), layers=(0, 2))
    with pytest.raises(UserError, match="one cluster for every routed expert"):
        clusters(make_tiny_model(), n_experts=2)


def test_checkpoints_that_cannot_be_compared_are_named_by_their_configurations(tmp_path):
    for name, model in (("first", tiny_student()), ("more", tiny_student(n_experts=8)), ("dense", make_tiny_model())):
        model.config.save_pretrained(tmp_path / name)
    first, more, dense = (str(tmp_path / name) for name in ("first", "more", "dense"))
    check_alike(first, [first])
    with pytest.raises(UserError, match=r"more differs from .*first in layers or experts"):
        check_alike(first, [first, more])
    with pytest.raises(UserError, match="cannot be measured"):
        check_alike(dense, [])
