"""Results held against the first of their questions."""

import json

import pytest

from padd_ds.errors import UserError
from padd_ds.evaluation.comparison import changed_questions, compare, comparison_text, greedy_responses
from tests.evaluation.made_up_results import make_result as result


def test_results_are_paired_question_by_question(tmp_path):
    first = result(tmp_path / "first.json", "0011", "0011??11")
    second = result(tmp_path / "second.json", "1111", "0111??00")
    lines = comparison_text(compare([first, second])).splitlines()
    assert lines[0] == f"{second} beside {first}"
    assert lines[1].startswith("greedy: +50.0 points")
    assert "more right on 2 and less on 0 of 4 questions, sign test p = 0.5" in lines[1]
    assert "more right on 1 and less on 1 of 3 questions" in lines[2]


def test_every_set_of_questions_has_its_own_reference(tmp_path):
    paths = [
        result(tmp_path / f"{name}.json", marks, problems=problems, benchmark=problems)
        for name, marks, problems in (("t1", "11", "a"), ("t2", "00", "b"), ("s1", "10", "a"), ("s2", "10", "b"))
    ]
    first, second = compare(paths)
    assert [one.title for one in (first, second)] == ["a", "b"]
    assert [member.name for member in second.members] == ["t2", "s2"]
    assert first.members[0].differences == {}
    assert first.members[1].differences["greedy"].mean == -0.5
    assert second.members[1].differences["greedy"].mean == 0.5


def test_the_reference_is_a_teacher_where_it_alone_is_dense(tmp_path):
    dense, other = result(tmp_path / "dense.json", "01"), result(tmp_path / "other.json", "01")
    moe = result(tmp_path / "moe.json", "01", costs=(50, 100))
    unknown = result(tmp_path / "unknown.json", "01", costs=None)
    roles = [compare([dense, second])[0].role for second in (moe, unknown, other)]
    assert roles == ["teacher", "teacher", "reference"]
    assert compare([moe, dense])[0].role == compare([unknown, dense])[0].role == "reference"


def test_models_of_one_name_are_told_apart_by_their_files(tmp_path):
    paths = [result(tmp_path / f"{name}.json", "01", model="runs/model") for name in ("before", "after")]
    assert [member.name for member in compare(paths)[0].members] == ["before", "after"]


def test_worst_and_best_questions(tmp_path):
    first = result(tmp_path / "first.json", "110011")
    others = [result(tmp_path / "a.json", "100111"), result(tmp_path / "b.json", "011110")]
    # Differences per question: -1/2, -1/2, 1/2, 1, 0, -1/2.
    lost, won = changed_questions(compare([first, *others])[0], most=2)
    assert (lost, won) == ([0, 1], [3, 2])


def test_drawn_responses_decide_between_equals(tmp_path):
    first = result(tmp_path / "first.json", "11", "1011")
    second = result(tmp_path / "second.json", "00", "1000")
    assert changed_questions(compare([first, second])[0], most=5)[0] == [1, 0]


def test_responses_are_read_beside_the_result_alone(tmp_path):
    path = result(tmp_path / "first.json", "01", "1111")
    member = compare([path, result(tmp_path / "second.json", "01")])[0].members[0]
    assert [row["sample"] for row in greedy_responses(member).values()] == [0, 0]
    member.document["responses_file"] = "../elsewhere/first.responses.jsonl"
    assert len(greedy_responses(member)) == 2
    (tmp_path / "first.responses.jsonl").write_text('{"problem": 0}\n')
    with pytest.raises(UserError, match="line 1: is no response"):
        greedy_responses(member)
    (tmp_path / "first.responses.jsonl").unlink()
    assert greedy_responses(member) == {}


def test_other_questions_and_other_files_are_refused(tmp_path):
    first = result(tmp_path / "first.json", "01")
    with pytest.raises(UserError, match="are not on the same questions"):
        compare([first, result(tmp_path / "second.json", "01", problems="b")])
    with pytest.raises(UserError, match="are not on the same questions"):
        compare([first])
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "half.json").write_text(json.dumps({"settings": {"problems_sha256": "a"}}))
    for name in ("none.json", "other.json", "half.json"):
        with pytest.raises(UserError, match=f"{name}: is no result of padd-eval"):
            compare([first, tmp_path / name])


def test_a_result_that_is_named_twice_or_has_no_response_is_refused(tmp_path):
    first = result(tmp_path / "first.json", "01")
    with pytest.raises(UserError, match=r"first\.json is named twice"):
        compare([first, tmp_path / "." / "first.json"])
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"first\.json is named twice"):
        compare([first, tmp_path / "link" / "first.json"])
    bare = [result(tmp_path / f"{name}.json", "") for name in "ab"]
    with pytest.raises(UserError, match=r"a\.json: holds no response"):
        compare(bare)
