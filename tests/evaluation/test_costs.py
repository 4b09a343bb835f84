import json

import pytest

from padd_ds.conversion.costs import model_costs
from padd_ds.conversion.families import FAMILIES as TEACHERS
from padd_ds.conversion.options import Slicing
from padd_ds.evaluation.costs import decode_bytes_per_token, model_facts, token_costs
from padd_ds.planning.shape import shape_of
from tests.evaluation.routed_models import FAMILIES, routed_model
from tests.tiny import tiny_student
from tools.tiny_model import make_tiny_model


def test_costs_of_a_teacher_are_those_of_its_conversion():
    teacher = make_tiny_model(ffn_size=80)
    expected, _ = model_costs(teacher.config, TEACHERS["qwen3"], Slicing(width=80, experts=5, shared=1, top_k=2))
    found = token_costs(teacher)
    assert found["total_parameters"] == expected.total_parameters
    assert found["active_parameters"] == expected.active_parameters
    assert found["flops_per_token"] == expected.decode_flops_per_token


def test_costs_of_a_student_worked_by_hand():
    student = tiny_student()
    found, shape = token_costs(student), shape_of(student.config, "student")
    assert found["total_parameters"] == shape.parameters
    assert found["active_parameters"] == shape.active_parameters
    # Two layers: projections (4 + 2 + 2 + 4) * 8 wide, three of four slices of 16 with three matrices, router; head.
    layer = 32 * 96 + 3 * 3 * 32 * 16 + 4 * 32
    assert found["flops_per_token"] == 2 * (2 * layer + 64 * 32) + 4 * 2 * 1024 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_experts_is_idle(family):
    model = routed_model(family, 64)
    found = token_costs(model)
    experts = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    assert found["total_parameters"] - found["active_parameters"] == experts // 2
    all_active = token_costs(routed_model(family, 64, num_experts_per_tok=4))
    assert all_active["active_parameters"] == all_active["total_parameters"] == found["total_parameters"]
    matrices = sum(
        v.numel() for name, v in model.named_parameters() if ".experts." in name and not name.endswith("bias")
    )
    assert all_active["flops_per_token"] - found["flops_per_token"] == matrices


def test_facts_are_plain_values():
    facts = model_facts(tiny_student())
    assert json.loads(json.dumps(facts)) == facts
    assert facts["config"]["n_routed_experts"] == 4 and facts["config"]["model_type"] == "glm4_moe"


def test_bytes_of_a_decoding_step_worked_by_hand():
    student = tiny_student()
    experts = sum(value.numel() for name, value in student.named_parameters() if ".experts." in name)
    total = token_costs(student)["total_parameters"]
    # Two of four experts per row: half of them for one row, 15 of 16 for four. No embedding; 2 * 2 * 8 keys, values.
    for batch, reached in ((1, 1 / 2), (4, 15 / 16)):
        weights = total - 64 * 32 - experts * (1 - reached)
        expected = 4 * (weights / batch + 2 * 2 * 2 * 8 * 100)
        assert decode_bytes_per_token(student, batch, 100) == pytest.approx(expected)
    teacher = make_tiny_model()  # its head is its embedding
    parameters = token_costs(teacher)["total_parameters"]
    assert decode_bytes_per_token(teacher, 1, 0) == 4 * parameters
