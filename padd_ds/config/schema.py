"""Every option of a training run: its sections, and what they must have in common."""

from typing import Literal

from pydantic import Field, model_validator

from padd_ds.config.sections import (
    BalanceConfig,
    CheckpointConfig,
    Count,
    DataConfig,
    DistillationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    RoutingConfig,
    VllmConfig,
    WarmupConfig,
    section,
)


@section
class RunConfig:
    """One training run."""

    stage: Literal["teacher_grpo", "warmup", "joint"]
    """What to train: the dense teacher, by the policy loss alone; the student's experts; or the student, jointly."""
    run_dir: str
    """Folder that the run leaves; it must not exist, unless --resume."""
    deepspeed: str
    """DeepSpeed JSON: ZeRO stage, expert parallelism, precision, gradient clipping."""
    steps: Count
    """Warm-up: optimiser steps (PADD: 1000). Otherwise rollouts (PADD: 600, for the teacher 200 to 300)."""
    micro_batch_size: Count = 4
    """Sequences that one rank runs at a time in training."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a third slower."""
    seed: int = 0
    """Everything random follows from it."""
    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig
    warmup: WarmupConfig = Field(default_factory=WarmupConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @model_validator(mode="after")
    def _one_source_of_data(self) -> "RunConfig":
        if not self.reads_corpora:
            if self.data.source is None:
                raise ValueError("data.source is missing; set it in the file or as data.source=VALUE")
            return self
        if self.data != DataConfig():
            raise ValueError(
                "warmup.corpora takes the place of the whole data section: leave that out (on the command line: "
                "data={}), or set warmup.corpora=[]"
            )
        for key in ("responses", "teacher_cache"):
            if getattr(self.warmup, key) is not None:
                raise ValueError(
                    f"warmup.{key} answers the questions of data.source, which warmup.corpora takes the place of: "
                    f"set warmup.{key}=null, or warmup.corpora=[]"
                )
        return self

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> "RunConfig":
        key = "warmup.kd_weight" if self.stage == "warmup" else "distillation.weight"
        if self.needs_teacher and self.model.teacher is None:
            raise ValueError(f"{key} is {self.kd_weight}, so model.teacher is needed; give it, or set {key}=0")
        return self

    @model_validator(mode="after")
    def _the_cache_has_its_own_top_k(self) -> "RunConfig":
        if self.warmup.teacher_cache is not None and self.warmup.teacher_top_k is not None:
            raise ValueError("warmup.teacher_cache holds as many tokens as it was recorded with; drop teacher_top_k")
        return self

    @model_validator(mode="after")
    def _aux_loss_reaches_a_router(self) -> "RunConfig":
        if self.stage == "joint" and self.balance.kind == "aux_loss" and not self.routing.train_router:
            raise ValueError("balance.kind is aux_loss, which acts on the router: set routing.train_router=true")
        return self

    @model_validator(mode="after")
    def _servers_know_the_bias(self) -> "RunConfig":
        if self.uses_vllm and self.balances_by_bias and self.balance.target == "logit":
            raise ValueError(
                "balance.target is logit, a bias that no checkpoint and no vLLM server knows: set "
                "balance.target=selection, or rollout.engine=hf"
            )
        return self

    @model_validator(mode="after")
    def _importance_is_that_of_the_whole_distribution(self) -> "RunConfig":
        if self.has_rollouts and self.policy.importance_cap is not None and self.rollout.top_p < 1:
            raise ValueError(
                f"policy.importance_cap cannot correct for rollout.top_p {self.rollout.top_p}, as the rollout's "
                "likelihoods are taken before it: set rollout.top_p=1, or policy.importance_cap=null"
            )
        return self

    @model_validator(mode="after")
    def _what_is_drawn_ahead_is_corrected(self) -> "RunConfig":
        if not self.has_rollouts or self.rollout.max_staleness == 0:
            return self
        if not self.uses_vllm:
            raise ValueError("rollout.max_staleness is 1, which is for servers: set rollout.engine=vllm, or 0")
        if self.vllm.servers is None and self.vllm.sleep is not False:
            raise ValueError(
                "rollout.max_staleness is 1, so servers draw while the student is trained: set vllm.sleep=false, or "
                "vllm.servers for servers on nodes of their own"
            )
        if self.policy.importance_cap is None:
            raise ValueError(
                "rollout.max_staleness is 1, so responses are older than the policy that learns from them: set "
                "policy.importance_cap, for example to 2"
            )
        return self

    @model_validator(mode="after")
    def _guidance_is_not_the_rollouts(self) -> "RunConfig":
        if self.rollout.guidance is not None and self.policy.importance_cap is not None:
            raise ValueError(
                "policy.importance_cap needs the rollout's likelihoods, which responses of rollout.guidance have none "
                "of: set one of them to null"
            )
        return self

    def kd_weight_at(self, step: int) -> float:
        """The weight of the distillation loss of joint training at a step."""
        left = 1 - step / self.steps if self.distillation.schedule == "linear" else 1.0
        return self.kd_weight * left

    @property
    def kd_weight(self) -> float:
        """Of the distillation loss of this stage; the teacher itself has no teacher."""
        return {"warmup": self.warmup.kd_weight, "joint": self.distillation.weight, "teacher_grpo": 0.0}[self.stage]

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself has to be there."""
        return self.kd_weight > 0 and not self.reads_cache

    @property
    def reads_cache(self) -> bool:
        """Whether the teacher's likelihoods come from a file."""
        return self.stage == "warmup" and self.kd_weight > 0 and self.warmup.teacher_cache is not None

    @property
    def reads_corpora(self) -> bool:
        """Whether the stage learns from tokenised corpora instead of problems."""
        return self.stage == "warmup" and bool(self.warmup.corpora)

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM servers draw the responses."""
        return self.has_rollouts and self.rollout.engine == "vllm"

    @property
    def longest_wait_for_servers_s(self) -> float:
        """How long one rank may have to wait for its server while the others wait for it."""
        return self.vllm.start_timeout_s + self.vllm.answer_timeout_s if self.uses_vllm else 0.0

    @property
    def servers_tell_experts(self) -> bool:
        """Whether vLLM servers tell the experts of every token."""
        told = self.vllm.tell_experts or self.routing.replay == "rollout"
        return self.stage == "joint" and self.uses_vllm and told

    def is_logged(self, step: int) -> bool:
        """Whether a step leaves a line in metrics.jsonl."""
        return step % self.log.every_steps == 0 or step + 1 == self.steps

    def measures_gradients(self, step: int) -> bool:
        """Whether the terms' own gradients are measured at a step."""
        every = self.log.gradients_every_steps
        return every > 0 and step % every == 0 and self.is_logged(step)

    @property
    def has_rollouts(self) -> bool:
        """Whether a step begins with responses of the model that is trained."""
        return self.stage != "warmup"

    @property
    def balances_by_bias(self) -> bool:
        """Whether joint training moves the bias of the routers."""
        return self.stage == "joint" and self.balance.kind in ("reward_augmented", "loss_free")

    @property
    def data_part(self) -> str:
        """The part of the hash split that this stage trains on."""
        return self.data.part or ("C" if self.has_rollouts else "B")
