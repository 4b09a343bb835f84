"""The conversion from end to end: check, sweep through the layers, prove, publish."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from padd_ds.conversion.companions import copy_tokenizer, write_card, write_generation_config
from padd_ds.conversion.exactness import Exactness, conclude
from padd_ds.conversion.head import Head, head_name, head_rows
from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.plan import EVALUATION, TEACHER, Plan, fingerprint, make_plan
from padd_ds.conversion.report import PAGE_NAME, write_report
from padd_ds.conversion.sweep import (
    States,
    convert_one,
    first_states,
    read_layer,
    teacher_block,
)
from padd_ds.conversion.targets import LayerTargets, layer_targets, save_targets
from padd_ds.conversion.work import WorkFolder, work_folder
from padd_ds.conversion.writer import shard_path, write_index, write_shard


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion found; the same numbers stand in `padd_conversion.json`."""

    output: Path
    exactness: Exactness
    layers: list[dict[str, Any]]
    contents: dict[str, Any]


def convert(options: ConversionOptions, page: Callable[[dict[str, Any]], str] | None = None) -> ConversionReport:
    """Turn a dense teacher into a `Glm4MoeForCausalLM` folder at `options.output`.

    One layer at a time is in memory. The output is whole or absent; an interrupted conversion goes on at the
    layer it had reached. UserError for anything wrong with the input, before any work, and for a student that
    is not equal to its teacher. `page` turns the figures into the HTML that is laid beside them.
    """
    plan = make_plan(options)
    with work_folder(options.output, fingerprint(options, plan.teacher.weights), options.overwrite) as work:
        states = _sweep(plan, work)
        records = [work.record_of(layer) for layer in range(plan.depth)]
        facts = [layer_facts for _, layer_facts in records]
        exactness, perplexity = _conclude(plan, states, max(one["exactness_error"] for one in facts))
        _write_companions(plan, work.result)
        sliced = records[options.dense_layers :]
        _write_targets(plan, [layer_targets(tensors) for tensors, _ in sliced], work.result)
        contents = write_report(work.result, plan, [one["quality"] for _, one in sliced], exactness, perplexity)
        if page is not None:
            (work.result / PAGE_NAME).write_text(page(contents), encoding="utf-8")
    return ConversionReport(output=options.output, exactness=exactness, layers=contents["layers"], contents=contents)


def _sweep(plan: Plan, work: WorkFolder) -> States:
    """Convert all layers that are not finished yet; the states after the last."""
    done = work.layers_done()
    states = work.states_after(done - 1) if done else first_states(plan)
    if not done:
        _write_embedding(plan, work.result)
    layers = tqdm(range(done, plan.depth), initial=done, total=plan.depth, desc="converting", unit="layer")
    for layer in layers:
        finished = convert_one(plan, layer, states, work.result)
        targets = {} if finished.targets is None else finished.targets.tensors()
        work.finish_layer(layer, states, targets, finished.facts)
    _write_head(plan, work.result)
    write_index(work.result, plan.n_shards)
    return states


def _write_embedding(plan: Plan, result: Path) -> None:
    name = "model.embed_tokens.weight"
    write_shard(result, 1, plan.n_shards, {name: plan.teacher.weights.tensor(name).to(plan.dtype)})


def _write_head(plan: Plan, result: Path) -> None:
    if shard_path(result, plan.n_shards, plan.n_shards).is_file():
        return
    norm_D, head_VD = (
        plan.teacher.weights.tensor(name) for name in ("model.norm.weight", head_name(plan.teacher.config))
    )
    tensors = {"model.norm.weight": norm_D.to(plan.dtype), "lm_head.weight": head_VD.to(plan.dtype)}
    write_shard(result, plan.n_shards, plan.n_shards, tensors)


def _conclude(plan: Plan, states: States, layer_error: float) -> tuple[Exactness, dict[str, float]]:
    """The verdict on the probes, and the perplexity of teacher, student and controls where there is a text."""
    config = plan.teacher.config
    exact, rounded = (
        Head(head_rows(plan.teacher.weights, config, rounding), config.vocab_size, plan.options.device)
        for rounding in (None, plan.dtype)
    )
    block = teacher_block(plan, plan.depth - 1, read_layer(plan, plan.depth - 1))

    def norm(states_BTD: torch.Tensor, rounding: torch.dtype | None) -> torch.Tensor:
        return block.normalise(states_BTD, rounding)

    exactness = conclude(states, norm, exact, rounded, layer_error)
    perplexity = {}
    for who in (TEACHER, *plan.variants) if EVALUATION in plan.windows else ():
        head, rounding = (exact, None) if who == TEACHER else (rounded, plan.dtype)
        normed_BTD = norm(states[f"{EVALUATION}/{who}"], rounding)
        perplexity[who] = exp(head.nll_mean_nats(normed_BTD, plan.windows[EVALUATION]))
    return exactness, perplexity


def _write_companions(plan: Plan, result: Path) -> None:
    plan.student_config.save_pretrained(result)
    write_generation_config(plan.teacher.folder, result, GenerationConfig.from_model_config(plan.teacher.config))
    copy_tokenizer(plan.teacher.folder, result, plan.options.trust_remote_code)
    write_card(result, plan.teacher.folder, plan.options, plan.slicing)


def _write_targets(plan: Plan, targets: list[LayerTargets], result: Path) -> None:
    options = plan.options
    save_targets(
        result,
        targets,
        plan.teacher_layers[options.dense_layers :],
        prior_temperature=options.prior_temperature,
        cluster=options.cluster,
        router=options.router,
    )
