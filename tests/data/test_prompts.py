import pytest

from padd_ds.data.problems import Problem
from padd_ds.data.prompts import TEMPLATES, PromptTemplate, check_target, render, render_target, resolve_template
from padd_ds.errors import UserError
from tests.data.characters import character_tokenizer

PROBLEM = Problem(question="3 + 4", answer="7", solution="3 + 4 = 7, not {answer}")


def test_plain_prompt_is_the_question():
    assert render(TEMPLATES["plain"], PROBLEM, character_tokenizer()) == "3 + 4"


def test_begin_token_is_in_the_text_exactly_where_the_tokenizer_would_add_it():
    tokenizer = character_tokenizer(bos=True)
    text = render(TEMPLATES["plain"], PROBLEM, tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == tokenizer("3 + 4").input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_chat_prompt_ends_where_the_answer_begins():
    template = PromptTemplate(text="What is {question}?", chat=True, system="Be short.")
    text = render(template, PROBLEM, character_tokenizer(chat=True, bos=True))
    assert text == "[system]Be short.[user]What is 3 + 4?[assistant]"


def test_braces_of_the_template_are_plain_text():
    assert render(TEMPLATES["boxed"], PROBLEM, character_tokenizer()).endswith(r"within \boxed{}.")


def test_published_templates_leave_the_model_where_it_is_to_go_on():
    qwen, r1 = (render(TEMPLATES[name], PROBLEM, character_tokenizer()) for name in ("qwen-math", "r1"))
    assert qwen.endswith("<|im_start|>user\n3 + 4<|im_end|>\n<|im_start|>assistant\n")
    assert r1.endswith("\nUser: 3 + 4\nAssistant: <think>")


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        render(TEMPLATES["chat"], PROBLEM, character_tokenizer())


def test_template_is_a_name_or_text_of_ones_own():
    assert resolve_template("qa") is TEMPLATES["qa"]
    assert resolve_template("{question} =").text == "{question} ="
    with pytest.raises(UserError, match=r"'chatt' lacks \{question\}.*chat-boxed"):
        resolve_template("chatt")


def test_target_is_filled_in_once():
    assert render_target(PROBLEM) == PROBLEM.solution
    assert render_target(PROBLEM, "{question} = {answer}") == "3 + 4 = 7"
    assert render_target(PROBLEM, "{solution} #{answer}") == "3 + 4 = 7, not {answer} #7"


def test_target_needs_the_solution_that_it_names():
    bare = Problem(question="3 + 4", answer="7")
    assert render_target(bare, "{answer}") == "7"
    with pytest.raises(UserError, match="no solution for '3 \\+ 4'"):
        render_target(bare)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("{soluton}", r"\{soluton\} is no placeholder; did you mean \{solution\}\? Known: .*\{answer\}"),
        ("{solution} #{anwser}", r"did you mean \{answer\}"),
        ("{solution} #{Answer}", r"did you mean \{answer\}"),
        (r"\boxed{{anwser}}", r"did you mean \{answer\}"),
        ("#{gold}", "is the same for every question; put one of"),
    ],
)
def test_a_misspelt_target_is_refused(target, told):
    with pytest.raises(UserError, match=told):
        render_target(PROBLEM, target)


@pytest.mark.parametrize(
    "target",
    [
        r"\boxed{{answer}}",
        r"\frac{1}{2} {answer}",
        r"\text{answers} x_{answers} y^{answers} \frac{1}{answers} \{answers\} {answer}",
        r"{n} {} {answer}",
    ],
)
def test_braces_of_a_target_are_plain_text(target):
    check_target(target)
    assert render_target(PROBLEM, target) == target.replace("{answer}", "7")


def test_a_misspelt_template_is_refused():
    for text in ("{questoin}", "{question}{queston}"):
        with pytest.raises(UserError, match=r"template .* is no placeholder; did you mean \{question\}"):
            PromptTemplate(text=text)
    assert resolve_template(r"{question} \boxed{answer} {answer}").text.endswith("{answer}")
