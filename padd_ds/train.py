"""Train a student: `deepspeed padd_ds/train.py --config RUN.yaml [section.key=value ...]`.

Runs under deepspeed, torchrun, srun and mpirun, or alone on one rank.
"""

import argparse
import json
import logging
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from padd_ds.config.deepspeed_json import load_deepspeed_json
from padd_ds.config.describe import describe_options
from padd_ds.config.load import as_yaml, load_run_config
from padd_ds.errors import (
    EXIT_CODE_STOPPED,
    EXIT_CODE_USER_ERROR,
    HandoverError,
    OneRankError,
    RolloutFailed,
    TrainingDiverged,
    UserError,
)
from padd_ds.launcher import launched_rank
from padd_ds.run.lock import run_lock
from padd_ds.run.stop import StoppedEarly, StopRequest

EPILOG = """examples:
  deepspeed --num_accelerators 2 padd_ds/train.py --config ds_configs/runs/warmup.yaml run_dir=runs/a
  torchrun --nproc_per_node 8 padd_ds/train.py --config RUN.yaml optimizer.learning_rate=1e-5
  deepspeed --num_accelerators 2 padd_ds/train.py --config RUN.yaml --resume
Values come from defaults, then the YAML file, then section.key=value; --options lists them all."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="padd_ds/train.py",
        description="Warm up a mixture-of-experts student, or train it jointly (PADD).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="run configuration (YAML), for example ds_configs/runs/warmup.yaml")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of run_dir")
    again.add_argument(
        "--resume-or-start", action="store_true", help="go on where run_dir is there, else start: for requeued jobs"
    )
    parser.add_argument(
        "--options", action="store_true", help="list every option with its default and meaning, then exit"
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="pass over checkpoints whose files are damaged, and name them"
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print the resolved run configuration and DeepSpeed JSON, then exit"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the YAML file")
    # Overrides may stand before and behind other options.
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.config is None and not parsed.options:
        parser.error("--config is needed (see --options for what it may hold)")
    return parsed


def run(arguments: argparse.Namespace, stop: StopRequest) -> None:
    """Check, build, train; UserError before any work where an input is wrong."""
    config = load_run_config(arguments.config, arguments.overrides)
    if arguments.show_config:
        print(
            as_yaml(config), f"# {config.deepspeed}", json.dumps(load_deepspeed_json(Path(config.deepspeed))), sep="\n"
        )
        return

    # Imported late: --help and a wrong key should not wait for torch.
    from padd_ds.engine.checkpoint import last_whole_checkpoint
    from padd_ds.engine.ranks import PATIENCE_S, any_rank, on_main, start_ranks, stop_ranks, together
    from padd_ds.run.boards import check_boards, log_in
    from padd_ds.run.folder import check_run_folder, is_finished, keep_student_files, start_run_folder
    from padd_ds.run.loop import end_if_asked, train
    from padd_ds.run.report import REPORT, write_run_report
    from padd_ds.stages.build import open_stage, read_inputs
    from padd_ds.stages.materials import write_data_report

    folder = Path(config.run_dir)
    ranks = start_ranks(PATIENCE_S + config.longest_wait_for_servers_s)
    quiet_libraries()
    try:
        with ExitStack() as stack:
            resume = arguments.resume or (arguments.resume_or_start and any_rank(folder.is_dir(), ranks))
            together(lambda: check_run_folder(folder, resume), ranks)
            together(lambda: check_boards(config), ranks)
            together(lambda: log_in(config) if ranks.is_main else None, ranks)
            inputs = together(lambda: read_inputs(config, ranks.world), ranks)
            together(lambda: stack.enter_context(run_lock(folder)) if ranks.is_main else None, ranks)
            resumed = last_whole_checkpoint(folder, ranks, arguments.skip_damaged, say) if resume else None
            if resumed and on_main(lambda: is_finished(folder, config, resumed), ranks):
                if ranks.is_main:
                    say(f"{folder}: all {resumed.step} steps are done, so nothing is trained")
                    # A run may have ended between its last checkpoint and its page.
                    if config.log.report and not (folder / REPORT).exists():
                        write_run_report(folder, say)
                return
            together(lambda: start_run_folder(folder, config, ranks.world, resumed) if ranks.is_main else None, ranks)
            end_if_asked(stop, folder, resumed.step if resumed else 0, ranks)
            together(lambda: write_data_report(inputs.data, config, say) if ranks.is_main else None, ranks)
            stage = stack.enter_context(open_stage(inputs, ranks))
            model, source = stage.student.model, Path(config.model.student)
            keep = partial(keep_student_files, folder, model, inputs.tokenizer, source)
            together(lambda: keep() if ranks.is_main else None, ranks)
            train(stage, config, ranks, resumed, stop)
        if ranks.is_main and config.log.report:
            write_run_report(folder, say)
    finally:
        stop_ranks()


def say(text: str) -> None:
    """A line for the user, apart from results."""
    print(text, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Warnings and errors only; the start-up of the libraries otherwise fills a screen per rank."""
    import transformers

    for name in ("DeepSpeed", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed calls collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; exit code 2 with one line on a user's error, told by rank 0 unless another alone knows it."""
    # Started by path, this folder comes first on the path, and its modules would hide others of the same name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if parsed.options:
        print(describe_options())
        return
    try:
        with StopRequest() as stop:
            run(parsed, stop)
    except StoppedEarly as stopped:
        if launched_rank() in (None, 0):
            say(f"{stopped}; the same command with --resume goes on")
        sys.exit(EXIT_CODE_STOPPED)
    except (HandoverError, RolloutFailed, TrainingDiverged) as error:
        if launched_rank() in (None, 0):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except UserError as error:
        if launched_rank() in (None, 0) or isinstance(error, OneRankError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE_USER_ERROR)


if __name__ == "__main__":
    main()
