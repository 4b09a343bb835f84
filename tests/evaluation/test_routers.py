"""Routers of every family, found and read."""

import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.evaluation.routers import find_routers, output_similarity, score_function, scores, watching
from tests.evaluation.routed_models import FAMILIES, SIGMOID, routed_model
from tools.tiny_model import make_tiny_model

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def seen_by(model, sampled_N=None):
    routers = find_routers(model)
    with watching(routers, sampled_N) as seen:
        model.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    return routers, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_the_largest_scores_in_every_family(family):
    routers, seen = seen_by(routed_model(family, 64), torch.tensor([0, 5, 11]))
    assert [router.layer for router in routers] == ([1] if family in SIGMOID else [0, 1])
    score = score_function(seen, routers[0].gate)
    assert score == ("sigmoid" if family in SIGMOID else "softmax")
    for routed in seen:
        assert routed.logits_SE.shape == (12, 4) and routed.inputs_ND.shape == (3, 32)
        largest = scores(routed.logits_SE, score).topk(2, dim=-1).indices
        assert torch.equal(routed.chosen_SK.sort(-1).values, largest.sort(-1).values)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_logits_are_told_from_weights_where_all_experts_are_active(family):
    routers, seen = seen_by(routed_model(family, 64, num_experts_per_tok=4))
    # softmax weights of all experts would add up to 1
    assert not torch.allclose(seen[0].logits_SE.sum(-1), torch.ones(12), atol=1e-2)
    assert score_function(seen, routers[0].gate) == "softmax"


def test_the_score_of_one_expert_per_token_is_told_by_the_selection_bias():
    for family, expected in (("glm4_moe", "sigmoid"), ("qwen3_moe", "softmax")):
        routers, seen = seen_by(routed_model(family, 64, num_experts_per_tok=1))
        assert score_function(seen, routers[0].gate) == expected


def test_weights_that_follow_from_neither_are_no_known_score():
    routers, seen = seen_by(routed_model("mixtral", 64))
    seen[0].weights_SK = seen[0].weights_SK * torch.tensor([1.0, 5.0])
    assert score_function(seen, routers[0].gate) is None


def test_no_hook_is_left():
    model = routed_model("mixtral", 64)
    seen_by(model)
    for router in find_routers(model):
        assert not router.gate._forward_hooks and not router.experts._forward_pre_hooks


@torch.no_grad()
def test_similarity_of_outputs_worked_by_hand():
    model = routed_model("qwen3_moe", 64)
    router = find_routers(model)[0]
    router.experts.gate_up_proj[1], router.experts.down_proj[1] = (
        router.experts.gate_up_proj[0],
        2 * router.experts.down_proj[0],
    )
    router.experts.gate_up_proj[2], router.experts.down_proj[2] = (
        router.experts.gate_up_proj[0],
        -router.experts.down_proj[0],
    )
    x_ND = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    similarity_EE = output_similarity(router, x_ND)
    assert similarity_EE[0, :3].tolist() == pytest.approx([1, 1, -1], abs=1e-5)
    assert torch.allclose(similarity_EE, similarity_EE.T)

    def alone(expert):
        gate_up, down = router.experts.gate_up_proj[expert], router.experts.down_proj[expert]
        gate, up = (x_ND @ gate_up.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down.T

    expected = torch.nn.functional.cosine_similarity(alone(0), alone(3)).mean()
    assert float(similarity_EE[0, 3]) == pytest.approx(float(expected), abs=1e-5)


def test_the_order_of_neurons_does_not_change_the_similarity():
    model = routed_model("qwen3_moe", 64)
    router = find_routers(model)[0]
    x_ND = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before_EE = output_similarity(router, x_ND)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        router.experts.gate_up_proj[0] = router.experts.gate_up_proj[0][torch.cat([order, 16 + order])]
        router.experts.down_proj[0] = router.experts.down_proj[0][:, order]
        assert torch.allclose(output_similarity(router, x_ND), before_EE, atol=1e-5)


def test_models_without_readable_routers_are_refused():
    with pytest.raises(UserError, match="there is no router beside its experts"):
        find_routers(make_tiny_model())
