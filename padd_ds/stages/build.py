"""From a configuration to a stage that is ready to run.

Everything that a user can get wrong is read and checked here before DeepSpeed starts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from padd_ds.config.deepspeed_json import (
    check_batches,
    check_grouped_products,
    check_parallelism,
    load_deepspeed_json,
    precision,
)
from padd_ds.config.schema import RunConfig
from padd_ds.conversion.targets import ConversionTargets, load_targets
from padd_ds.data.answers import AnswerFormat
from padd_ds.data.blend import Blend
from padd_ds.data.problems import Problem
from padd_ds.engine.families import expert_parallel_keys, is_dense
from padd_ds.engine.ranks import Ranks
from padd_ds.engine.student import Student, build_student
from padd_ds.errors import UserError
from padd_ds.hf import load_tokenizer, read_config
from padd_ds.losses.policy import CLIPS, PolicyOptions
from padd_ds.moe.balance import BalanceOptions
from padd_ds.offline.cache import TeacherCache
from padd_ds.rollout.collect import Collector
from padd_ds.rollout.generation import DrawsAhead
from padd_ds.rollout.guidance import Guidance
from padd_ds.rollout.rewards import RewardOptions
from padd_ds.rollout.verify import AnswerChecker
from padd_ds.rollout.vllm.server import check_experts_told, check_installed
from padd_ds.stages import joint, warmup
from padd_ds.stages.materials import (
    TrainingData,
    check_borders,
    check_sequence_length,
    check_vocabularies,
    load_reference,
    load_teacher,
    load_together,
    open_corpora,
    prompt_template,
    read_training_data,
)
from padd_ds.stages.rollouts import RolloutServers, rollout_engine, rollout_servers
from padd_ds.stages.stage import Stage
from padd_ds.stages.supervision import CorpusSupervision, ProblemSupervision, Supervision

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run was given, checked, with nothing large loaded yet."""

    config: RunConfig
    deepspeed_tree: dict[str, Any]
    dtype: torch.dtype
    tokenizer: Any
    data: TrainingData | Blend
    """A Blend where a warm-up reads corpora."""
    targets: ConversionTargets | None
    cache: TeacherCache | None
    guidance: Guidance | None


def read_inputs(config: RunConfig, world_size: int) -> Inputs:
    """Read and check all that is small; UserError on the first thing that is wrong."""
    json_path = Path(config.deepspeed)
    tree = load_deepspeed_json(json_path)
    trust = config.model.trust_remote_code
    student = read_config(config.model.student, trust_remote_code=trust)
    if config.stage == "teacher_grpo" and not is_dense(student):
        raise UserError(f"{config.model.student}: has experts, but stage teacher_grpo trains a dense model")
    if config.stage == "warmup" and is_dense(student) and config.warmup.init_weight > 0:
        raise UserError(f"{config.model.student}: has no experts to hold to clusters; set warmup.init_weight=0")
    if config.stage != "joint" and is_dense(student):
        check_parallelism(json_path, tree, world_size, None)
    else:
        expert_parallel_keys(student)
        check_parallelism(json_path, tree, world_size, student.n_routed_experts, config.model.expert_compute)
        if config.model.expert_compute == "dispatched":
            widths = {name: getattr(student, name) for name in ("hidden_size", "moe_intermediate_size")}
            check_grouped_products(json_path, tree, widths)
    check_batches(config, world_size)
    dtype = getattr(torch, precision(tree))
    if config.has_rollouts and config.policy.kl_weight > 0 and config.model.reference is not None:
        reference = read_config(config.model.reference, trust_remote_code=trust)
        check_vocabularies(f"model.reference {config.model.reference}", reference.vocab_size, student.vocab_size)
    if config.needs_teacher:
        assert config.model.teacher is not None
        teacher = read_config(config.model.teacher, trust_remote_code=trust)
        check_vocabularies(f"model.teacher {config.model.teacher}", teacher.vocab_size, student.vocab_size)
        if config.reads_corpora:
            check_sequence_length(config.warmup.sequence_length, f"model.teacher {config.model.teacher}", teacher)
    reward_rules(config)
    if config.uses_vllm and config.vllm.servers is None:
        check_installed(config.vllm)
        if config.servers_tell_experts:
            check_experts_told()
    tokenizer = load_tokenizer(config.model.student, trust_remote_code=trust)
    data: TrainingData | Blend
    if config.reads_corpora:
        check_sequence_length(config.warmup.sequence_length, f"model.student {config.model.student}", student)
        data = open_corpora(config, tokenizer, student.vocab_size)
    else:
        data = read_training_data(config, tokenizer)
    cache = _teacher_cache(config, student.vocab_size)
    if cache is not None and isinstance(data, TrainingData):
        _check_recorded(cache, ProblemSupervision(problems=data.problems, tokenizer=tokenizer, config=config))
    return Inputs(
        config=config,
        deepspeed_tree=tree,
        dtype=dtype,
        tokenizer=tokenizer,
        data=data,
        targets=_targets(config, student),
        cache=cache,
        guidance=_guidance(config),
    )


@contextmanager
def open_stage(inputs: Inputs, ranks: Ranks) -> Iterator[Stage]:
    """Build the stage; its worker processes and rollout servers end with the block."""
    config = inputs.config
    # Servers first: they measure what memory there is.
    with rollout_servers(config, inputs.dtype, ranks) as servers:
        stage = _build(inputs, ranks, servers)
        try:
            yield stage.as_stage()
        finally:
            if config.has_rollouts:
                stage.collector.checker.close()


def _build(inputs: Inputs, ranks: Ranks, servers: RolloutServers | None) -> Any:
    config = inputs.config
    student = _student(inputs, ranks)
    teacher = load_teacher(config, inputs.dtype, ranks) if config.needs_teacher else None
    if config.reads_corpora:
        if teacher is not None:
            check_borders(f"model.teacher {config.model.teacher}", teacher, student.model.config.vocab_size, ranks)
        if not student.layers:
            check_borders(
                f"model.student {config.model.student}", student.model, student.model.config.vocab_size, ranks
            )
    if config.stage == "warmup":
        return _warmup_stage(inputs, student, teacher)
    return _joint_stage(inputs, student, teacher, servers)


def _targets(config: RunConfig, student_config: Any) -> ConversionTargets | None:
    """The clusters' p_T where the warm-up needs it."""
    if config.stage != "warmup" or config.warmup.init_weight == 0:
        return None
    folder = Path(config.model.targets or config.model.student)
    targets = load_targets(folder)
    remedy = "convert with --calibration, or set warmup.init_weight=0"
    if targets.expert_prior_LE is None:
        raise UserError(f"{folder}: padd_targets.safetensors holds no p_T; {remedy}")
    n_sliced = student_config.num_hidden_layers - student_config.first_k_dense_replace
    shape = (n_sliced, student_config.n_routed_experts)
    if tuple(targets.expert_prior_LE.shape) != shape:
        raise UserError(
            f"{folder}: p_T is for {tuple(targets.expert_prior_LE.shape)} layers and experts, the student has {shape}"
        )
    return targets


def _teacher_cache(config: RunConfig, vocabulary: int) -> TeacherCache | None:
    """The teacher's recorded likelihoods where the warm-up reads them."""
    if not config.reads_cache:
        return None
    assert config.warmup.teacher_cache is not None
    cache = TeacherCache.open(Path(config.warmup.teacher_cache))
    if cache.top_k == 0:
        raise UserError(f"{cache.folder}: recorded with --top-k 0, so without likelihoods; set warmup.kd_weight=0")
    check_vocabularies(f"warmup.teacher_cache {cache.folder}", cache.facts["vocabulary"], vocabulary)
    return cache


def _check_recorded(cache: TeacherCache, supervision: ProblemSupervision) -> None:
    """UserError unless the cache has every target."""
    problems, missing = supervision.problems, 0
    for start in range(0, len(problems), 64):
        batch = supervision.batch(problems[start : start + 64])
        missing += cache.missing(batch["input_ids_BT"], batch["attention_mask_BT"], batch["target_mask_BR"])
    if missing:
        raise UserError(
            f"warmup.teacher_cache {cache.folder}: {missing} of {len(problems)} targets of the training data are not "
            "in it; record them with the same data, tokenizer, template and lengths"
        )


def _guidance(config: RunConfig) -> Guidance | None:
    """The teacher's recorded responses where the rollout takes them in."""
    if not config.has_rollouts or config.rollout.guidance is None:
        return None
    return Guidance.open(Path(config.rollout.guidance))


def _student(inputs: Inputs, ranks: Ranks) -> Student:
    config = inputs.config
    model = load_together(config.model.student, config, inputs.dtype, ranks)

    def trainable(name: str) -> bool:
        if config.stage == "warmup":
            return warmup.is_trained(name, config.warmup.train_shared_experts, is_dense(model.config))
        return joint.is_trained(name, config.routing.train_router)

    return build_student(
        model,
        config,
        inputs.deepspeed_tree,
        ranks,
        trainable=trainable,
        accumulation_steps=accumulation_steps(config, ranks.world),
        total_steps=optimiser_steps(config),
    )


def accumulation_steps(config: RunConfig, world: int) -> int:
    """Micro-batches per optimiser step; the last one may be smaller."""
    if config.stage == "warmup":
        rows = config.warmup.batch_size // world
    else:
        rows = config.rollout.prompts * config.rollout.group_size // world // config.policy.updates_per_rollout
    return -(-rows // config.micro_batch_size)


def optimiser_steps(config: RunConfig) -> int:
    """Optimiser steps of the whole run."""
    return config.steps * (config.policy.updates_per_rollout if config.has_rollouts else 1)


def options_from(section: Any, options: type[Options]) -> Options:
    """The fields of `options` that the configuration section has too, by name; the rest keep their defaults."""
    shared = {field.name for field in fields(options)} & {field.name for field in fields(section)}  # type: ignore[arg-type]
    return options(**{name: getattr(section, name) for name in shared})


def policy_options(config: RunConfig) -> PolicyOptions:
    """The constants of the run's objective, with what it does not say filled in."""
    policy, defaults = config.policy, PolicyOptions()
    clip_low, clip_high = CLIPS.get(policy.objective, (defaults.clip_low, defaults.clip_high))
    return PolicyOptions(
        clip_low=clip_low if policy.clip_low is None else policy.clip_low,
        clip_high=clip_high if policy.clip_high is None else policy.clip_high,
        shift_penalty=policy.shift_penalty,
        shift_floor=policy.shift_floor,
        normalisation=policy.normalisation or ("constant" if policy.objective == "dr_grpo" else "response"),
        constant_tokens=config.rollout.max_new_tokens,
    )


def balance_options(config: RunConfig) -> BalanceOptions | None:
    """The constants of Stage IV; None where the run does not move the routers' bias."""
    return options_from(config.balance, BalanceOptions) if config.balances_by_bias else None


def reward_rules(config: RunConfig) -> tuple[AnswerFormat, RewardOptions]:
    """How answers are found and weighed; UserError for an unknown format or a broken pattern."""
    reward = config.reward
    return (
        AnswerFormat(name=reward.answer_format, pattern=reward.answer_pattern),
        options_from(reward, RewardOptions),
    )


def _warmup_stage(inputs: Inputs, student: Student, teacher: Any) -> warmup.WarmupStage:
    supervision: Supervision
    if isinstance(inputs.data, Blend):
        pad_token_id = inputs.tokenizer.pad_token_id
        supervision = CorpusSupervision(blend=inputs.data, pad_token_id=pad_token_id, config=inputs.config)
    else:
        problems = inputs.data.problems
        supervision = ProblemSupervision(problems=problems, tokenizer=inputs.tokenizer, config=inputs.config)
    return warmup.WarmupStage(
        student=student,
        teacher=teacher,
        supervision=supervision,
        targets=inputs.targets,
        cache=inputs.cache,
        config=inputs.config,
    )


def _joint_stage(inputs: Inputs, student: Student, teacher: Any, servers: RolloutServers | None) -> joint.JointStage:
    config = inputs.config
    assert isinstance(inputs.data, TrainingData)
    answer_format, _ = reward_rules(config)
    checker = AnswerChecker(answer_format, workers=config.reward.workers, timeout_s=config.reward.timeout_s)
    reference = load_reference(config, inputs.dtype, student.ranks)
    collector = make_collector(
        config, student, inputs.tokenizer, inputs.data.problems, checker, inputs.guidance, servers
    )
    return make_joint_stage(config, student, teacher, reference, collector)


def make_collector(
    config: RunConfig,
    student: Student,
    tokenizer: Any,
    problems: list[Problem],
    checker: AnswerChecker,
    guidance: Guidance | None = None,
    servers: RolloutServers | None = None,
) -> Collector:
    """What draws, checks and weighs the responses of this rank. Collective with servers."""
    ranks, engine = student.ranks, rollout_engine(config, student, tokenizer, servers)
    return Collector(
        engine=engine,
        ahead=cast(DrawsAhead, engine) if config.rollout.max_staleness else None,
        steps=config.steps,
        tokenizer=tokenizer,
        problems=problems,
        template=prompt_template(config.data),
        checker=checker,
        reward_options=options_from(config.reward, RewardOptions),
        options=config.rollout,
        max_prompt_tokens=config.data.max_prompt_tokens,
        advantage_scale=config.policy.advantage_scale or ("none" if config.policy.objective == "dr_grpo" else "std"),
        drop_flat_groups=config.policy.drop_flat_groups,
        guidance=guidance,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
    )


def make_joint_stage(
    config: RunConfig, student: Student, teacher: Any, reference: Any, collector: Collector
) -> joint.JointStage:
    """The stage of these parts; `teacher` and `reference` None where the run has none."""
    return joint.JointStage(
        student=student,
        teacher=teacher,
        reference=reference,
        collector=collector,
        config=config,
        policy_options=policy_options(config),
        balance_options=balance_options(config),
    )
