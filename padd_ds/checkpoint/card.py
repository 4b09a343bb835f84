"""The model card of an exported student, from the facts that its run left; what is not known is left out."""

import json
import shlex
from pathlib import Path
from typing import Any

from padd_ds.checkpoint.facts import Facts, RunFacts
from padd_ds.checkpoint.layout import STUDENT
from padd_ds.checkpoint.weights import KEPT_IN_FP32, SavedWeights
from padd_ds.conversion.card import (
    CARD_NAME,
    Licence,
    card_text,
    code,
    front_matter,
    hub_id,
    known_as,
    licence_of,
    table,
)
from padd_ds.conversion.companions import STUDENT_KEYS

STAGES = {
    "warmup": "warm-up on given text",
    "joint": "joint training with rollouts",
    "teacher_grpo": "GRPO of the dense model",
}
TOLD_METRICS = {
    "loss_lm": "cross-entropy, nats per target token",
    "loss_kd": "divergence from the teacher, nats per token",
    "loss_init": "divergence from the clusters' prior, nats",
    "loss_policy": "policy loss",
    "reward": "reward per response",
    "reward_correct": "share of right answers among the responses drawn",
    "response_tokens": "tokens per response",
    "response_truncated": "share of responses cut off",
    "router_shift": "router shift",
    "load_max_violation": "load violation (0: even)",
    "load_dead_experts": "experts without a token",
    "router_entropy_nats": "entropy of the router, nats",
}
"""Metrics of the last step that the card tells, and what they are; docs/metrics.md has all of them."""


def licence(facts: RunFacts) -> Licence:
    """The licence that the run's student came with, else that of the folders it was made from."""
    sources = [facts.option("model.student"), _teacher(facts)]
    return licence_of([facts.run / STUDENT, *(Path(source).expanduser() for source in sources if source)])


def model_card(name: str, facts: RunFacts, config: Facts, weights: SavedWeights, check: str, format_name: str) -> str:
    """README.md of an export called `name`, in the Hub's form.

    config: the student's config.json. check: what came of the comparison with the live student. format_name: `hf` or
    `megatron`.
    """
    total, active = parameters(config, weights)
    told = licence(facts)
    keys = {"base_model": _base_model(facts), **told.keys, **STUDENT_KEYS, "datasets": _datasets(facts)}
    keys["tags"] = _tags(config)
    if format_name != "hf":
        del keys["library_name"]
    body = [
        _opening(facts, config),
        "## Sizes",
        table(_sizes(config, total, active, weights)),
        "## How it was made",
        *_history(facts),
        "The last of these:",
        table(_training(facts)),
        *_metrics(facts),
        "## Loading",
        *_loading(name, config, facts, format_name),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(facts, check)),
        "## Licence",
        told.told(),
    ]
    return card_text(keys, name, body)


def parameters(config: Facts, weights: SavedWeights) -> tuple[int, int]:
    """Parameters held, and those that a token passes through; the embedding counts, the selection bias does not."""
    sizes = {name: weights.stored[name].numel() for name in weights.names if not name.endswith(KEPT_IN_FP32)}
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    total = sum(sizes.values())
    return total, total - (
        routed - routed * config["num_experts_per_tok"] // config["n_routed_experts"] if routed else 0
    )


def _tags(config: Facts) -> list[str]:
    return list(STUDENT_KEYS["tags"]) if config.get("n_routed_experts") else ["padd"]


def _teacher(facts: RunFacts) -> str | None:
    source = facts.option("model.teacher") or facts.conversion.get("teacher", {}).get("source")
    return str(source) if source else None


def _base_model(facts: RunFacts) -> str | None:
    """The hub id of the model that the weights come from; None for one that is not known to be on the Hub."""
    if facts.conversion:
        named = front_matter(facts.run / STUDENT / CARD_NAME).get("base_model")
        source = facts.conversion.get("teacher", {}).get("source")
        return named or (hub_id(source) if source else None)
    source = facts.option("model.student")
    return hub_id(source) if source else None


def _datasets(facts: RunFacts) -> list[str]:
    source = facts.option("data.source")
    found = hub_id(source, "dataset") if source else None
    return [found] if found else []


def _opening(facts: RunFacts, config: Facts) -> str:
    kind = code((config.get("architectures") or [config["model_type"]])[0])
    if not config.get("n_routed_experts"):
        return f"A dense language model ({kind}), trained with padd_ds."
    source = facts.conversion.get("teacher", {}).get("source")
    made = f" made of the dense model {code(known_as(source))}" if source else ""
    return (
        f"A mixture-of-experts language model ({kind}){made} and trained with padd_ds, which implements PADD "
        "([arXiv 2606.10369](https://arxiv.org/abs/2606.10369))."
    )


def _sizes(config: Facts, total: int, active: int, weights: SavedWeights) -> dict[str, str]:
    rows = {"parameters": f"{total:,}", "of which active per token": f"{active:,} ({active / total:.0%})"}
    if config.get("n_routed_experts"):
        rows["routed experts per layer"] = f"{config['n_routed_experts']}, {config['num_experts_per_tok']} per token"
        rows["shared experts per layer"] = str(config.get("n_shared_experts") or 0)
        rows["width of an expert"] = str(config["moe_intermediate_size"])
        rows["dense layers"] = f"the first {config.get('first_k_dense_replace', 0)}"
    rows["layers"] = str(config["num_hidden_layers"])
    rows["width"] = str(config["hidden_size"])
    if "max_position_embeddings" in config:
        rows["context, tokens"] = str(config["max_position_embeddings"])
    kinds = {
        str(weights.meta(name).dtype).removeprefix("torch.")
        for name in weights.names
        if not name.endswith(KEPT_IN_FP32)
    }
    return rows | {
        "precision of the weights": ", ".join(sorted(kinds)),
        "size": f"{weights.total_bytes / 2**30:.3g} GiB",
    }


def _history(facts: RunFacts) -> list[str]:
    steps = []
    if facts.conversion:
        steps.append(_conversion(facts.conversion))
    steps += [_stage(one) for one in facts.earlier]
    done = {"run": facts.run.name, "step": facts.checkpoint.step, "stage": facts.checkpoint.facts["stage"]}
    steps.append(f"{_stage(done)}: this model.")
    return ["\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))]


def _stage(done: Facts) -> str:
    stage = done.get("stage", "")
    plural = "" if done.get("step") == 1 else "s"
    return (
        f"{STAGES.get(stage, code(stage))} (`stage: {stage}`), {done.get('step')} step{plural}, "
        f"run {code(done.get('run'))}"
    )


def _conversion(conversion: Facts) -> str:
    source, options = conversion.get("teacher", {}).get("source"), conversion.get("options", {})
    made = f"`padd-convert`{f' of {code(known_as(source))}' if source else ''}"
    if "cluster" in options and "router" in options:
        made += f", groups {code(options['cluster'])}, router {code(options['router'])}"
    if options.get("calibration"):
        made += f", calibrated on {code(known_as(options['calibration'], 'dataset'))}"
    return made


def _training(facts: RunFacts) -> dict[str, str]:
    """What is known of the last stage, a row each."""
    manifest, option = facts.checkpoint.facts, facts.option
    rows = {
        "teacher": _named(option("model.teacher")),
        "data": _data(facts),
        **_recorded(facts),
        "prompt template": option("data.template") if option("data.source") else None,
        "steps": f"{facts.checkpoint.step} of {option('steps')}" if option("steps") else str(facts.checkpoint.step),
        "learning rate": option("optimizer.learning_rate"),
        "schedule": option("optimizer.schedule"),
        "weight decay": option("optimizer.weight_decay"),
        **_objective(facts),
        "seed": option("seed"),
        "ranks": manifest.get("world"),
        "ZeRO stage": manifest.get("zero_stage"),
        "expert-parallel size": manifest.get("expert_parallel"),
        "versions": _versions(facts.environment),
        "commit of padd_ds": facts.environment.get("commit"),
    }
    return {name: code(value) for name, value in rows.items() if value is not None}


def _objective(facts: RunFacts) -> dict[str, Any]:
    option, stage = facts.option, facts.checkpoint.facts["stage"]
    if stage == "warmup":
        keys = ["warmup.batch_size", "warmup.kd_weight", "warmup.init_weight", "warmup.routing"]
    else:
        keys = ["policy.objective", "rollout.prompts", "rollout.group_size", "policy.updates_per_rollout"]
        keys += ["distillation.weight", "balance.kind"] if stage == "joint" else []
    return {f"`{key}`": option(key) for key in keys}


def _named(source: Any) -> str | None:
    return known_as(source) if source else None


def _data(facts: RunFacts) -> str | None:
    if facts.option("data.source"):
        part = facts.option("data.part")
        return known_as(facts.option("data.source"), "dataset") + (f", part {part}" if part else "")
    corpora = [Path(one["prefix"]).name for one in facts.option("warmup.corpora") or ()]
    return ", ".join(corpora) or None


def _recorded(facts: RunFacts) -> dict[str, str | None]:
    """The folders of padd-cache that the stage learnt from, by their options."""
    stage = facts.checkpoint.facts["stage"]
    keys = ["warmup.responses", "warmup.teacher_cache"] if stage == "warmup" else ["rollout.guidance"]
    return {f"recorded teacher (`{key}`)": _named(facts.option(key)) for key in keys}


def _versions(environment: Facts) -> str | None:
    packages = {name: known for name, known in environment.get("packages", {}).items() if known}
    return ", ".join(f"{name} {known}" for name, known in packages.items()) or None


def _metrics(facts: RunFacts) -> list[str]:
    rows = {
        f"{meaning} (`{name}`)": f"{facts.metrics[name]:.4g}"
        for name, meaning in TOLD_METRICS.items()
        if facts.metrics.get(name) is not None
    }
    if not rows:
        return []
    step = facts.metrics["step"]
    return [f"Step {step}, counted from 0, as it was logged, on its own training batch:", table(rows)]


def _loading(name: str, config: Facts, facts: RunFacts, format_name: str) -> list[str]:
    if format_name != "hf":
        return [
            "A distributed checkpoint of megatron-core in `release/`; `megatron_config.json` holds the fields of "
            "`TransformerConfig` and the arguments of `GPTModel` to load it with."
        ]
    written = config.get("transformers_version") or facts.environment.get("packages", {}).get("transformers")
    place = json.dumps(name, ensure_ascii=False)
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place})\n"
        f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")'
    )
    return [
        f"With transformers{f' (its config was written by {code(written)})' if written else ''}, without remote code:",
        f"```python\n{python}\n```",
        "vLLM is given the same folder; loading this model there has not been tried:",
        f"```\nvllm serve {shlex.quote(name)}\n```",
    ]


def _limits(facts: RunFacts, check: str) -> list[str]:
    limits = [
        "No benchmark belongs to the training: the figures above are of its own batches. Measure before use.",
        "What is known of the limits and biases of the model that it was made from may hold for this one too.",
    ]
    prompt, response = facts.option("data.max_prompt_tokens"), facts.option("rollout.max_new_tokens")
    if facts.option("data.source") and prompt and response and facts.checkpoint.facts["stage"] != "warmup":
        limits.append(f"Trained on prompts of at most {prompt} tokens and responses of at most {response}.")
    return [*limits, f"Export: {check}."]
