"""The sections of a training run's options.

Frozen dataclasses, validated by pydantic when they are made: unknown keys, wrong types and values
out of range are errors. A field's docstring gives its unit, its range and the equation it comes from.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=False)
section = dataclass(frozen=True, kw_only=True, config=_STRICT)


def _off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


@section
class ModelConfig:
    student: str
    """The model to train: a folder of padd-convert or padd-export; with stage teacher_grpo a dense folder or hub id."""
    teacher: str | None = None
    """The dense teacher: a Hugging Face folder or hub id. Needed wherever a distillation weight is above 0."""
    teacher_placement: Literal["replicated", "sharded", "offloaded"] = "replicated"
    """Where the weights of the frozen models are, the teacher and the reference of policy.kl_weight: whole on every
    rank; spread over the ranks by ZeRO-3, each layer gathered as it runs; or that, from the ranks' host memory. Less
    memory, more communication."""
    reference: str | None = None
    """What policy.kl_weight holds the student to: a folder or hub id; default: model.student as it began."""
    targets: str | None = None
    """Folder with padd_targets.safetensors; default: the student's own folder."""
    expert_compute: Literal["dispatched", "masked"] = "dispatched"
    """`dispatched`: tokens are sent to their experts. `masked`, for narrow experts on a CPU: to ranks, which run all
    their experts on them and weigh the unchosen with 0, the same up to rounding."""
    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint. Only for sources that you trust."""


@section
class FieldsConfig:
    question: str = "question"
    """Column that holds the question."""
    answer: str = "answer"
    """Column that holds the gold answer."""
    solution: str | None = None
    """Column that holds a worked solution; without one the answer is the supervised target."""
    subject: str | None = None
    """Column that labels the subdomain, for routing analysis."""


@section
class DataConfig:
    source: str | None = None
    """JSONL, JSON or parquet file, a folder of them, or a hub dataset name. Needed, except by a warm-up with
    warmup.corpora."""
    split: str | None = None
    """Split of a hub dataset (there usually `train`), or how the file names of a folder begin."""
    fields: FieldsConfig = Field(default_factory=FieldsConfig)
    """Which columns hold what."""
    gold_format: Literal["plain", "gsm8k", "boxed"] = "plain"
    """How the gold answer stands in its column: as it is, after `####`, or in the last \\boxed{}."""
    part: Literal["A", "B", "C", "D", "all"] | None = None
    """Part of the hash split to train on; default: B for the warm-up, C for the stages with rollouts."""
    part_fractions: dict[str, Fraction] = Field(default_factory=lambda: {"A": 0.10, "B": 0.20, "C": 0.65, "D": 0.05})
    """Shares of the parts A (statistics), B (warm-up), C (joint), D (held-out); they add up to 1."""
    benchmarks: list[str] = Field(default_factory=list)
    """Files whose questions must not be trained on: matches are dropped, counted and listed."""
    benchmark_field: str = "question"
    """Column of the benchmark files that holds the question."""
    template: str = "plain"
    """Name of a prompt template (plain, boxed, qa, chat, chat-boxed, qwen-math, r1), or text with {question} in it."""
    chat: bool = False
    """Wrap a text template as a user's turn in the tokenizer's chat template."""
    target: str = "{solution}"
    """Supervised target of the warm-up; {solution} and {answer} are filled in."""
    max_prompt_tokens: Count = 512
    """Questions whose prompt is longer are dropped and counted."""
    max_target_tokens: Count = 512
    """Prompt and target together are cut at max_prompt_tokens + max_target_tokens, and counted."""

    @model_validator(mode="after")
    def _fractions_add_up(self) -> "DataConfig":
        if set(self.part_fractions) != set("ABCD") or abs(sum(self.part_fractions.values()) - 1) > 1e-6:
            raise ValueError("part_fractions needs the keys A, B, C, D, and they must add up to 1")
        return self


@section
class OptimizerConfig:
    learning_rate: Positive
    """Peak learning rate of AdamW. PADD: 2e-5 for the warm-up, 1e-6 for joint training."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay. PADD: 0.01."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's moment decays."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up steps; linear and cosine fall to 0 at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps over which the learning rate rises from 0."""


@section
class CorpusConfig:
    prefix: str
    """Path of a megatron-core indexed dataset without .bin and .idx, as tools/make_corpus.py writes it."""
    weight: Positive = 1.0
    """Share of the sequences that come from it, relative to the other corpora's."""


@section
class WarmupConfig:
    """Stage I b: only the experts learn, from text, the teacher and the clusters."""

    batch_size: Count = 32
    """Sequences per optimiser step, over all ranks."""
    kd_weight: NonNegative = 0.5
    """alpha: weight of L_KD, the divergence over the next token."""
    kd_direction: Literal["forward", "reverse", "jsd"] = "forward"
    """Choice: `forward` is KL(teacher || student), `reverse` KL(student || teacher), `jsd` lies between."""
    init_weight: NonNegative = 0.1
    """beta: weight of L_init, the divergence of expert activity from the clusters' p_T."""
    init_tokens: Count = 256
    """Tokens per rank, layer and micro-batch on which every expert's activity is measured for L_init."""
    routing: Literal["routed", "sample", "dense"] = "routed"
    """Choice: `routed` lets the frozen router choose; `sample` (the paper's) draws K experts per token
    uniformly; `dense` applies all experts with equal weight."""
    train_shared_experts: bool = True
    """Choice: the always-active experts learn too."""
    teacher_top_k: Count | None = None
    """Keep only the teacher's k most likely tokens and one bucket for the rest; default: all."""
    responses: str | None = None
    """Folder written by padd-cache with --responses: the teacher's right responses are learnt beside the data's own
    targets, whatever part of the data they answer."""
    teacher_cache: str | None = None
    """Folder written by padd-cache with the teacher's likelihoods of these targets, in place of model.teacher."""
    corpora: list[CorpusConfig] = Field(default_factory=list)
    """Tokenised corpora to learn from in place of the data section: a list of {prefix, weight}."""
    sequence_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens of a sequence of the corpora, into which whole documents are packed; longer documents are cut."""


@section
class RolloutConfig:
    engine: Literal["hf", "vllm"] = "hf"
    """What draws the responses: transformers' generate on the student as it is trained, or vLLM servers that are given
    its weights before every rollout (section vllm)."""
    prompts: Count = 16
    """Prompts per rollout, over all ranks. PADD: 16."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """G: responses per prompt. PADD: 8."""
    max_new_tokens: Count = 512
    """Longest response; a longer one is cut and counted as truncated."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling mass; below 1 the sampling distribution is not the trained one."""
    share_prefill: bool = True
    """Run each prompt once and copy its cache to the G samples."""
    prompts_per_batch: Count | None = None
    """Prompts whose groups are generated together on one rank; default: all of the rank's."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """How many rollouts the student may have learnt from since the weights that draw one. 1: servers draw the next
    rollout while this one is learnt from."""
    guidance: str | None = None
    """Folder written by padd-cache with --responses. In a group without a right response, the last one gives way to one
    of the teacher's right ones to that question, where there is one. Default: the student's own responses alone."""


@section
class VllmConfig:
    """The servers of rollout.engine=vllm. docs/rollouts.md tells how to install vLLM and what to set when."""

    python: str | None = None
    """Python that has vLLM, which may be another environment's; default: the one that trains."""
    ranks_per_server: Count = 1
    """Neighbouring ranks of one node that share a server; the first of them starts it."""
    tensor_parallel: Count = 1
    """GPUs of a server: those of the first of its ranks."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of a GPU's memory that a server takes while it is awake, weights included. (On a CPU: of the host's.)"""
    cache_gib: Positive | None = None
    """GiB for keys and values, in place of what memory_share leaves; on a CPU give it."""
    sleep: bool | None = None
    """Whether a server gives its memory back while the student is trained; default: on a GPU yes, on a CPU, where
    vLLM cannot, no."""
    exchange: str | None = None
    """Folder through which weights go to the servers, whole on every node; default: in the node's own memory
    (/dev/shm). Experts that are spread over nodes need a folder that all nodes see, and so do servers."""
    servers: list[str] | str | None = None
    """Servers on nodes of their own (padd-serve): their URLs, or a file of a URL a line. Default: every
    ranks_per_server ranks start one on their GPUs."""
    transport: Literal["files", "network"] = "files"
    """How weights come to servers: through exchange, or from rank 0 by NCCL (on a CPU by gloo)."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of a node's first server, its next one takes the next; 0: free ones."""
    start_timeout_s: Positive = 900.0
    """Seconds until a server is ready."""
    answer_timeout_s: Positive = 900.0
    """Seconds that any answer may take, a prompt's whole group of responses too; then the server counts as hung."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often in one rollout a server that died, hangs or answers garbage is started again before the run ends."""
    tell_experts: bool = False
    """Whether servers tell with each response the experts of all its tokens, for router_flips_rollout; with
    routing.replay=rollout they do anyway. On a GPU only."""
    arguments: list[str] = Field(default_factory=list)
    """Further arguments of vLLM's server."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of vLLM's server."""

    @model_validator(mode="after")
    def _a_server_has_its_ranks_gpus(self) -> "VllmConfig":
        if self.servers is None and self.tensor_parallel > self.ranks_per_server:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} is more than the GPUs of ranks_per_server "
                f"{self.ranks_per_server}; raise that"
            )
        return self

    @model_validator(mode="after")
    def _weights_reach_every_server(self) -> "VllmConfig":
        if self.servers is None and self.transport == "network":
            raise ValueError(
                "transport is network, but the ranks start their servers themselves: set servers, or files"
            )
        if self.servers is not None and self.transport == "files" and self.exchange is None:
            raise ValueError("servers read weights from a folder: set exchange to one that all nodes see, or transport")
        if self.servers is not None and self.sleep:
            raise ValueError("servers have their GPUs to themselves: leave sleep out")
        return self


@section
class RewardConfig:
    answer_format: str = "auto"
    """Where the answer stands in a response: auto, boxed, hash, tag, last_number, first_line, pattern."""
    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer; with answer_format pattern."""
    format_pattern: str | None = None
    """Regular expression that a well-formed response matches; default: an answer was found."""
    correct_weight: NonNegative = 1.0
    """Reward of a verified answer."""
    format_weight: NonNegative = 0.1
    """Reward of a well-formed response that ended by itself."""
    workers: Count = 1
    """Processes per rank that check answers."""
    timeout_s: Positive = 5.0
    """Seconds that one answer may take to check; then it counts as wrong."""


@section
class DistillationConfig:
    """Stage II: online adaptive distillation on the student's own responses."""

    weight: NonNegative = 0.5
    """w_kd. 0 switches the teacher off."""
    schedule: Literal["constant", "linear"] = "constant"
    """Choice: whether the weight stays, or falls linearly towards 0 at the last step."""
    weighting: Literal["uniform", "failure"] = "uniform"
    """Choice: all responses alike, or each by the share of wrong ones in its group: where the student is far off."""
    direction: Literal["forward", "reverse", "jsd"] = "forward"
    """Choice: KL(teacher || student), KL(student || teacher), or Jensen-Shannon."""
    temperature_rule: Literal["confident", "literal", "fixed"] = "confident"
    """Choice: Phi(A) = 1 - tanh(kappa A), as the paper says in words; 1 + tanh(kappa A), as it prints; or 1."""
    temperature: Positive = 1.0
    """tau, the base temperature of the teacher."""
    temperature_slope: NonNegative = 0.5
    """kappa: how much the advantage bends the temperature."""
    temperature_floor: Positive = 0.25
    """Choice: Phi does not fall below this."""
    temperature_ceiling: Positive = 2.0
    """Choice: Phi does not rise above this; 2 (Phi's own limit) changes nothing, 1 leaves the teacher as it is on bad
    paths."""
    teacher_top_k: Count | None = None
    """Keep only the teacher's k most likely tokens and one bucket for the rest; default: all."""

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> "DistillationConfig":
        if self.temperature_floor > self.temperature_ceiling:
            raise ValueError(
                f"temperature_floor {self.temperature_floor} is above temperature_ceiling {self.temperature_ceiling}; "
                "lower the one or raise the other"
            )
        return self


@section
class PolicyConfig:
    """Stage III: path-refined policy optimisation."""

    objective: Literal["pr_grpo", "grpo", "dr_grpo", "gspo", "rspo"] = "pr_grpo"
    """PADD's PR-GRPO; GRPO; Dr. GRPO (arXiv 2503.20783); GSPO, a ratio per response (2507.18071); RSPO (2510.23027)."""
    updates_per_rollout: Annotated[int, Field(ge=1)] = 4
    """Optimiser steps per rollout, each on its own share of the responses. With 1, PR-GRPO equals GRPO."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """epsilon below 1; default: 0.2, with gspo 3e-4."""
    clip_high: Positive | None = None
    """epsilon above 1; default: 0.2, with gspo 4e-4."""
    shift_penalty: NonNegative = 0.1
    """lambda: how strongly PR-GRPO discounts the ratio of a bad response by the router shift."""
    shift_measure: Literal["absolute", "relative", "selected"] = "absolute"
    """Choice: ||g - g_old||, the same divided by ||g_old||, or |log g - log g_old| over the chosen experts (rspo's)."""
    shift_floor: Fraction = 0.8
    """RSPO does not discount a ratio below this share of it."""
    normalisation: Literal["response", "token", "constant"] | None = None
    """`response`: the mean over a response's tokens, then over responses (the paper; default); `token`: over all
    tokens; `constant`: a response's sum divided by rollout.max_new_tokens (dr_grpo takes this one only)."""
    advantage_scale: Literal["std", "none"] | None = None
    """Whether advantages are divided by the standard deviation of their group; default: yes, with dr_grpo no."""
    drop_flat_groups: bool = False
    """Leave groups of equal rewards, which have no advantage, out of the means and of the distillation too."""
    kl_weight: NonNegative = 0.0
    """Weight of KL(student || reference) beside the policy loss, whose means it shares; the paper has none."""
    importance_cap: Positive | None = None
    """Multiply advantages by min(old policy / rollout, cap) per token, where the rollout may draw from another
    distribution than training computes (another engine or precision); rollout.top_p must be 1. Default: no
    correction."""
    weight: NonNegative = 1.0
    """Weight of the policy loss beside the distillation loss."""

    @model_validator(mode="after")
    def _dr_grpo_is_what_it_is(self) -> "PolicyConfig":
        if self.objective == "dr_grpo" and self.normalisation not in (None, "constant"):
            raise ValueError(f"normalisation is {self.normalisation}, but dr_grpo takes constant only; or choose grpo")
        return self


@section
class BalanceConfig:
    """Stage IV: reward-augmented load balancing, or another kind in its place."""

    kind: Literal["reward_augmented", "loss_free", "aux_loss", "none"] = "reward_augmented"
    """PADD's; a bias step of fixed size without reward (arXiv 2408.15664); an auxiliary loss on the router's
    probabilities (arXiv 2101.03961); or nothing, the selection bias then stays as it is."""
    aux_weight: NonNegative = 0.01
    """Weight of the auxiliary loss, which is 1 for an even load."""
    load_rate: NonNegative = 0.01
    """eta: step of the load term, in units of the layer's spread of router scores."""
    reward_rate: NonNegative = 0.05
    """gamma: weight of the advantage term, in the same units."""
    ema_weight: Annotated[float, Field(gt=0, le=1)] = 0.2
    """lam: weight of the newest advantage in the moving average."""
    sign: Literal["corrective", "literal"] = "corrective"
    """Choice: push down an overloaded expert (as the text says), or push it up (as printed)."""
    reward_bias: Literal["offset", "integrated"] = "offset"
    """Choice: bias = integrated load + gamma * EMA, or both integrated (as printed)."""
    centred: bool = True
    """Choice: subtract the mean over experts from the advantage term."""
    clamp: Positive | None = 2.0
    """Choice: largest bias, in units of the spread of router scores; null: no limit (as printed)."""
    scale_by_spread: bool = True
    """Choice: measure eta, gamma and the clamp in spreads of router scores; off: in raw scores (as printed)."""
    target: Literal["selection", "logit"] = "selection"
    """Choice: add the bias to the scores that select (it survives export), or to the logits (as printed)."""


@section
class RoutingConfig:
    noise: NonNegative = 0.0
    """Standard deviation of normal noise on the selection while training, in spreads of the router's scores."""
    train_router: bool = True
    """Whether joint training changes the router."""
    replay: Annotated[Literal["off", "old_policy", "rollout"], BeforeValidator(_off)] = "off"
    """Whether an update routes every token as the policy before the first update of its rollout did (`old_policy`), or
    as the rollout itself did (`rollout`, for the scoring before the updates too); weights follow the new policy."""


@section
class CheckpointConfig:
    every_steps: Count = 100
    """Steps between checkpoints; the last step always leaves one."""
    keep: Count = 2
    """Newest checkpoints that stay on disk."""


@section
class LogConfig:
    every_steps: Count = 1
    """Steps between lines of metrics.jsonl and tensorboard."""
    routing_every_steps: Count = 10
    """Steps between lines of routing/routing.jsonl (per layer and expert)."""
    gradients_every_steps: Annotated[int, Field(ge=0)] = 10
    """Steps between measurements of the gradient norm of every term of the loss alone, where they leave a line in
    metrics.jsonl, on a micro-batch that is drawn:
    one more forward pass, a backward pass per term, and room for the gradients of the rank's parameters once more. 0:
    never, and never at ZeRO stage 3, which knows whole backward passes only."""
    tensorboard: bool = True
    """Write tensorboard event files."""
    report: bool = True
    """Write report.html, a page with curves, heat maps, responses and configuration, when the last step is done."""
    wandb: str | None = None
    """Project of Weights & Biases that the metrics also go to; needs the package wandb, whose environment variables
    (WANDB_MODE=offline, WANDB_ENTITY) hold."""
