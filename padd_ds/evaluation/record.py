"""Recording a teacher: its checked responses, and its likelihoods of targets, shard by shard.

Legend: B rows of a batch, L tokens of prompt and target, R target tokens, C tokens of one chunk, V vocabulary,
K likeliest tokens, Q = K + 1 outcomes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.batches import supervised_batch
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import PromptTemplate, render, render_target
from padd_ds.errors import UserError
from padd_ds.evaluation.generate import GenerationOptions, generate_responses
from padd_ds.evaluation.kept import PLAN_NAME, changed_keys, kept_plan, work_folder
from padd_ds.files import (
    check_output_free,
    delete_unfinished_tensors,
    disk_full_is_user_error,
    give_usual_modes,
    replace_folder,
    write_text_whole,
)
from padd_ds.hf import response_logits
from padd_ds.losses.distillation import top_outcomes
from padd_ds.losses.tokens import CHUNK_TOKENS
from padd_ds.offline.cache import RecordedRow, row_key, write_index, write_shard
from padd_ds.rollout.verify import AnswerChecker
from padd_ds.seeds import derive_seed

RESPONSES_NAME = "responses.jsonl"
SCORED_TOKENS = 4096
"""Tokens whose logits are held at once, in the model's precision; a longer target is scored alone."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What is recorded."""

    template: PromptTemplate
    target: str = "{solution}"
    """Of the data's own solutions, as data.target of a training run."""
    max_length: int = 1024
    """Tokens of prompt and target together; longer ones are cut as training cuts them."""
    top_k: int = 64
    """0 keeps responses only."""
    responses: int = 0
    """Drawn per question, of which the right ones are kept as targets; 0 takes the data's solutions."""
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    shard_rows: int = 1024
    """Questions per shard; an interrupted recording goes on at the shard that it had reached."""
    seed: int = 0


def record(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    options: RecordOptions,
    output: Path,
    source: dict[str, Any],
) -> dict[str, int]:
    """Write the cache of `problems` to the folder `output`, whole or not at all; returns its counts.

    `source` names teacher and data. An interrupted recording lies in `.NAME.partial` beside it and is continued by
    the same call. UserError: `output` exists, another recording was interrupted there, no target is left, the disk is
    full.
    """
    check_output_free(output, overwrite=False)
    if options.responses == 0 and options.top_k == 0:
        raise UserError("nothing to record; ask for responses, likelihoods (top_k above 0), or both")
    work = work_folder(output)
    with disk_full_is_user_error(output, hint=f"what was recorded stays in {work}; free some space and repeat"):
        _open_work(work, _plan(source, options, problems))
        shards = [problems[start : start + options.shard_rows] for start in range(0, len(problems), options.shard_rows)]
        paths = [work / f"shard_{number:05d}.safetensors" for number in range(len(shards))]
        for number, shard in enumerate(tqdm(shards, desc="recording", unit="shard", dynamic_ncols=True)):
            if not _is_whole(paths[number]):
                targets = _targets(model, tokenizer, shard, replace(options, seed=derive_seed(options.seed, number)))
                rows = list(_recorded_rows(model, tokenizer, targets, options)) if options.top_k else []
                write_shard(paths[number], rows, {"targets": json.dumps([asdict(target) for target in targets])})
        counts = _finish(work, paths, options, source)
    replace_folder(work, output)
    return counts


def weights_hash(model: Any) -> str:
    """SHA-256 of all weights, so that another teacher of the same name is told apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plan(source: dict[str, Any], options: RecordOptions, problems: Sequence[Problem]) -> dict[str, Any]:
    """What makes two recordings the same, as JSON holds it: all but the size of a batch, as in an evaluation."""
    settings = asdict(options)
    generation = settings.pop("generation")
    drawn = {name: generation[name] for name in ("max_new_tokens", "stop", "temperature", "top_p")}
    asked = json.dumps([asdict(problem) for problem in problems])
    sha256 = hashlib.sha256(asked.encode()).hexdigest()
    return json.loads(json.dumps({**source, **settings, **drawn, "problems_sha256": sha256}))


def _open_work(work: Path, plan: dict[str, Any]) -> None:
    """A work folder for this plan: the one that an interruption left, or a new one. UserError: one of another plan."""
    there = kept_plan(work, "shard_*.safetensors")
    if there != plan:
        if there is not None:
            raise UserError(
                f"{work}: an interrupted recording with another {changed_keys(there, plan)} is kept there; repeat its "
                "command to finish it, delete that folder, or choose another output"
            )
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    delete_unfinished_tensors(work)
    write_text_whole(work / PLAN_NAME, json.dumps(plan))


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _targets(model: Any, tokenizer: Any, problems: Sequence[Problem], options: RecordOptions) -> list[Problem]:
    """The problems with what is to be learnt as their solution: their own, or the teacher's right responses."""
    if options.responses == 0:
        return [replace(p, solution=render_target(p, options.target)) for p in problems]
    asked = [problem for problem in problems for _ in range(options.responses)]
    prompts = [render(options.template, problem, tokenizer) for problem in asked]
    responses = generate_responses(model, tokenizer, prompts, replace(options.generation, seed=options.seed))
    with AnswerChecker(options.answer_format) as checker:
        pairs = [(response.text, problem.answer) for response, problem in zip(responses, asked, strict=True)]
        verdicts = checker.check(pairs, [problem.tolerance for problem in asked])
    kept: dict[tuple[str, str], Problem] = {}
    for problem, response, verdict in zip(asked, responses, verdicts, strict=True):
        if verdict.correct and response.ended:
            kept.setdefault((problem.question, response.text), replace(problem, solution=response.text))
    return list(kept.values())


@torch.inference_mode()
def _recorded_rows(
    model: Any, tokenizer: Any, targets: Sequence[Problem], options: RecordOptions
) -> Iterator[RecordedRow]:
    for start in range(0, len(targets), options.generation.batch_size):
        batch_targets = targets[start : start + options.generation.batch_size]
        prompts = [render(options.template, problem, tokenizer) for problem in batch_targets]
        texts = [problem.solution or "" for problem in batch_targets]
        batch = supervised_batch(prompts, texts, tokenizer, options.max_length)
        n_rows, n_response = batch["target_mask_BR"].shape
        for rows in torch.arange(n_rows).split(max(1, SCORED_TOKENS // n_response)):
            ids_BL, mask_BL = batch["input_ids_BT"][rows], batch["attention_mask_BT"][rows]
            yield from _scored(model, ids_BL, mask_BL, batch["target_mask_BR"][rows], options.top_k)


def _scored(
    model: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor, target_mask_BR: torch.Tensor, top_k: int
) -> Iterator[RecordedRow]:
    n_response = target_mask_BR.shape[1]
    logits_BRV = response_logits(model, ids_BL.to(model.device), mask_BL.to(model.device), n_response)
    for row, target_mask_R in enumerate(target_mask_BR):
        top_ids_RK, logprobs_RQ = _outcomes(logits_BRV[row], target_mask_R, top_k)
        ids = ids_BL[row][mask_BL[row].bool()].tolist()
        yield RecordedRow(
            key=row_key(ids, int(target_mask_R.sum())), top_ids_RK=top_ids_RK.int().cpu(), logprobs_RQ=logprobs_RQ.cpu()
        )


def _outcomes(logits_RV: torch.Tensor, target_mask_R: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_outcomes` of the target's tokens, chunk by chunk: (tokens x vocabulary) is never held in fp32."""
    chunks = zip(logits_RV.split(CHUNK_TOKENS), target_mask_R.split(CHUNK_TOKENS), strict=True)
    parts = [top_outcomes(logits_CV[mask_C], top_k) for logits_CV, mask_C in chunks]
    return torch.cat([top_ids for top_ids, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _finish(work: Path, paths: Sequence[Path], options: RecordOptions, source: dict[str, Any]) -> dict[str, int]:
    """Write the responses as data and the index; nothing but they and the shards stays."""
    targets: list[dict[str, Any]] = []
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            targets += json.loads(shard.metadata()["targets"])
    if not targets:
        shutil.rmtree(work)
        raise UserError("the teacher has no right response to any question; check the template and the answer format")
    lines = [json.dumps(target, ensure_ascii=False) for target in targets]
    responses = work / RESPONSES_NAME
    responses.write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = {"targets": len(targets), "questions": len({target["question"] for target in targets})}
    write_index(work, {**source, "top_k": options.top_k, **counts}, responses, paths)
    (work / PLAN_NAME).unlink()
    give_usual_modes(work)
    return counts
