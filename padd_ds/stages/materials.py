"""What a stage is made of, read and checked before any work: data, tokenizer, teacher."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import DataConfig
from padd_ds.data.blend import Blend, PackedCorpus
from padd_ds.data.corpus import Corpus
from padd_ds.data.problems import FieldMap, Problem, map_rows
from padd_ds.data.prompts import PromptTemplate, render, render_target, resolve_template
from padd_ds.data.sources import read_rows
from padd_ds.data.split import decontaminate, split_problems
from padd_ds.engine.frozen import place_frozen
from padd_ds.engine.ranks import Ranks, together
from padd_ds.errors import UserError
from padd_ds.hf import keeps_documents_apart, load_causal_lm
from padd_ds.offline.cache import check_responses, read_responses


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The problems of one part, and what was left out on the way."""

    problems: list[Problem]
    dropped_benchmark: list[str]
    """Questions that also stand in a benchmark."""
    facts: dict[str, int]
    """Counts: rows, duplicates, dropped_benchmark, recorded, too_long, problems."""


def read_training_data(config: RunConfig, tokenizer: Any) -> TrainingData:
    """The problems of the stage's part, benchmark overlap and over-long prompts dropped and counted.

    UserError where a file, a field or a whole part is missing.
    """
    data = config.data
    assert data.source is not None
    check_responses(data.source)
    problems = map_rows(read_rows(data.source, data.split), field_map(data))
    kept, dropped = decontaminate(problems, _benchmark_questions(data))
    # A prompt is drawn once; a target is learnt as often as it has other words, such as a teacher's several responses.
    split = split_problems(kept, data.part_fractions, every_solution=config.stage == "warmup")
    part = config.data_part
    chosen = [p for problems in split.parts.values() for p in problems] if part == "all" else split.parts[part]
    recorded: list[Problem] = []
    if config.stage == "warmup" and config.warmup.responses is not None:
        recorded, _ = decontaminate(read_responses(Path(config.warmup.responses)), _benchmark_questions(data))
        chosen = [*chosen, *recorded]
    template = prompt_template(data)
    fitting = [p for p in chosen if len(_ids(render(template, p, tokenizer), tokenizer)) <= data.max_prompt_tokens]
    if not fitting:
        raise UserError(
            f"data.source {data.source}: part {part} has no question within data.max_prompt_tokens "
            f"{data.max_prompt_tokens} ({len(problems)} rows, {len(chosen)} in the part); give more data"
        )
    if config.stage == "warmup":
        supervised_target(data, fitting[0])
    facts = {
        "rows": len(problems),
        "duplicates": split.duplicates,
        "dropped_benchmark": len(dropped),
        "recorded": len(recorded),
        "too_long": len(chosen) - len(fitting),
        "problems": len(fitting),
    }
    return TrainingData(problems=fitting, dropped_benchmark=[p.question for p in dropped], facts=facts)


def open_corpora(config: RunConfig, tokenizer: Any, vocabulary: int) -> Blend:
    """The corpora of a warm-up, checked and packed. UserError where one is damaged, empty or of another tokenizer."""
    options, packed = config.warmup, []
    for index, chosen in enumerate(options.corpora):
        corpus = Corpus.open(Path(chosen.prefix), tokenizer, vocabulary)
        packed.append(PackedCorpus(corpus, options.sequence_length, (config.seed, index)))
        if not len(packed[-1].packing):
            raise UserError(f"{chosen.prefix}: has no document of two tokens or more; drop it from warmup.corpora")
    return Blend(tuple(packed), tuple(chosen.weight for chosen in options.corpora))


def check_sequence_length(length: int, model: str, model_config: Any) -> None:
    """UserError unless the model knows as many positions as a sequence of the corpora has."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"warmup.sequence_length {length} is more than the {limit} positions of {model}; lower it")


def check_borders(name: str, model: Any, vocabulary: int, ranks: Ranks) -> None:
    """UserError where the class of a dense model lets packed documents see each other. Collective if the model is."""
    if not keeps_documents_apart(model, vocabulary, ranks.device):
        raise UserError(
            f"{name}: its class does not keep the packed documents of warmup.corpora apart by their positions; "
            "take another model, or set warmup.corpora=[] and give data.source"
        )


def field_map(data: DataConfig) -> FieldMap:
    """The data section's columns and gold format."""
    fields = data.fields
    return FieldMap(
        question=fields.question,
        answer=fields.answer,
        solution=fields.solution,
        subject=fields.subject,
        gold_format=data.gold_format,
    )


def prompt_template(data: DataConfig) -> PromptTemplate:
    """The data section's template, by name or as text."""
    template = resolve_template(data.template)
    return PromptTemplate(text=template.text, chat=template.chat or data.chat, system=template.system)


def supervised_target(data: DataConfig, problem: Problem) -> str:
    """What the warm-up learns to write; the bare answer where the data has no worked solution."""
    target = data.target
    if problem.solution is None and target == "{solution}":
        target = "{answer}"
    return render_target(problem, target)


def load_together(source: str, config: RunConfig, dtype: torch.dtype, ranks: Ranks) -> Any:
    """A model on every rank; what is wrong with one rank's files stops all. Collective."""
    trust = config.model.trust_remote_code
    return together(lambda: load_causal_lm(source, dtype, trust_remote_code=trust), ranks)


def load_reference(config: RunConfig, dtype: torch.dtype, ranks: Ranks) -> Any:
    """The frozen model that the policy is held to, placed as the teacher is; None without one. Collective."""
    if not config.has_rollouts or config.policy.kl_weight == 0:
        return None
    source = config.model.reference or config.model.student
    reference = load_together(source, config, dtype, ranks)
    return place_frozen(reference, config.model.teacher_placement, dtype, ranks)


def load_teacher(config: RunConfig, dtype: torch.dtype, ranks: Ranks) -> Any:
    """The frozen dense teacher, placed as the configuration says. Collective."""
    assert config.model.teacher is not None
    teacher = load_together(config.model.teacher, config, dtype, ranks)
    return place_frozen(teacher, config.model.teacher_placement, dtype, ranks)


def check_vocabularies(other: str, other_size: int, student_size: int) -> None:
    """UserError unless another model, named for the user, and the student predict the same tokens."""
    if other_size != student_size:
        raise UserError(
            f"{other} has a vocabulary of {other_size}, the student one of {student_size}; "
            "both sides need the same tokens"
        )


def write_data_report(data: TrainingData | Blend, config: RunConfig, log: Callable[[str], None]) -> None:
    """Say what there is and what was left out, and list the questions that a benchmark holds."""
    if isinstance(data, Blend):
        for line in data.describe(config.steps * config.warmup.batch_size):
            log(line)
        return
    log("data: " + ", ".join(f"{name} {count}" for name, count in data.facts.items()))
    if data.dropped_benchmark:
        lines = [json.dumps({"question": question}) for question in data.dropped_benchmark]
        (Path(config.run_dir) / "dropped_questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _benchmark_questions(data: DataConfig) -> list[str]:
    questions = []
    for source in data.benchmarks:
        for row in read_rows(source):
            if data.benchmark_field not in row:
                raise UserError(
                    f"{row.place} has no field {data.benchmark_field!r} (it has {', '.join(row)}); "
                    "set data.benchmark_field"
                )
            questions.append(str(row[data.benchmark_field]))
    return questions


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
