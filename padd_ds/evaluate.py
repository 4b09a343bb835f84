"""padd-eval: Pass@1 on checkable problems, and perplexity on a text, of any causal language model folder."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from padd_ds.data.answers import ANSWER_FORMATS, AnswerFormat
from padd_ds.data.problems import GOLD_FORMATS, FieldMap, Problem, map_rows
from padd_ds.data.prompts import TEMPLATES, PromptTemplate, render, resolve_template
from padd_ds.data.sources import read_rows
from padd_ds.errors import UserError, run_cli
from padd_ds.evaluation.benchmarks import BENCHMARKS, load_benchmark
from padd_ds.evaluation.kept import KeptResponses, Share, open_work, responses_file, work_folder
from padd_ds.files import check_output_free, write_text_whole
from padd_ds.launcher import launched_world

DTYPE_NAMES = ("float32", "bfloat16", "float16")
EPILOG = """examples:
  padd-eval --model DIR --benchmark math500 --data-dir data --output results/math500.json
  padd-eval --model DIR --benchmark aime24 --samples 32 --temperature 0.6 --output results/aime24.json
  torchrun --nproc_per_node 8 -m padd_ds.evaluate --model DIR --benchmark math500 --output results/math500.json
  padd-eval --compare results/before.json results/after.json
  padd-eval --check-overlap train.jsonl --data-dir data
After an interruption the same command goes on where it was, on any number of ranks. docs/evaluation.md tells more."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="padd-eval", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder or hub id")
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file to write (JSON)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a result file, or what another evaluation left unfinished"
    )
    parser.add_argument(
        "--check-overlap",
        metavar="FILE",
        help="no model: list the rows of this training data that hold questions of --benchmark, or of all benchmarks",
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="RESULT", help="no model: the second result beside the first, paired"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add_problem_options(parser)
    add_prompt_options(parser)
    text = parser.add_argument_group("perplexity")
    text.add_argument("--perplexity", type=Path, metavar="TEXTFILE", help="plain text to measure it on")
    text.add_argument("--window", type=int, default=256, help="tokens per window (default %(default)s)")
    text.add_argument("--max-windows", type=int, help="windows to use (default: all)")
    routing = parser.add_argument_group("routing of a student")
    routing.add_argument(
        "--routing",
        action="store_true",
        help="load, NMI and ESI by subject on the problems' solutions (needs --solution-field)",
    )
    routing.add_argument("--routing-before", metavar="DIR", help="checkpoint to measure the router's shift from")
    run = parser.add_argument_group("run")
    run.add_argument("--batch-size", type=int, default=32, help="problems at once (default %(default)s)")
    run.add_argument("--dtype", choices=DTYPE_NAMES, help="default: float32 on cpu, bfloat16 elsewhere")
    run.add_argument("--device", help="such as cpu or cuda:1 (default: an accelerator if there is one)")
    run.add_argument("--check-workers", type=int, default=1, help="answer checking processes")
    run.add_argument("--check-timeout", type=float, default=5.0, metavar="SECONDS", help="for one answer")
    run.add_argument("--seed", type=int, default=0, help="of what --samples draws")
    return parser.parse_args(argv)


def add_problem_options(parser: argparse.ArgumentParser) -> None:
    """Which problems; read by `read_problems`."""
    problems = parser.add_argument_group("problems")
    source = problems.add_mutually_exclusive_group()
    source.add_argument("--benchmark", choices=BENCHMARKS, help="a public benchmark")
    source.add_argument("--data", metavar="FILE", help="your own: JSONL, JSON, parquet, a folder, a hub name")
    problems.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with benchmark files")
    problems.add_argument("--split", help="split of --data")
    problems.add_argument("--question-field", default="question", metavar="NAME")
    problems.add_argument("--answer-field", default="answer", metavar="NAME")
    problems.add_argument("--subject-field", metavar="NAME", help="report Pass@1 by this field too")
    problems.add_argument("--level-field", metavar="NAME", help="and by this one")
    problems.add_argument("--solution-field", metavar="NAME", help="measure the perplexity of these texts too")
    problems.add_argument("--gold-format", choices=GOLD_FORMATS, default="plain", help="how rows hold it")
    problems.add_argument("--limit", type=int, metavar="N", help="the first N problems only")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """How they are put, and answers found."""
    prompts = parser.add_argument_group("prompts and answers")
    prompts.add_argument(
        "--template",
        metavar="NAME_OR_TEXT",
        help=f"{', '.join(TEMPLATES)}, or text with {{question}} (default: chat-boxed or boxed)",
    )
    prompts.add_argument("--chat", action="store_true", help="put --template in the model's chat template")
    prompts.add_argument("--answer-format", choices=ANSWER_FORMATS, default="auto", help="default: %(default)s")
    prompts.add_argument("--pattern", metavar="REGEX", help="one group, whose last match is the answer")
    prompts.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="of the gold answer, by which a number may miss it (default: the benchmark's, 0.01 for minerva, else 0)",
    )
    prompts.add_argument("--max-new-tokens", type=int, default=512, help="per response (default %(default)s)")
    prompts.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="beside the greedy response, draw N for Avg@N and Pass@k (default: 32 for aime24, else 0)",
    )
    prompts.add_argument("--temperature", type=float, default=1.0, help="of --samples (default %(default)s)")
    prompts.add_argument("--top-p", type=float, default=1.0, help="of --samples (default %(default)s)")
    prompts.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        from padd_ds.evaluation.paired import compare_results

        print(compare_results(*args.compare))
        return
    if args.check_overlap:
        check_overlap(args)
        return
    check_arguments(args)
    answer_format = AnswerFormat(name=args.answer_format, pattern=args.pattern)
    template = chat_template(args.template, args.chat) if args.template else None
    problems = read_problems(args)
    text = read_text(args.perplexity) if args.perplexity else None
    run(args, problems, template, answer_format, text)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be refused without reading anything."""
    for name in ("model", "output"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing; padd-eval --help tells what it is")
    check_output_free(args.output, args.overwrite)
    if not work_folder(args.output).exists():
        check_output_free(responses_file(args.output), args.overwrite)
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; name a file")
    if not (args.benchmark or args.data or args.perplexity):
        raise UserError("nothing to evaluate; give --benchmark, --data or --perplexity")
    if args.data_dir and not args.benchmark:
        raise UserError("--data-dir goes with --benchmark; a file of your own is named by --data")
    if args.samples and not (args.benchmark or args.data):
        raise UserError("--samples goes with --benchmark or --data")
    if args.routing and not args.solution_field:
        raise UserError("--routing follows worked solutions; name their field by --solution-field")
    if args.routing_before and not args.routing:
        raise UserError("--routing-before goes with --routing")
    if args.chat and not args.template:
        raise UserError("--chat goes with --template")
    counts = ("limit", "max_windows", "batch_size", "max_new_tokens", "check_workers")
    check_at_least(args, dict.fromkeys(counts, 1) | {"window": 2, "samples": 0, "tolerance": 0})
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature} must be above 0; the greedy response is always made")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} must be above 0 and at most 1")


def check_at_least(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """UserError for the first of these options that is given and below its bound."""
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {bound}")


def read_problems(args: argparse.Namespace) -> list[Problem]:
    """The problems asked for, up to --limit; none if only perplexity is."""
    problems = load_benchmark(args.benchmark, args.data_dir)[: args.limit] if args.benchmark else _own_problems(args)
    if args.tolerance is None:
        return problems
    return [replace(one, tolerance=replace(one.tolerance, relative=args.tolerance)) for one in problems]


def _own_problems(args: argparse.Namespace) -> list[Problem]:
    if not args.data:
        return []
    fields = FieldMap(
        question=args.question_field,
        answer=args.answer_field,
        subject=args.subject_field,
        level=args.level_field,
        solution=args.solution_field,
        gold_format=args.gold_format,
    )
    rows = read_rows(args.data, args.split)[: args.limit]
    return map_rows(rows, fields, args.data, "--{role}-field")


def check_overlap(args: argparse.Namespace) -> None:
    """Print which rows of --check-overlap hold questions of a benchmark; with --output, write them as JSON too."""
    from padd_ds.evaluation.overlap import find_overlaps, overlap_table

    if args.output is not None:
        check_output_free(args.output, args.overwrite)
    names = [args.benchmark] if args.benchmark else list(BENCHMARKS)
    questions = {name: [problem.question for problem in load_benchmark(name, args.data_dir)] for name in names}
    overlaps = find_overlaps(read_rows(args.check_overlap, args.split), questions)
    print(overlap_table(overlaps, {name: len(asked) for name, asked in questions.items()}))
    if args.output is not None:
        found = [asdict(overlap) for overlap in overlaps]
        write_text_whole(args.output, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """A UTF-8 text file; UserError if it is missing or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--perplexity {path}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise UserError(f"--perplexity {path}: is empty")
    return text


def run(
    args: argparse.Namespace,
    problems: list[Problem],
    template: PromptTemplate | None,
    answer_format: AnswerFormat,
    text: str | None,
) -> None:
    """Load the model, measure, write the result file and print its headline."""
    # Here and not above: what the user got wrong is told before torch has taken seconds to load.
    from padd_ds.evaluation.generate import GenerationOptions, check_prompts
    from padd_ds.evaluation.results import Measured, table, write_result
    from padd_ds.evaluation.routing import find_routers
    from padd_ds.evaluation.scoring import EvaluationOptions, evaluate_problems

    with share_of_ranks() as share:
        model, tokenizer = share.together(lambda: load(args.model, args.device or share.device, args.dtype))
        if args.routing:
            find_routers(model)
        template = template or resolve_template("chat-boxed" if tokenizer.chat_template else "boxed")
        options = EvaluationOptions(
            template=template,
            answer_format=answer_format,
            generation=GenerationOptions(
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                stop=tuple(args.stop),
                seed=args.seed,
            ),
            check_workers=args.check_workers,
            check_timeout_s=args.check_timeout,
        )
        settings = _settings(args, template, answer_format, model, problems)
        prompts = [render(template, problem, tokenizer) for problem in problems]
        check_prompts(prompts, model, tokenizer, options.generation)
        measured = Measured()
        if share.rank == 0:
            measure_texts(args, model, tokenizer, problems, prompts, text, measured)
        if problems:
            kept = open_responses(args, settings, model, share)
            measured.problems = evaluate_problems(model, tokenizer, problems, options, kept)
            if samples := settings["samples"]:
                drawn = replace(options.generation, temperature=args.temperature, top_p=args.top_p)
                sampling = replace(options, generation=drawn, samples=samples)
                measured.samples = evaluate_problems(model, tokenizer, problems, sampling, kept)
        if share.rank == 0:
            write_result(args.output, settings, measured)
            print(f"{args.model}\n{table(measured)}\nwritten to {args.output}")


def measure_texts(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    problems: list[Problem],
    prompts: list[str],
    text: str | None,
    measured: Any,
) -> None:
    """What needs no responses: perplexities and routing, into `measured`."""
    from padd_ds.evaluation.perplexity import perplexity, solution_perplexity
    from padd_ds.evaluation.routing import measure_routing
    from padd_ds.hf import load_causal_lm

    if text is not None:
        measured.perplexity = perplexity(model, tokenizer, text, args.window, args.max_windows)
    if not args.solution_field:
        return
    solutions = [problem.solution or "" for problem in problems]
    measured.solution_perplexity = solution_perplexity(model, tokenizer, prompts, solutions)
    if args.routing:
        before = load_causal_lm(args.routing_before, model.dtype).to(model.device) if args.routing_before else None
        subjects = [problem.subject for problem in problems]
        measured.routing = measure_routing(model, tokenizer, prompts, solutions, subjects, before)


@contextmanager
def share_of_ranks() -> Iterator[Share]:
    """This process's share of the work among the ranks that a launcher started, or all of it."""
    if launched_world() == 1:
        yield Share()
        return
    from padd_ds.engine.ranks import patient_barrier, start_ranks, stop_ranks, together

    ranks = start_ranks()
    try:
        yield Share(
            rank=ranks.rank,
            world=ranks.world,
            device=str(ranks.device),
            wait=patient_barrier(),
            together=lambda action: together(action, ranks),
        )
    finally:
        stop_ranks()


def open_responses(args: argparse.Namespace, settings: dict[str, Any], model: Any, share: Share) -> KeptResponses:
    """What is kept of the responses, from an interruption of the same evaluation if there was one."""
    from padd_ds.evaluation.record import weights_hash

    names = ("model", "template", "answer_format", "pattern", "tolerance", "max_new_tokens", "temperature", "top_p")
    plan = {name: settings[name] for name in (*names, "stop", "seed", "dtype", "problems_sha256")}

    def open_once() -> None:
        if share.rank == 0:
            open_work(args.output, plan | {"weights": weights_hash(model)}, args.overwrite)

    share.wait()
    share.together(open_once)
    return KeptResponses(args.output, share)


def load(source: str, device_name: str | None, dtype_name: str | None) -> tuple[Any, Any]:
    """Model and tokenizer; UserError for a device that is not there."""
    import torch

    from padd_ds.hf import DTYPES, load_causal_lm, load_tokenizer

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(device_name) if device_name else (accelerator or torch.device("cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device_name} cannot be used here ({reason}); try --device cpu") from error
    dtype = DTYPES[dtype_name or ("float32" if device.type == "cpu" else "bfloat16")]
    return load_causal_lm(source, dtype).to(device), load_tokenizer(source)


def chat_template(template: str, chat: bool) -> PromptTemplate:
    """A named or written template, with `chat` as a user's turn."""
    resolved = resolve_template(template)
    return PromptTemplate(text=resolved.text, chat=True, system=resolved.system) if chat else resolved


def _settings(
    args: argparse.Namespace,
    template: PromptTemplate,
    answer_format: AnswerFormat,
    model: Any,
    problems: list[Problem],
) -> dict[str, Any]:
    questions = json.dumps([[problem.question, problem.answer] for problem in problems])
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    resolved = {
        "template": {"text": template.text, "chat": template.chat, "system": template.system},
        "answer_format": answer_format.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_type": model.config.model_type,
        "problems_sha256": hashlib.sha256(questions.encode()).hexdigest(),
        "samples": BENCHMARKS[args.benchmark].samples if args.samples is None and args.benchmark else args.samples or 0,
    }
    return given | resolved


def cli() -> None:
    run_cli(main)


if __name__ == "__main__":
    cli()
