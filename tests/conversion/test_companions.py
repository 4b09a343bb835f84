"""The tokenizer beside a student."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, Glm4MoeConfig

from padd_ds.conversion import companions
from padd_ds.conversion.companions import check_tokenizer, copy_tokenizer
from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.pipeline import convert
from padd_ds.errors import UserError
from tests.conversion.tiny_teachers import make_teacher
from tools.tiny_model import make_tokenizer

TEXT = "12 plus 7 is 19"


@pytest.fixture
def qwen2_teacher(tmp_path: Path) -> Path:
    """A teacher whose model type makes transformers read its tokenizer in another way than its files say."""
    folder = make_teacher(tmp_path / "teacher", "qwen2")
    make_tokenizer().save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != make_tokenizer()(TEXT)["input_ids"]
    return folder


def test_student_reads_as_the_teacher_does_where_the_model_type_matters(tmp_path: Path, qwen2_teacher: Path) -> None:
    student = tmp_path / "student"
    Glm4MoeConfig().save_pretrained(student)
    copy_tokenizer(qwen2_teacher, student, trust_remote_code=False)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (student, qwen2_teacher))
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_check_leaves_nothing_and_takes_what_the_copy_takes(qwen2_teacher: Path) -> None:
    before = sorted(qwen2_teacher.parent.rglob("*"))
    check_tokenizer(qwen2_teacher, Glm4MoeConfig(), trust_remote_code=False)
    assert sorted(qwen2_teacher.parent.rglob("*")) == before


def test_a_tokenizer_that_does_not_travel_is_refused_before_any_work(
    tmp_path: Path, qwen2_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companions, "_same", lambda one, other: False)
    options = ConversionOptions(
        teacher=str(qwen2_teacher),
        output=tmp_path / "student",
        experts=8,
        top_k=4,
        cluster="random",
        router="random",
    )
    with pytest.raises(UserError, match=r"teacher: its tokenizer does not load the same beside a student"):
        convert(options)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
