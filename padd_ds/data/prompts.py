"""The text that a model is shown for a problem."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from padd_ds.data.problems import Problem
from padd_ds.errors import UserError

TARGET_FIELDS = ("question", "solution", "answer")
_PLACEHOLDER = re.compile(rf"\{{({'|'.join(TARGET_FIELDS)})\}}")
_WORD = re.compile(r"\{(\w+)\}")
_LATEX = re.compile(r"(?:\\[A-Za-z]+|[_^])(?:\{[^{}]*\})+")
"""A command with its arguments, or what is raised or lowered: \\frac{1}{n}, x_{n}."""
_BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
_QWEN_MATH = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
_R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
    "User: {question}\nAssistant: <think>"
)


def _check_spelling(place: str, text: str, known: Sequence[str]) -> None:
    for word in _WORD.findall(_LATEX.sub("", text)):
        close = get_close_matches(word.lower(), known, n=1, cutoff=0.75)
        if close and word not in known:
            names = ", ".join(f"{{{name}}}" for name in known)
            raise UserError(f"{place}: {{{word}}} is no placeholder; did you mean {{{close[0]}}}? Known: {names}")


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a question becomes a prompt."""

    text: str = "{question}"
    """Holds `{question}` once or more; other braces are plain text, but for a word that is misspelt for it."""
    chat: bool = False
    """Wrap the text as a user's turn in the tokenizer's chat template."""
    system: str | None = None
    """A system turn before it; only with `chat`."""

    def __post_init__(self) -> None:
        _check_spelling(f"template {self.text!r}", self.text, ["question"])
        if "{question}" not in self.text:
            names = ", ".join(TEMPLATES)
            raise UserError(f"template {self.text!r} lacks {{question}}; put it in, or name one of {names}")
        if self.system is not None and not self.chat:
            raise UserError("a template's system text needs chat: true")


TEMPLATES = {
    "plain": PromptTemplate(),
    "boxed": PromptTemplate(text=_BOXED),
    "qa": PromptTemplate(text="Question: {question}\nAnswer:"),
    "chat": PromptTemplate(chat=True),
    "chat-boxed": PromptTemplate(text=_BOXED, chat=True),
    "qwen-math": PromptTemplate(text=_QWEN_MATH),
    "r1": PromptTemplate(text=_R1),
}
"""`qwen-math` and `r1` are those of Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783), whose "no template" is `plain`."""


def resolve_template(template: str) -> PromptTemplate:
    """A named template, or plain text of the user's own that holds `{question}`."""
    return TEMPLATES.get(template) or PromptTemplate(text=template)


def render(template: PromptTemplate, problem: Problem, tokenizer: Any) -> str:
    """The prompt as complete text: begin-of-text and chat tokens are in it.

    So everything downstream tokenises with `add_special_tokens=False`. UserError if `template.chat` and
    the tokenizer has no chat template.
    """
    text = template.text.replace("{question}", problem.question)
    if not template.chat:
        return begin_of_text(tokenizer) + text
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template; choose a template without chat")
    turns = [{"role": "system", "content": template.system}] if template.system is not None else []
    turns.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def render_target(problem: Problem, target: str = "{solution}") -> str:
    """The text to be learnt: `target` with `{solution}`, `{answer}` and `{question}` filled in; checked before."""
    check_target(target)
    if "{solution}" in target and problem.solution is None:
        start = problem.question[:40]
        raise UserError(f"no solution for {start!r}; set the solution field, or take it out of the target")
    values = {"question": problem.question, "solution": problem.solution or "", "answer": problem.answer}
    # One pass: a solution may itself hold the text "{answer}".
    return _PLACEHOLDER.sub(lambda found: values[found[1]], target)


def check_target(target: str) -> None:
    """UserError for a target that holds no placeholder, or one that is misspelt; other braces are plain text."""
    known = ", ".join(f"{{{name}}}" for name in TARGET_FIELDS)
    _check_spelling(f"target {target!r}", target, TARGET_FIELDS)
    if not _PLACEHOLDER.search(target):
        raise UserError(f"target {target!r} is the same for every question; put one of {known} in it")


def begin_of_text(tokenizer: Any) -> str:
    """The token that the tokenizer puts before a text by itself; empty if it does not."""
    bos = getattr(tokenizer, "bos_token", None)
    return bos if bos and tokenizer.bos_token_id in tokenizer("").input_ids else ""
