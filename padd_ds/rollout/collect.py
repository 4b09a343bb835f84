"""One rollout: prompts drawn, responses sampled, rewards checked, advantages formed.

Legend: P prompts of this rank, G responses per prompt, B = P * G, T prompt tokens, R response tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from padd_ds.config.sections import RolloutConfig
from padd_ds.data.batches import batch_indices, prompt_batch
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import PromptTemplate, render
from padd_ds.losses.advantage import group_advantages, groups_without_spread
from padd_ds.rollout.batch import RolloutBatch
from padd_ds.rollout.generation import DrawsAhead, Prompts, Responses, RolloutEngine, Sampling, generate_in_batches
from padd_ds.rollout.guidance import Guidance, with_responses
from padd_ds.rollout.rewards import Reward, RewardOptions, score_responses
from padd_ds.rollout.verify import AnswerChecker
from padd_ds.seeds import derive_seed

SAMPLES_KEPT = 2
"""Responses per rollout that go into samples.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A rank's share of a rollout."""

    batch: RolloutBatch
    metrics: dict[str, tuple[float, float]]
    """(sum, count) on this rank by name."""
    samples: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A rank's problems of a rollout, and as prompts."""

    problems: list[Problem]
    prompts: Prompts


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Draws the prompts of a step and turns them into a rollout."""

    engine: RolloutEngine
    tokenizer: Any
    problems: list[Problem]
    template: PromptTemplate
    checker: AnswerChecker
    reward_options: RewardOptions
    options: RolloutConfig
    max_prompt_tokens: int
    advantage_scale: str = "std"
    """`std` or `none`, see `group_advantages`."""
    drop_flat_groups: bool = False
    """Whether responses of a group without spread keep no token to learn from."""
    guidance: Guidance | None = None
    """The teacher's right responses, for groups that have none."""
    ahead: DrawsAhead | None = None
    """The engine, where the next rollout is drawn while this one is learnt from."""
    steps: int = 0
    """Rollouts of the run, behind whose last none is begun."""
    seed: int
    rank: int
    world: int
    device: torch.device
    _begun: dict[int, Any] = field(init=False, default_factory=dict)
    """Responses that are drawn ahead, by step."""

    def collect(self, step: int) -> Rollout:
        """The rollout of `step`: a function of the weights, the step and the seed. Collective.

        With `ahead` the responses of the next one are begun with the same weights, before this one is learnt from.
        """
        asked = self._asked(step)
        problems, prompts = asked.problems, asked.prompts
        responses = self._responses(step, asked)
        texts = self._decode(responses)
        golds = [problem.answer for problem in problems for _ in range(self.options.group_size)]
        rewards = self._score(texts, golds, responses.ended_B.tolist())
        group_size = self.options.group_size
        samples, metrics = _samples(problems, texts, rewards, group_size), _metrics(rewards, responses, group_size)
        failure_P = 1 - torch.tensor([reward.correct for reward in rewards]).view(-1, group_size).mean(dim=1)
        behind = 0.0 if responses.versions_B is None else float((step - responses.versions_B).sum())
        metrics["rollout_staleness"] = (behind, len(rewards))
        if self.guidance is not None:
            responses, rewards, guided = self._guided(step, problems, responses, rewards)
            metrics["groups_guided"] = (float(guided), len(problems))
        totals_PG = torch.tensor([reward.total for reward in rewards]).view(-1, group_size)
        advantage_B = group_advantages(totals_PG, scale=self.advantage_scale).flatten().to(self.device)
        # A group without a usable gold answer is dropped: its responses keep no token to learn from. All of it, since
        # advantages compare its responses, and some of them may be judged without reading the gold answer.
        usable_P = torch.tensor([reward.usable for reward in rewards]).view(-1, group_size).all(dim=1)
        if self.drop_flat_groups:
            usable_P &= ~groups_without_spread(totals_PG)
        usable_B = usable_P.repeat_interleave(group_size).to(self.device)
        batch = RolloutBatch(
            prompt_ids_BT=prompts.ids_PT.repeat_interleave(group_size, dim=0),
            prompt_mask_BT=prompts.mask_PT.repeat_interleave(group_size, dim=0),
            response_ids_BR=responses.ids_BR,
            response_mask_BR=responses.mask_BR & usable_B[:, None],
            advantage_B=advantage_B,
            failure_B=failure_P.repeat_interleave(group_size).to(self.device),
            rollout_logprobs_BR=responses.logprobs_BR,
            routes_BLNK=responses.routes_BLNK,
        )
        for index, sample in enumerate(samples):
            sample["advantage"] = float(advantage_B[index])
        return Rollout(batch=batch, metrics=metrics, samples=samples)

    def _asked(self, step: int) -> Asked:
        rows = batch_indices(step, self.options.prompts, len(self.problems), self.seed)
        problems = [self.problems[row] for row in rows[self.rank :: self.world]]
        texts = [render(self.template, problem, self.tokenizer) for problem in problems]
        encoded = prompt_batch(texts, self.tokenizer, self.max_prompt_tokens)
        # By the place in the whole rollout: responses are the same on any number of ranks.
        seeds = [derive_seed(self.seed, step, place) for place in range(len(rows))]
        prompts = Prompts(
            ids_PT=encoded["input_ids_BT"].to(self.device),
            mask_PT=encoded["attention_mask_BT"].to(self.device),
            seeds=seeds[self.rank :: self.world],
        )
        return Asked(problems=problems, prompts=prompts)

    def _responses(self, step: int, asked: Asked) -> Responses:
        if self.ahead is None:
            with self.engine.ready(step):
                return self._generate(asked.prompts)
        begun = self._begun.pop(step, None)
        responses = None if begun is None else self.ahead.finish(begun, step)
        if responses is not None and step + 1 == self.steps:
            return responses
        with self.ahead.ready(step):
            responses = responses or self._generate(asked.prompts)
            if step + 1 < self.steps:
                self._begun[step + 1] = self.ahead.begin(self._asked(step + 1).prompts, self._sampling)
        return responses

    def _score(self, texts: list[str], golds: list[str], ended: list[bool]) -> list[Reward]:
        return score_responses(texts, golds, ended, self.checker, self.reward_options)

    def _guided(
        self, step: int, problems: list[Problem], responses: Responses, rewards: list[Reward]
    ) -> tuple[Responses, list[Reward], int]:
        """With a right response of the teacher in the last place of every group that has no right one.

        It is judged as any other; one that is wrong here, or too long, is not taken. Also: how many were.
        """
        assert self.guidance is not None
        group_size, draw = self.options.group_size, derive_seed(self.seed, step, self.rank)
        found: dict[int, tuple[str, str, list[int]]] = {}
        for index, problem in enumerate(problems):
            own = rewards[index * group_size : (index + 1) * group_size]
            text = self.guidance.response(problem.question, draw)
            if text is None or any(reward.correct for reward in own):
                continue
            ids = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            if len(ids) <= self.options.max_new_tokens:
                found[(index + 1) * group_size - 1] = (text, problem.answer, ids)
        judged = self._score(
            [text for text, _, _ in found.values()], [gold for _, gold, _ in found.values()], [True] * len(found)
        )
        taken = {row: reward for row, reward in zip(found, judged, strict=True) if reward.correct}
        rows = {row: found[row][2] for row in taken}
        rewards = [taken.get(row, reward) for row, reward in enumerate(rewards)]
        return with_responses(responses, rows, self.tokenizer.pad_token_id), rewards, len(rows)

    @property
    def _sampling(self) -> Sampling:
        return Sampling(
            group_size=self.options.group_size,
            max_new_tokens=self.options.max_new_tokens,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            share_prefill=self.options.share_prefill,
        )

    def _generate(self, prompts: Prompts) -> Responses:
        return generate_in_batches(
            lambda part: self.engine.generate(part, self._sampling),
            prompts,
            self.options.prompts_per_batch or len(prompts.ids_PT),
            self.tokenizer.pad_token_id,
        )

    def _decode(self, responses: Responses) -> list[str]:
        rows = zip(responses.ids_BR.tolist(), responses.mask_BR.tolist(), strict=True)
        real = [[token for token, kept in zip(ids, mask, strict=True) if kept] for ids, mask in rows]
        return self.tokenizer.batch_decode(real, skip_special_tokens=True)


def _metrics(rewards: list[Reward], responses: Responses, group_size: int) -> dict[str, tuple[float, float]]:
    usable = [reward for reward in rewards if reward.usable]
    totals_PG = torch.tensor([reward.total for reward in rewards]).view(-1, group_size)
    n = len(rewards)
    return {
        "reward": (sum(r.total for r in usable), len(usable)),
        "reward_correct": (sum(r.correct for r in usable), len(usable)),
        "reward_format": (sum(r.format for r in usable), len(usable)),
        "gold_unparsable": (n - len(usable), n),
        "answer_missing": (sum(r.status == "no_answer" for r in rewards), n),
        "answer_check_failed": (sum(r.status in ("timeout", "error") for r in rewards), n),
        "response_tokens": (float(responses.mask_BR.sum()), n),
        "response_truncated": (float((~responses.ended_B).sum()), n),
        "groups_without_spread": (float(groups_without_spread(totals_PG).sum()), len(totals_PG)),
    }


def _samples(
    problems: list[Problem],
    texts: list[str],
    rewards: list[Reward],
    group_size: int,
) -> list[dict[str, Any]]:
    return [
        {
            "question": problems[index // group_size].question,
            "gold": problems[index // group_size].answer,
            "response": texts[index],
            "reward": rewards[index].total,
            "status": rewards[index].status,
        }
        for index in range(min(SAMPLES_KEPT, len(texts)))
    ]
