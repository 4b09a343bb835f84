import pytest

from padd_ds.data.problems import FieldMap, Problem, answer_text, map_rows
from padd_ds.errors import UserError


def test_plain_fields_are_mapped_by_name():
    rows = [{"q": "1 + 1", "a": 2, "kind": "sum", "worked": "1+1=2"}]
    fields = FieldMap(question="q", answer="a", solution="worked", subject="kind")
    assert map_rows(rows, fields) == [Problem(question="1 + 1", answer="2", solution="1+1=2", subject="sum")]


def test_gsm8k_answer_is_cut_at_its_last_mark():
    rows = [{"question": "q", "answer": "He has 2*3=<<2*3=6>>6.\n#### 1,006"}]
    problem = map_rows(rows, FieldMap(gold_format="gsm8k"))[0]
    assert (problem.answer, problem.solution) == ("1,006", "He has 2*3=6.")


def test_boxed_answer_is_taken_from_the_worked_text():
    worked = r"First \boxed{1}, so \boxed{\frac{1}{2}}."
    problem = map_rows([{"question": "q", "answer": worked}], FieldMap(gold_format="boxed"))[0]
    assert (problem.answer, problem.solution) == (r"\frac{1}{2}", worked)


@pytest.mark.parametrize("gold_format", ["gsm8k", "boxed"])
def test_worked_text_without_an_answer_gives_an_empty_gold_answer(gold_format):
    problem = map_rows([{"question": "q", "answer": "who knows"}], FieldMap(gold_format=gold_format))[0]
    assert (problem.answer, problem.solution) == ("", "who knows")


def test_missing_field_names_row_fields_and_config_key():
    rows = [{"question": "q", "answer": "1"}, {"question": "q", "label": "1"}]
    with pytest.raises(UserError, match=r"row 2 has no 'answer' \(fields: question, label\).*data\.fields\.answer to"):
        map_rows(rows, FieldMap())
    with pytest.raises(UserError, match=r"a\.jsonl, row 1 has no 'kind'.*set --subject-field"):
        map_rows(rows[:1], FieldMap(subject="kind"), "a.jsonl", "--{role}-field")


def test_unknown_gold_format_is_refused():
    with pytest.raises(UserError, match="choose one of plain, gsm8k, boxed"):
        FieldMap(gold_format="tagged")


@pytest.mark.parametrize(
    ("value", "text"), [(27.0, "27"), (2.5, "2.5"), (-3, "-3"), ([" 1 ", 2.0], "1, 2"), (True, "true")]
)
def test_answers_of_other_types_become_text(value, text):
    assert answer_text(value) == text
