"""From prompts to advantages."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from padd_ds.config.sections import RolloutConfig
from padd_ds.data.prompts import PromptTemplate
from padd_ds.rollout.collect import Collector
from padd_ds.rollout.generation import Prompts, Responses, Sampling
from padd_ds.rollout.rewards import RewardOptions
from padd_ds.rollout.verify import Verdict
from tests.world import problems
from tools.tiny_model import make_tokenizer

TOKENIZER = make_tokenizer()


class ScriptedEngine:
    """Answers with fixed texts, the end token behind each unless it is cut."""

    def __init__(self, texts: list[str], cut: int | None = None) -> None:
        self.texts = texts
        self.cut = cut
        self.calls: list[int] = []

    def ready(self, version: int) -> AbstractContextManager[object]:
        return nullcontext()

    def generate(self, prompts: Prompts, sampling: Sampling) -> Responses:
        self.calls.append(len(prompts.ids_PT))
        rows = [TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id] for text in self.texts]
        if self.cut is not None:
            rows[self.cut] = rows[self.cut][:-1]
        width = max(map(len, rows))
        return Responses(
            ids_BR=torch.tensor([row + [TOKENIZER.pad_token_id] * (width - len(row)) for row in rows]),
            mask_BR=torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
            ended_B=torch.tensor([TOKENIZER.eos_token_id in row for row in rows]),
        )


class ScriptedChecker:
    def __init__(self, judge: Any) -> None:
        self.judge = judge

    def check(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        return [self.judge(*pair) for pair in pairs]

    def close(self) -> None:
        pass


def right_if_equal(text: str, gold: str) -> Verdict:
    return Verdict(correct=text == gold, status="ok", extracted=text)


def collector(
    engine: Any, checker: Any, prompts: int = 1, advantages: dict[str, Any] | None = None, **options: Any
) -> Collector:
    return Collector(
        **(advantages or {}),
        engine=engine,
        tokenizer=TOKENIZER,
        problems=problems()[4:6],
        template=PromptTemplate(),
        checker=checker,
        reward_options=RewardOptions(),
        options=RolloutConfig(prompts=prompts, group_size=4, max_new_tokens=5, **options),
        max_prompt_tokens=16,
        seed=0,
        rank=0,
        world=1,
        device=torch.device("cpu"),
    )


def test_right_answers_get_the_larger_advantage() -> None:
    question = collector(ScriptedEngine(["1", "1", "1", "1"]), ScriptedChecker(right_if_equal)).collect(0).samples[0]
    gold = question["gold"]
    engine = ScriptedEngine([gold, "99", "98", gold])
    rollout = collector(engine, ScriptedChecker(right_if_equal)).collect(0)
    torch.testing.assert_close(rollout.batch.advantage_B, torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert rollout.metrics["reward_correct"] == (2.0, 4)
    assert rollout.metrics["groups_without_spread"] == (0.0, 1)
    assert rollout.batch.response_mask_BR.sum(1).tolist() == [len(gold) + 1, 3, 3, len(gold) + 1]


def test_equal_rewards_give_no_advantage() -> None:
    rollout = collector(ScriptedEngine(["99"] * 4), ScriptedChecker(right_if_equal)).collect(0)
    assert rollout.batch.advantage_B.tolist() == [0.0] * 4
    assert rollout.metrics["groups_without_spread"] == (1.0, 1)


def test_groups_without_spread_can_be_left_out_whole() -> None:
    engine, judge = ScriptedEngine(["99"] * 4), ScriptedChecker(right_if_equal)
    kept = collector(engine, judge).collect(0)
    dropped = collector(engine, judge, advantages={"drop_flat_groups": True}).collect(0)
    assert kept.batch.response_mask_BR.any() and not dropped.batch.response_mask_BR.any()
    gold = kept.samples[0]["gold"]
    engine = ScriptedEngine([gold, "99", "98", gold])
    kept = collector(engine, judge, advantages={"drop_flat_groups": True}).collect(0)
    assert kept.batch.response_mask_BR.any(dim=1).all()


def test_advantages_can_stay_in_the_unit_of_the_reward() -> None:
    gold = collector(ScriptedEngine(["1"] * 4), ScriptedChecker(right_if_equal)).collect(0).samples[0]["gold"]
    engine = ScriptedEngine([gold, "99", "98", gold])
    rollout = collector(engine, ScriptedChecker(right_if_equal), advantages={"advantage_scale": "none"}).collect(0)
    torch.testing.assert_close(rollout.batch.advantage_B, torch.tensor([0.5, -0.5, -0.5, 0.5]))


def test_a_cut_response_is_counted_and_loses_the_format_reward() -> None:
    rollout = collector(ScriptedEngine(["99"] * 4, cut=2), ScriptedChecker(right_if_equal)).collect(0)
    assert rollout.metrics["response_truncated"] == (1.0, 4)
    assert rollout.metrics["reward_format"] == (3.0, 4)
    assert rollout.batch.advantage_B[2] < 0


def test_a_group_without_a_usable_gold_answer_is_dropped() -> None:
    def unparsable(text: str, gold: str) -> Verdict:
        return Verdict(correct=False, status="gold_unparsable", extracted="")

    rollout = collector(ScriptedEngine(["1", "2", "3", "4"]), ScriptedChecker(unparsable)).collect(0)
    assert not rollout.batch.response_mask_BR.any()
    assert rollout.metrics["gold_unparsable"] == (4, 4)
    assert rollout.metrics["reward"] == (0, 0)


def test_a_group_is_dropped_whole_where_only_some_responses_show_that_its_gold_answer_is_unusable() -> None:
    def unparsable_but_equal(text: str, gold: str) -> Verdict:
        return Verdict(correct=text == "1", status="ok" if text == "1" else "gold_unparsable", extracted=text)

    rollout = collector(ScriptedEngine(["1", "2", "3", "4"]), ScriptedChecker(unparsable_but_equal)).collect(0)
    assert not rollout.batch.response_mask_BR.any()
    assert not rollout.batch.counted_mask_BL.any() and rollout.batch.attention_mask_BL.any()
    assert rollout.metrics["gold_unparsable"] == (3, 4)


def test_prompts_can_be_generated_in_smaller_batches() -> None:
    engine = ScriptedEngine(["1"] * 4)
    rollout = collector(engine, ScriptedChecker(right_if_equal), prompts=2, prompts_per_batch=1).collect(0)
    assert engine.calls == [1, 1]
    assert rollout.batch.n_responses == 8


def test_a_step_draws_the_same_prompts_again() -> None:
    one = collector(ScriptedEngine(["1"] * 4), ScriptedChecker(right_if_equal))
    assert torch.equal(one.collect(3).batch.prompt_ids_BT, one.collect(3).batch.prompt_ids_BT)


class AheadEngine(ScriptedEngine):
    """Tells what it is asked, in order; what is begun has the version of then."""

    def __init__(self) -> None:
        super().__init__(["1", "2", "3", "4"])
        self.told: list[str] = []
        self.version = -1

    def ready(self, version: int) -> AbstractContextManager[object]:
        self.told.append(f"ready {version}")
        self.version = version
        return nullcontext()

    def generate(self, prompts: Prompts, sampling: Sampling) -> Responses:
        self.told.append("generate")
        return replace(super().generate(prompts, sampling), versions_B=torch.full((4,), self.version))

    def begin(self, prompts: Prompts, sampling: Sampling) -> Responses:
        self.told.append(f"begin {TOKENIZER.decode(prompts.ids_PT[0], skip_special_tokens=True)}")
        return replace(super().generate(prompts, sampling), versions_B=torch.full((4,), self.version))

    def finish(self, drawing: Responses, version: int) -> Responses:
        self.told.append("finish")
        return drawing


def test_the_next_rollout_is_drawn_with_the_weights_of_this_one() -> None:
    engine = AheadEngine()
    ahead = replace(collector(engine, ScriptedChecker(right_if_equal)), ahead=engine, steps=3)
    rollouts = [ahead.collect(step) for step in range(3)]
    asked = [rollout.samples[0]["question"] for rollout in rollouts]
    assert engine.told == [
        *("ready 0", "generate", f"begin {asked[1]}"),
        *("finish", "ready 1", f"begin {asked[2]}"),
        "finish",
    ]
    assert [rollout.metrics["rollout_staleness"] for rollout in rollouts] == [(0.0, 4), (4.0, 4), (4.0, 4)]
