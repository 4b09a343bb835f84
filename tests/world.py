"""A tiny world to train in: tokenizer, student, teacher and problems, built the same on every rank."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import DataConfig, ModelConfig, OptimizerConfig, RewardConfig, RolloutConfig
from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import Problem
from padd_ds.engine.frozen import Placement, place_frozen
from padd_ds.engine.ranks import Ranks
from padd_ds.engine.student import Student, build_student
from padd_ds.rollout.guidance import Guidance
from padd_ds.rollout.verify import AnswerChecker
from padd_ds.stages import build, joint
from padd_ds.stages.build import accumulation_steps, make_collector, optimiser_steps
from padd_ds.stages.joint import JointStage
from tests.tiny import tiny_student
from tools.tiny_model import make_tiny_model, make_tokenizer


def problems() -> list[Problem]:
    """Sums whose answers an untrained model finds now and then: the question decides, one digit answers."""
    pairs = itertools.product(range(4), range(4))
    return [Problem(question=f"{a}+{b}=", answer=str(a + b), solution=f"{a + b}", subject="sum") for a, b in pairs]


def deepspeed_tree(expert_parallel: int, stage: int = 2, **more: Any) -> dict[str, Any]:
    """What ds_configs/ would hold."""
    section = {"enabled": True, "autoep_size": expert_parallel, "use_grouped_mm": False}
    # Under ZeRO-3 parameters as small as these would stay whole.
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return {"zero_optimization": zero, "gradient_clipping": 1.0, "expert_parallel": section, **more}


def joint_config(**overrides: Any) -> RunConfig:
    """A joint run of two prompts with four responses each, two updates per rollout."""
    values: dict[str, Any] = {
        "stage": "joint",
        "run_dir": "unused",
        "deepspeed": "unused",
        "steps": 3,
        "micro_batch_size": 2,
        "model": ModelConfig(student="unused", teacher="unused"),
        "data": DataConfig(source="unused", max_prompt_tokens=16),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "rollout": RolloutConfig(prompts=2, group_size=4, max_new_tokens=6),
        "reward": RewardConfig(answer_format="pattern", answer_pattern=r"(\d)"),
        "policy": {"updates_per_rollout": 2},
    }
    return RunConfig(**(values | overrides))


@dataclass
class FixedChecker:
    """Rewards by a rule of the test, without processes."""

    correct: Any

    def check(self, pairs: Any) -> Any:
        from padd_ds.rollout.verify import Verdict

        return [Verdict(correct=self.correct(*pair), status="ok", extracted=pair[0][:1]) for pair in pairs]

    def close(self) -> None:
        pass


def make_student(ranks: Ranks, config: RunConfig, tree: dict[str, Any], trainable: Any = lambda name: True) -> Student:
    """The tiny student with the tokenizer's vocabulary under DeepSpeed."""
    model = tiny_student(vocabulary=len(make_tokenizer()))
    return build_student(
        model,
        config,
        tree,
        ranks,
        trainable=trainable,
        accumulation_steps=accumulation_steps(config, ranks.world),
        total_steps=optimiser_steps(config),
    )


def make_joint_stage(
    ranks: Ranks,
    config: RunConfig,
    expert_parallel: int,
    checker: Any = None,
    guidance: Guidance | None = None,
    zero_stage: int = 2,
    placement: Placement = "replicated",
) -> JointStage:
    """The stage as build.py makes it, from parts in memory."""
    tokenizer = make_tokenizer()
    tree = deepspeed_tree(expert_parallel, zero_stage)
    student = make_student(ranks, config, tree, lambda name: joint.is_trained(name, config.routing.train_router))
    teacher = place_frozen(make_tiny_model(), placement, torch.float32, ranks)
    reference = None
    if config.policy.kl_weight:
        reference = place_frozen(tiny_student(seed=1, vocabulary=len(tokenizer)), placement, torch.float32, ranks)
    checker = checker or AnswerChecker(AnswerFormat(name="pattern", pattern=config.reward.answer_pattern))
    collector = make_collector(config, student, tokenizer, problems(), checker, guidance)
    return build.make_joint_stage(config, student, teacher, reference, collector)
