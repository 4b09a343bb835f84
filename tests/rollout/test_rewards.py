import pytest

from padd_ds.data.answers import AnswerFormat
from padd_ds.errors import UserError
from padd_ds.rollout.rewards import RewardOptions, reward_metrics, score_responses
from padd_ds.rollout.verify import AnswerChecker


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(AnswerFormat(name="last_number")) as checker:
        yield checker


def score(checker, responses, golds, ended, **options):
    return score_responses(responses, golds, ended, checker, RewardOptions(**options))


def test_parts_add_up_with_their_weights(checker):
    rewards = score(
        checker,
        ["It is 7", "It is 8", "It is 7", "no idea"],
        ["7"] * 4,
        [True, True, False, True],
        correct_weight=2.0,
        format_weight=0.5,
    )
    assert [reward.correct for reward in rewards] == [1, 0, 1, 0]
    assert [reward.format for reward in rewards] == [1, 1, 0, 0]
    assert [reward.total for reward in rewards] == [2.5, 0.5, 2.0, 0.0]


def test_format_pattern_takes_the_place_of_the_answer(checker):
    rewards = score(checker, ["#7", "7", "#?"], ["7"] * 3, [True] * 3, format_pattern="^#")
    assert [reward.format for reward in rewards] == [1, 0, 1]


def test_end_counts_only_where_it_is_required(checker):
    assert score(checker, ["7"], ["7"], [False], require_end=False)[0].format == 1
    assert score(checker, ["7"], ["7"], [False], require_end=True)[0].format == 0


def test_unparsable_gold_gives_no_reward_and_is_counted_apart(checker):
    rewards = score(checker, ["7", "7"], ["", "7"], [True, True])
    assert [(reward.usable, reward.total) for reward in rewards] == [(False, 0.0), (True, 1.1)]
    metrics = reward_metrics(rewards)
    assert metrics["count_gold_unparsable"] == 1
    assert metrics["count_ok"] == 1
    assert metrics["correct_mean"] == 1.0
    assert metrics["reward_mean"] == pytest.approx(1.1)


def test_no_usable_reward_gives_zero_means(checker):
    metrics = reward_metrics(score(checker, ["7"], [""], [True]))
    assert metrics["reward_mean"] == metrics["correct_mean"] == metrics["format_mean"] == 0.0


def test_lengths_must_agree(checker):
    with pytest.raises(ValueError, match="longer"):
        score(checker, ["7"], ["7", "8"], [True])


@pytest.mark.parametrize("options", [{"correct_weight": -1.0}, {"format_weight": -0.1}, {"format_pattern": "("}])
def test_bad_options_are_refused(options):
    with pytest.raises(UserError):
        RewardOptions(**options)
