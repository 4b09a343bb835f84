"""The options of padd-eval, and what can be refused of them before anything is read."""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from padd_ds.config.load import read_words
from padd_ds.config.sections import VllmConfig
from padd_ds.data.answers import ANSWER_FORMATS
from padd_ds.data.problems import GOLD_FORMATS
from padd_ds.data.prompts import TEMPLATES
from padd_ds.errors import UserError
from padd_ds.evaluation.benchmarks import BENCHMARKS
from padd_ds.evaluation.kept import responses_file, work_folder
from padd_ds.files import check_output_free
from padd_ds.launcher import launched_world

DESCRIPTION = "Pass@1 on checkable problems, perplexity on a text, and routing, of any causal language model folder."
BATCH_SIZES = {"hf": 32, "vllm": 256}
"""Of each backend, unless --batch-size is given."""
SERVER_KEYS = (
    *("python", "tensor_parallel", "memory_share", "cache_gib", "arguments", "environment"),
    *("start_timeout_s", "answer_timeout_s", "max_restarts"),
)
"""Those of a run's section `vllm` that --vllm takes."""
SERVER_DEFAULTS = {"memory_share": 0.9, "answer_timeout_s": 7200.0}
"""A server that shares its GPU with no trainer, and answers long responses while many others are drawn."""
DTYPE_NAMES = ("float32", "bfloat16", "float16")
EPILOG = """examples:
  padd-eval --model DIR --benchmark math500 --data-dir data --output results/math500.json
  padd-eval --model DIR --benchmark aime24 --samples 32 --temperature 0.6 --output results/aime24.json
  torchrun --nproc_per_node 8 -m padd_ds.evaluate --model DIR --benchmark math500 --output results/math500.json
  padd-eval --model DIR --benchmark math500 --data-dir data --backend vllm --output results/math500.json
  padd-eval --model DIR --benchmark math500 --data-dir data --routing-analysis --output results/routing.json
  padd-eval --compare results/teacher.json results/student.json --output results/report.html
  padd-eval --runs runs/joint runs/vanilla --output results/runs.html
  padd-eval --check-overlap train.jsonl --data-dir data
After an interruption the same command goes on where it was, on any number of ranks. docs/evaluation.md tells more."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="padd-eval", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder or hub id")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write: JSON, or a page for --compare")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a result file, or what another evaluation left unfinished"
    )
    parser.add_argument(
        "--check-overlap",
        metavar="FILE",
        help="no model: list the rows of this training data that hold questions of --benchmark, or of all benchmarks",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RESULT",
        help="no model: results beside the first, question by question; with --output, as an HTML page",
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="no model: a page in --output on folders of training runs, side by side; --compare adds results",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    problems = add_problem_options(parser)
    problems.add_argument("--subject-field", metavar="NAME", help="report Pass@1 by this field too")
    problems.add_argument("--level-field", metavar="NAME", help="and by this one")
    problems.add_argument("--solution-field", metavar="NAME", help="measure the perplexity of these texts too")
    prompts = add_prompt_options(parser, template="chat-boxed or boxed", drawn_by="--samples")
    prompts.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="beside the greedy response, draw N for Avg@N and Pass@k (default: 32 for aime24, else 0)",
    )
    text = parser.add_argument_group("perplexity")
    text.add_argument("--perplexity", type=Path, metavar="TEXTFILE", help="plain text to measure it on")
    text.add_argument("--window", type=int, default=256, help="tokens per window (default %(default)s)")
    text.add_argument("--max-windows", type=int, help="windows to use (default: all)")
    add_routing_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--backend", choices=BATCH_SIZES, default="hf", help="what draws responses: transformers (default), or vLLM"
    )
    run.add_argument(
        "--vllm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"option of vLLM's server, as in a run's section vllm; of {', '.join(SERVER_KEYS)}",
    )
    run.add_argument("--batch-size", type=int, help="responses at once (default 32; with --backend vllm 256)")
    run.add_argument("--dtype", choices=DTYPE_NAMES, help="default: float32 on cpu, bfloat16 elsewhere")
    run.add_argument("--device", help="such as cpu or cuda:1 (default: an accelerator if there is one)")
    run.add_argument("--check-workers", type=int, default=1, help="answer checking processes")
    run.add_argument("--check-timeout", type=float, default=5.0, metavar="SECONDS", help="for one answer")
    run.add_argument("--seed", type=int, default=0, help="of what --samples draws")
    args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = BATCH_SIZES[args.backend]
    return args


def add_routing_options(parser: argparse.ArgumentParser) -> None:
    """What to measure of a mixture of experts."""
    routing = parser.add_argument_group("routing of a mixture of experts, on the problems with their solutions")
    routing.add_argument(
        "--routing", action="store_true", help="load, NMI and ESI by subject too (needs --solution-field)"
    )
    routing.add_argument(
        "--routing-analysis",
        action="store_true",
        help="no responses: the whole analysis, as JSON in --output and as a page beside it",
    )
    routing.add_argument(
        "--routing-before",
        nargs="+",
        metavar="DIR",
        help="checkpoint to measure the router's shift from; several, earliest first, for their course over training",
    )
    routing.add_argument(
        "--routing-teacher",
        metavar="DIR",
        help="teacher whose clusters of neurons the choices are held against (with --routing-analysis)",
    )
    routing.add_argument(
        "--routing-targets", metavar="DIR", help="folder with padd_targets.safetensors (default: --model)"
    )


def add_problem_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which problems; read by `read_problems`, with the fields that a command adds to the group that is returned."""
    problems = parser.add_argument_group("problems")
    source = problems.add_mutually_exclusive_group()
    source.add_argument("--benchmark", choices=BENCHMARKS, help="a public benchmark")
    source.add_argument("--data", metavar="FILE", help="your own: JSONL, JSON, parquet, a folder, a hub name")
    problems.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with benchmark files")
    problems.add_argument("--split", help="split of --data")
    problems.add_argument("--question-field", default="question", metavar="NAME")
    problems.add_argument("--answer-field", default="answer", metavar="NAME")
    problems.add_argument("--gold-format", choices=GOLD_FORMATS, default="plain", help="how rows hold it")
    problems.add_argument("--limit", type=int, metavar="N", help="the first N problems only")
    return problems


def add_prompt_options(parser: argparse.ArgumentParser, *, template: str, drawn_by: str) -> argparse._ArgumentGroup:
    """How they are put, and answers found. For --help: the default template, and the option by which responses are
    drawn."""
    prompts = parser.add_argument_group("prompts and answers")
    prompts.add_argument(
        "--template",
        metavar="NAME_OR_TEXT",
        help=f"{', '.join(TEMPLATES)}, or text with {{question}} (default: {template})",
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
    prompts.add_argument("--temperature", type=float, default=1.0, help=f"of {drawn_by} (default %(default)s)")
    prompts.add_argument("--top-p", type=float, default=1.0, help=f"of {drawn_by} (default %(default)s)")
    prompts.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer")
    return prompts


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
    if args.samples and not (args.benchmark or args.data):
        raise UserError("--samples goes with --benchmark or --data")
    if args.routing and not args.solution_field:
        raise UserError("--routing follows worked solutions; name their field by --solution-field")
    check_backend(args)
    check_routing(args)
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature} must be above 0; the greedy response is always made")
    check_problems_and_prompts(args)
    check_at_least(args, {"max_windows": 1, "check_workers": 1, "window": 2, "samples": 0, "check_timeout": 0})


def check_problems_and_prompts(args: argparse.Namespace) -> None:
    """UserError for options of `add_problem_options` and `add_prompt_options` that are not right."""
    if args.data_dir and not args.benchmark:
        raise UserError("--data-dir goes with --benchmark; a file of your own is named by --data")
    if args.chat and not args.template:
        raise UserError("--chat goes with --template")
    counts = ("limit", "batch_size", "max_new_tokens")
    check_at_least(args, dict.fromkeys(counts, 1) | {"tolerance": 0, "temperature": 0})
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} must be above 0 and at most 1")


def check_backend(args: argparse.Namespace) -> None:
    """UserError for what does not go with the backend."""
    if args.backend == "hf":
        if args.vllm:
            raise UserError("--vllm goes with --backend vllm")
        return
    for name in ("perplexity", "solution_field", "routing", "routing_analysis"):
        if getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} cannot be measured with --backend vllm, which draws responses alone; "
                "leave it out, and measure it by a command of its own"
            )
    if args.device:
        raise UserError(
            f"--device {args.device}: a vLLM server takes the GPUs of CUDA_VISIBLE_DEVICES; set that instead"
        )
    server_options(args)


def server_options(args: argparse.Namespace) -> VllmConfig:
    """The options of --vllm; UserError for one that is not right."""
    # The section's bound on tensor_parallel is that of ranks which share a server; here each has its own.
    base = SERVER_DEFAULTS | {"ranks_per_server": sys.maxsize}
    return cast(VllmConfig, read_words(VllmConfig, args.vllm, "--vllm", SERVER_KEYS, base))


def check_routing(args: argparse.Namespace) -> None:
    """UserError for routing options that do not go together."""
    if args.routing_before and not (args.routing or args.routing_analysis):
        raise UserError("--routing-before goes with --routing or --routing-analysis")
    if len(args.routing_before or []) > 1 and not args.routing_analysis:
        raise UserError(
            "--routing compares with one checkpoint; name one by --routing-before, or use --routing-analysis"
        )
    if args.routing_teacher and not args.routing_analysis:
        raise UserError("--routing-teacher goes with --routing-analysis")
    if args.routing_targets and not args.routing_teacher:
        raise UserError("--routing-targets goes with --routing-teacher")
    if not args.routing_analysis:
        return
    for name in ("perplexity", "samples", "routing"):
        if getattr(args, name):
            raise UserError(f"--routing-analysis measures the routing alone; leave out --{name}")
    if not (args.benchmark or args.data):
        raise UserError("--routing-analysis goes with --benchmark or --data")
    if launched_world() > 1:
        raise UserError("--routing-analysis runs in one process; start it without a launcher")
    if args.output.suffix == ".html":
        raise UserError(f"--output {args.output} is for the numbers, as JSON; the page takes its name with .html")
    for path in (args.output.with_suffix(".html"), page_files(args.output)):
        check_output_free(path, args.overwrite)


def page_files(output: Path) -> Path:
    """The folder with the plots and tables of a page."""
    return output.with_name(output.stem + "_files")


def check_at_least(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """UserError for the first of these options that is given and below its bound, or no finite number."""
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= bound):
            finite = "" if math.isfinite(value) else "a finite number, "
            raise UserError(f"--{name.replace('_', '-')} {value} must be {finite}at least {bound}")
