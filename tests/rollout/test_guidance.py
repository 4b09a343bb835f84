"""The teacher's responses in groups that have no right one."""

import json
from pathlib import Path

import pytest
import torch

from padd_ds.data.split import normalise_question
from padd_ds.errors import UserError
from padd_ds.offline.cache import write_index
from padd_ds.rollout.generation import Responses
from padd_ds.rollout.guidance import Guidance, with_responses
from tests.rollout.test_collect import TOKENIZER, ScriptedChecker, ScriptedEngine, collector, right_if_equal
from tests.world import problems

ASKED = problems()[4:6]
ENDED = TOKENIZER.eos_token_id


def guidance(texts: list[str]) -> Guidance:
    return Guidance(texts={normalise_question(problem.question): texts for problem in ASKED})


def gold_of(step: int) -> str:
    return collector(ScriptedEngine(["1"] * 4), ScriptedChecker(right_if_equal)).collect(step).samples[0]["gold"]


def guided(responses: list[str], teacher: list[str]) -> tuple:
    own = collector(ScriptedEngine(responses), ScriptedChecker(right_if_equal))
    with_teacher = collector(
        ScriptedEngine(responses), ScriptedChecker(right_if_equal), advantages={"guidance": guidance(teacher)}
    )
    return own.collect(0), with_teacher.collect(0)


def words(rollout, row: int) -> str:
    batch = rollout.batch
    return TOKENIZER.decode(batch.response_ids_BR[row][batch.response_mask_BR[row]], skip_special_tokens=True)


def test_a_group_without_a_right_response_gets_the_teachers_in_its_last_place():
    gold = gold_of(0)
    own, with_teacher = guided(["99", "98", "97", "96"], [gold])
    assert own.batch.advantage_B.tolist() == [0.0] * 4
    assert [words(with_teacher, row) for row in range(4)] == ["99", "98", "97", gold]
    # rewards .1, .1, .1, 1.1: one right response in four
    torch.testing.assert_close(with_teacher.batch.advantage_B, torch.tensor([-1, -1, -1, 3]) / 3**0.5)
    assert int(with_teacher.batch.response_ids_BR[3][with_teacher.batch.response_mask_BR[3]][-1]) == ENDED
    assert with_teacher.metrics["groups_guided"] == (1.0, 1)


def test_what_is_told_of_the_rollout_is_the_students_own():
    own, with_teacher = guided(["99", "98", "97", "96"], [gold_of(0)])
    for name, value in own.metrics.items():
        assert with_teacher.metrics[name] == value, name
    assert [sample["response"] for sample in with_teacher.samples] == [sample["response"] for sample in own.samples]
    assert with_teacher.batch.failure_B.tolist() == own.batch.failure_B.tolist() == [1.0] * 4


def test_a_group_with_a_right_response_stays_as_it_is():
    gold = gold_of(0)
    own, with_teacher = guided(["99", gold, "97", "96"], [gold])
    assert torch.equal(own.batch.response_ids_BR, with_teacher.batch.response_ids_BR)
    assert with_teacher.metrics["groups_guided"] == (0.0, 1)
    assert own.batch.failure_B.tolist() == [0.75] * 4


@pytest.mark.parametrize("teacher", ["7", "1234567"], ids=["wrong here", "too long"])
def test_a_response_that_this_run_would_not_take_from_the_student_is_not_taken_from_the_teacher(teacher):
    own, with_teacher = guided(["99", "98", "97", "96"], [teacher])
    assert torch.equal(own.batch.response_ids_BR, with_teacher.batch.response_ids_BR)
    assert with_teacher.metrics["groups_guided"] == (0.0, 1)


def test_a_longer_response_makes_room_and_has_no_routes():
    responses = Responses(
        ids_BR=torch.tensor([[5, ENDED], [6, 7]]),
        mask_BR=torch.tensor([[True, True], [True, True]]),
        ended_B=torch.tensor([True, False]),
        routes_BLNK=torch.ones(2, 3 + 2, 1, 1, dtype=torch.int16),
    )
    got = with_responses(responses, {1: [8, 9, 4, ENDED]}, pad_token_id=0)
    assert got.ids_BR.tolist() == [[5, ENDED, 0, 0], [8, 9, 4, ENDED]]
    assert got.mask_BR.tolist() == [[True, True, False, False], [True] * 4]
    assert got.ended_B.tolist() == [True, True]
    assert got.routes_BLNK is not None
    assert got.routes_BLNK[..., 0, 0].tolist() == [[1] * 5 + [-1] * 2, [-1] * 7]
    assert responses.ids_BR.tolist() == [[5, ENDED], [6, 7]]


def test_a_cache_without_responses_is_refused(tmp_path: Path):
    responses = tmp_path / "responses.jsonl"
    responses.write_text(json.dumps({"question": "1+1=", "answer": "2", "solution": None}) + "\n")
    write_index(tmp_path, {"top_k": 0}, responses, [])
    with pytest.raises(UserError, match="holds no responses"):
        Guidance.open(tmp_path)


def test_a_draw_chooses_among_the_responses_of_a_question(tmp_path: Path):
    responses = tmp_path / "responses.jsonl"
    rows = [{"question": "1 + 1 =", "answer": "2", "solution": text} for text in ("2", "two")]
    responses.write_text("\n".join(map(json.dumps, rows)) + "\n")
    write_index(tmp_path, {"top_k": 0}, responses, [])
    found = Guidance.open(tmp_path)
    assert [found.response("1+1=", draw) for draw in range(3)] == ["2", "two", "2"]
    assert found.response("1+2=", 0) is None
