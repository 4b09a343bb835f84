"""padd-cache: record a dense teacher, its likelihoods or its own responses, for distillation without it."""

import argparse
from pathlib import Path

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import check_target, resolve_template
from padd_ds.data.split import DEFAULT_FRACTIONS, add_part_fractions, split_problems
from padd_ds.errors import UserError, run_cli
from padd_ds.evaluate import chat_template, read_problems
from padd_ds.evaluation.arguments import (
    add_problem_options,
    add_prompt_options,
    check_at_least,
    check_problems_and_prompts,
)
from padd_ds.files import check_output_free

EPILOG = """examples:
  padd-cache --teacher DIR --data train.jsonl --solution-field solution --part B --output cache
  padd-cache --teacher DIR --data train.jsonl --part B --responses 4 --output cache
The folder holds cache.json, shards of likelihoods and responses.jsonl. Train on them with warmup.teacher_cache=cache,
data.source=cache/responses.jsonl, data.fields.solution=solution and data.part=all."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="padd-cache", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, metavar="DIR", help="dense checkpoint folder or hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    problems = add_problem_options(parser)
    problems.add_argument("--subject-field", metavar="NAME", help="kept beside every target")
    problems.add_argument("--solution-field", metavar="NAME", help="worked solutions, learnt where none are drawn")
    parser.set_defaults(level_field=None)
    add_prompt_options(parser, template="plain", drawn_by="--responses")
    what = parser.add_argument_group("what is recorded")
    what.add_argument("--part", choices=[*"ABCD", "all"], default="all", help="part of the training set (default all)")
    add_part_fractions(what)
    what.add_argument(
        "--responses", type=int, default=0, metavar="N", help="draw N per question and keep the right ones (default 0)"
    )
    what.add_argument("--target", default="{solution}", help="of the data's own solutions (default %(default)s)")
    what.add_argument("--top-k", type=int, default=64, help="likeliest tokens kept; 0: none (default %(default)s)")
    what.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and target (default %(default)s)")
    what.add_argument("--shard-rows", type=int, default=1024, help="questions per file (default %(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--batch-size", type=int, default=32, help="rows at once (default %(default)s)")
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on cpu, bfloat16 elsewhere"
    )
    run.add_argument("--device", help="such as cpu or cuda:1 (default: an accelerator if there is one)")
    run.add_argument("--seed", type=int, default=0, help="of what --responses draws")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_arguments(args)
    template = chat_template(args.template, args.chat) if args.template else resolve_template("plain")
    answer_format = AnswerFormat(name=args.answer_format, pattern=args.pattern)
    problems = chosen_part(read_problems(args), args)

    # Here and not above: what the user got wrong is told before torch has taken seconds to load.
    from padd_ds.evaluate import load
    from padd_ds.evaluation.generate import GenerationOptions
    from padd_ds.evaluation.record import RecordOptions, record, weights_hash

    model, tokenizer = load(args.teacher, args.device, args.dtype)
    generation = GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        stop=tuple(args.stop),
        temperature=args.temperature,
        top_p=args.top_p,
    )
    options = RecordOptions(
        template=template,
        target=args.target,
        max_length=args.max_length,
        top_k=min(args.top_k, model.config.vocab_size),
        responses=args.responses,
        generation=generation,
        answer_format=answer_format,
        shard_rows=args.shard_rows,
        seed=args.seed,
    )
    source = {
        "teacher": args.teacher,
        "weights": weights_hash(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocabulary": model.config.vocab_size,
    }
    counts = record(model, tokenizer, problems, options, args.output, source)
    print(f"{args.output}: {counts['targets']} targets to {counts['questions']} of {len(problems)} questions")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be refused without reading anything."""
    check_output_free(args.output, overwrite=False)
    if not (args.benchmark or args.data):
        raise UserError("nothing to record; give --data")
    check_problems_and_prompts(args)
    check_at_least(args, {"top_k": 0, "responses": 0, "max_length": 2, "shard_rows": 1})
    if args.responses > 1 and args.temperature == 0:
        raise UserError(
            f"--responses {args.responses} at --temperature 0 are all the same; pass a higher one, or --responses 1"
        )
    check_target(args.target)
    if args.responses and args.target != "{solution}":
        raise UserError("--target is of the data's own solutions; leave it out with --responses")
    if args.responses == 0 and args.top_k == 0:
        raise UserError("--top-k 0 without --responses records nothing; pass one of them")
    solutions = args.solution_field or args.gold_format != "plain"
    if args.responses == 0 and not solutions and "{solution}" in args.target:
        raise UserError(
            "--solution-field is missing: it names what is learnt; or pass --responses, or another --target"
        )
    if args.part == "all" and args.part_fractions is not None:
        raise UserError("--part-fractions are those of --part; pass that too")


def chosen_part(problems: list[Problem], args: argparse.Namespace) -> list[Problem]:
    """The problems of --part, split as training splits them."""
    if args.part == "all":
        return problems
    part = split_problems(problems, args.part_fractions or DEFAULT_FRACTIONS).parts[args.part]
    if not part:
        raise UserError(
            f"--part {args.part} of {args.data or args.benchmark} has no problem; give more data, or --part all"
        )
    return part


def cli() -> None:
    run_cli(main)


if __name__ == "__main__":
    cli()
