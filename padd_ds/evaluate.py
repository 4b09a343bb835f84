"""padd-eval: Pass@1 on checkable problems, perplexity on a text, and routing, of any causal language model folder."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import FieldMap, Problem, map_rows
from padd_ds.data.prompts import PromptTemplate, render, resolve_template
from padd_ds.data.sources import read_rows
from padd_ds.errors import UserError, run_cli
from padd_ds.evaluation.arguments import check_arguments, page_files, parse_args, server_options
from padd_ds.evaluation.benchmarks import BENCHMARKS, load_benchmark
from padd_ds.evaluation.kept import KeptResponses, Share, open_work, share_of_ranks, work_folder
from padd_ds.files import check_output_free, staged_directory, write_text_whole
from padd_ds.rollout.vllm.server import check_installed
from padd_ds.run.lock import run_lock


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare or args.runs:
        report(args)
        return
    if args.check_overlap:
        check_overlap(args)
        return
    check_arguments(args)
    answer_format = AnswerFormat(name=args.answer_format, pattern=args.pattern)
    template = chat_template(args.template, args.chat) if args.template else None
    problems = read_problems(args)
    if args.routing_analysis:
        analyse(args, problems, template)
        return
    text = read_text(args.perplexity) if args.perplexity else None
    args.vllm_version = check_installed(server_options(args)) if args.backend == "vllm" else None
    run(args, problems, template, answer_format, text)


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


def report(args: argparse.Namespace) -> None:
    """Print how results differ from the first on their questions; with --output, a page with them and training runs."""
    from padd_ds.evaluation.comparison import compare, comparison_text

    files = args.output and page_files(args.output)
    if args.output is None and args.runs:
        raise UserError("--runs makes a page; name it, such as --output report.html")
    if args.output is not None:
        if args.output.suffix != ".html":
            raise UserError(f"--output {args.output} is for a page here; give it a name that ends in .html")
        for path in (args.output, files):
            check_output_free(path, args.overwrite)
    comparisons = compare(args.compare) if args.compare else []
    if comparisons:
        print(comparison_text(comparisons))
    if args.output is not None:
        write_report(args.output, files, comparisons, args.runs or [], args.overwrite)
        print(f"written to {args.output} and {files}/")


def write_report(page: Path, files: Path, comparisons: list[Any], folders: list[Path], overwrite: bool) -> None:
    """The page, and plots and tables beside it."""
    from padd_ds.report.comparison_files import write_comparison_files
    from padd_ds.report.comparison_page import comparison_page
    from padd_ds.report.runs_files import write_runs_files
    from padd_ds.report.runs_page import runs_page
    from padd_ds.report.source import read_runs

    runs = read_runs(folders)
    text = runs_page(runs, comparisons) if runs else comparison_page(comparisons)
    with staged_directory(files, overwrite) as staged:
        write_comparison_files(staged, comparisons)
        write_runs_files(staged, runs)
    write_text_whole(page, text)


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
    from padd_ds.evaluation.costs import model_facts
    from padd_ds.evaluation.generate import GenerationOptions, check_prompts
    from padd_ds.evaluation.results import Measured, table, write_result
    from padd_ds.evaluation.routing import find_routers
    from padd_ds.evaluation.scoring import EvaluationOptions, evaluate_problems

    with share_of_ranks() as share, ExitStack() as stack:
        model, tokenizer = share.together(lambda: load_for(args, share))
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
            kept = open_responses(args, settings, model, share, stack)
            with drawing(args, model, tokenizer, prompts, share) as draw:
                measured.problems = evaluate_problems(model, tokenizer, problems, options, kept, draw)
                if samples := settings["samples"]:
                    drawn = replace(options.generation, temperature=args.temperature, top_p=args.top_p)
                    sampling = replace(options, generation=drawn, samples=samples)
                    measured.samples = evaluate_problems(model, tokenizer, problems, sampling, kept, draw)
        if share.rank == 0:
            write_result(args.output, settings, model_facts(model), measured)
            print(f"{args.model}\n{table(measured)}\nwritten to {args.output}")
            warn_of_cut_responses(measured, args.max_new_tokens)


def warn_of_cut_responses(measured: Any, max_new_tokens: int) -> None:
    """A line on standard error where more than a tenth of the responses reached the limit."""
    results = [one for one in (measured.problems, measured.samples) if one is not None]
    total, cut = sum(one.problems * one.samples for one in results), sum(one.truncated for one in results)
    if 10 * cut > total:
        print(
            f"warning: {cut} of {total} responses were cut off at {max_new_tokens} tokens, before they ended; "
            "give a larger --max-new-tokens",
            file=sys.stderr,
        )


@contextmanager
def drawing(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[str], share: Share
) -> Iterator[Any | None]:
    """What draws the responses of this rank if not the model itself."""
    if args.backend == "hf":
        yield None
        return
    from padd_ds.evaluation.generate import longest_prompt
    from padd_ds.evaluation.vllm import served_responses

    longest = longest_prompt(prompts, tokenizer) + args.max_new_tokens
    log_path = work_folder(args.output) / f"vllm_of_rank_{share.rank}.log"
    with served_responses(args.model, model, tokenizer, longest, server_options(args), log_path, share) as draw:
        yield draw


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

    if text is not None:
        measured.perplexity = perplexity(model, tokenizer, text, args.window, args.max_windows)
    if not args.solution_field:
        return
    solutions = [problem.solution or "" for problem in problems]
    measured.solution_perplexity = solution_perplexity(model, tokenizer, prompts, solutions)
    if args.routing:
        before = load_like(args.routing_before[0], model) if args.routing_before else None
        subjects = [problem.subject for problem in problems]
        measured.routing = measure_routing(model, tokenizer, prompts, solutions, subjects, before)


def analyse(args: argparse.Namespace, problems: list[Problem], template: PromptTemplate | None) -> None:
    """Write the routing of the problems with their solutions to the output, and a page with its files beside it."""
    from padd_ds.evaluation.results import package_versions
    from padd_ds.evaluation.routing import Text
    from padd_ds.evaluation.routing_analysis import analyse_routing, changes_since, check_alike
    from padd_ds.report.routing_files import write_routing_files
    from padd_ds.report.routing_page import routing_page, routing_summary

    earlier = args.routing_before or []
    check_alike(args.model, earlier)
    model, tokenizer = load(args.model, args.device, args.dtype)
    template = template or resolve_template("chat-boxed" if tokenizer.chat_template else "boxed")
    text = Text(
        prompts=[render(template, problem, tokenizer) for problem in problems],
        solutions=[problem.solution or "" for problem in problems],
        subjects=[problem.subject for problem in problems],
    )
    clusters = teacher_clusters(args, model) if args.routing_teacher else None
    first = load_like(earlier[0], model) if earlier else None
    routing = analyse_routing(model, tokenizer, text, first, clusters, args.batch_size, args.seed)
    del first, clusters  # one checkpoint in memory beside the model
    routing["over_training"] = [
        {"checkpoint": source, **changes_since(model, tokenizer, text, load_like(source, model), args.batch_size)}
        for source in (earlier if len(earlier) > 1 else ())
    ]
    settings = _settings(args, template, AnswerFormat(), model, problems)
    document = {"settings": settings, "versions": package_versions(), "routing": routing}
    try:
        text_of_result = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(
            f"{args.model}: its routing is not finite; check its weights and those of --routing-before, "
            "or measure with --dtype float32"
        ) from error
    page, files = args.output.with_suffix(".html"), page_files(args.output)
    text_of_page = routing_page(document)
    with staged_directory(files, args.overwrite) as staged:
        write_routing_files(staged, routing)
    write_text_whole(page, text_of_page)
    write_text_whole(args.output, text_of_result)
    print(f"{args.model}\n{routing_summary(routing)}\nwritten to {args.output}, {page} and {files}/")


def load_like(source: str, model: Any) -> Any:
    """Another checkpoint, in the precision and on the device of `model`."""
    from padd_ds.hf import load_causal_lm

    return load_causal_lm(source, model.dtype).to(model.device)


def teacher_clusters(args: argparse.Namespace, model: Any) -> Any:
    """The teacher with the clusters that the student's experts were cut from."""
    from padd_ds.conversion.targets import load_targets
    from padd_ds.evaluation.clusters import TeacherClusters
    from padd_ds.evaluation.routers import find_routers

    targets, routers = load_targets(Path(args.routing_targets or args.model)), find_routers(model)
    teacher = load_like(args.routing_teacher, model)
    return TeacherClusters(teacher=teacher, targets=targets, n_layers=len(routers), n_experts=routers[0].n_experts)


def open_responses(
    args: argparse.Namespace, settings: dict[str, Any], model: Any, share: Share, stack: ExitStack
) -> KeptResponses:
    """What is kept of the responses, from an interruption of the same evaluation if there was one. Until `stack`
    closes no other process may evaluate to this output."""
    from padd_ds.hf import files_hash

    names = ("model", "template", "answer_format", "pattern", "tolerance", "max_new_tokens", "temperature", "top_p")
    plan = {name: settings[name] for name in (*names, "stop", "seed", "dtype", "problems_sha256", "backend")}
    if args.backend == "vllm":
        plan |= {"vllm_version": args.vllm_version, "vllm.arguments": server_options(args).arguments}

    def open_once() -> None:
        if share.rank == 0:
            weights = files_hash(args.model, model.config)
            stack.enter_context(run_lock(work_folder(args.output), "evaluates", "another output"))
            open_work(args.output, plan | {"weights": weights}, args.overwrite)

    share.wait()
    share.together(open_once)
    return KeptResponses(args.output, share)


def load_for(args: argparse.Namespace, share: Share) -> tuple[Any, Any]:
    """Model and tokenizer; of a model that a server loads, its skeleton alone."""
    if args.backend == "hf":
        return load(args.model, args.device or share.device, args.dtype)
    from padd_ds.hf import DTYPES, load_skeleton, load_tokenizer

    dtype = DTYPES[args.dtype or default_dtype(preferred_device(share.device))]
    return load_skeleton(args.model, dtype), load_tokenizer(args.model)


def preferred_device(name: str | None) -> Any:
    """The torch device of this name; without one an accelerator, if there is one."""
    import torch

    if name:
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_dtype(device: Any) -> str:
    """The name of the precision for which --dtype need not be given."""
    return "float32" if device.type == "cpu" else "bfloat16"


def load(source: str, device_name: str | None, dtype_name: str | None) -> tuple[Any, Any]:
    """Model and tokenizer; UserError for a device that is not there."""
    import torch

    from padd_ds.hf import DTYPES, load_causal_lm, load_tokenizer

    try:
        device = preferred_device(device_name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device_name} cannot be used here ({reason}); try --device cpu") from error
    dtype = DTYPES[dtype_name or default_dtype(device)]
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
        "device": str(model.device) if args.backend == "hf" else "vllm",
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
