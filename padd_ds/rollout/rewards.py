"""Responses to rewards: a verified answer plus the wanted form, in linear weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from padd_ds.data.answers import compile_pattern
from padd_ds.errors import UserError
from padd_ds.rollout.verify import STATUSES, AnswerChecker, Verdict


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Weights and the form that is asked for. Choice: the paper gives no weights."""

    correct_weight: float = 1.0
    """Reward of a verified answer."""
    format_weight: float = 0.1
    """Reward of the wanted form."""
    format_pattern: str | None = None
    """Regular expression to be found in the response; None: an answer is to be found in it."""
    require_end: bool = True
    """The form includes that the response ended by itself, within the allowed length."""

    def __post_init__(self) -> None:
        for key in ("correct_weight", "format_weight"):
            if getattr(self, key) < 0:
                raise UserError(f"{key} {getattr(self, key)} must be >= 0")
        if self.format_pattern is not None:
            compile_pattern(self.format_pattern, "format_pattern")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The reward of one response and its parts."""

    correct: float
    """1 if the answer was verified, else 0."""
    format: float
    """1 if the form is as wanted, else 0."""
    total: float
    """correct_weight * correct + format_weight * format; 0 if not `usable`."""
    usable: bool
    """False if the gold answer cannot be parsed: the whole group is to be dropped."""
    status: str
    """The verdict's status, see `Verdict`."""


def score_responses(
    responses: Sequence[str],
    golds: Sequence[str],
    ended: Sequence[bool],
    checker: AnswerChecker,
    options: RewardOptions,
) -> list[Reward]:
    """One reward per response. Source: PADD, Stages II-IV ("exact match + format, linear weights")."""
    verdicts = checker.check(list(zip(responses, golds, strict=True)))
    scored = zip(responses, verdicts, ended, strict=True)
    return [_reward(response, verdict, end, options) for response, verdict, end in scored]


def reward_metrics(rewards: Sequence[Reward]) -> dict[str, float]:
    """Means over the usable rewards, and how many responses had each status.

    Keys: `reward_mean`, `correct_mean`, `format_mean` (0 if none is usable) and `count_<status>`.
    """
    usable = [reward for reward in rewards if reward.usable]
    size = max(len(usable), 1)
    statuses = Counter(reward.status for reward in rewards)
    return {
        "reward_mean": sum(reward.total for reward in usable) / size,
        "correct_mean": sum(reward.correct for reward in usable) / size,
        "format_mean": sum(reward.format for reward in usable) / size,
        **{f"count_{status}": float(statuses[status]) for status in STATUSES},
    }


def _reward(response: str, verdict: Verdict, ended: bool, options: RewardOptions) -> Reward:
    if options.format_pattern is None:
        formed = bool(verdict.extracted)
    else:
        formed = compile_pattern(options.format_pattern, "format_pattern").search(response) is not None
    formed = formed and (ended or not options.require_end)
    usable = verdict.status != "gold_unparsable"
    total = options.correct_weight * verdict.correct + options.format_weight * formed
    return Reward(
        correct=float(verdict.correct),
        format=float(formed),
        total=total if usable else 0.0,
        usable=usable,
        status=verdict.status,
    )
