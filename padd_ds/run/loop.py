"""The training loop: step, log, checkpoint."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from padd_ds.config.schema import RunConfig
from padd_ds.engine.checkpoint import Checkpoint, load_checkpoint, rotate_checkpoints, save_checkpoint
from padd_ds.engine.ranks import Ranks, any_rank, together
from padd_ds.files import DISK_FULL_HINT, disk_full_is_user_error
from padd_ds.run.boards import open_boards
from padd_ds.run.folder import append_line, drop_lines_from
from padd_ds.run.stop import STOPPED, StopRequest
from padd_ds.stages.stage import Stage, StepReport

SHOWN = ("loss_lm", "loss_kd", "loss_init", "loss_policy", "reward", "reward_correct", "load_max_violation")


def train(stage: Stage, config: RunConfig, ranks: Ranks, resume_from: Checkpoint | None, stop: StopRequest) -> None:
    """Run the stage from its start, or from a checkpoint, to its last step.

    StoppedEarly, on all ranks and behind a checkpoint, once `stop` is asked of one of them.
    """
    folder, start = Path(config.run_dir), 0 if resume_from is None else resume_from.step
    end_if_asked(stop, folder, start, ranks)
    if resume_from is not None:
        load_checkpoint(stage.student, resume_from, stage.load_state)
    if ranks.is_main:
        drop_lines_from(folder, start)
        (folder / STOPPED).unlink(missing_ok=True)
    with ExitStack() as stack:
        logger = together(lambda: Logger(folder, config, start, stack) if ranks.is_main else None, ranks)
        for step in range(start, config.steps):
            report = stage.step(step)
            if logger is not None:
                logger.log(step, report)
            done = step + 1
            stopping = any_rank(stop.signal_name is not None, ranks) and done < config.steps
            if stopping or done == config.steps or done % config.checkpoint.every_steps == 0:
                _checkpoint(stage, config, ranks, done)
            if stopping:
                raise stop.carried_out(folder, done, ranks.is_main)


def end_if_asked(stop: StopRequest, folder: Path, step: int, ranks: Ranks) -> None:
    """StoppedEarly on all ranks, `step` steps being saved, where `stop` was asked of one of them. Collective."""
    if any_rank(stop.signal_name is not None, ranks):
        raise stop.carried_out(folder, step, ranks.is_main)


def _checkpoint(stage: Stage, config: RunConfig, ranks: Ranks, step: int) -> None:
    facts = {
        "stage": config.stage,
        "bias_target": config.balance.target if config.balances_by_bias else "selection",
    }
    folder = Path(config.run_dir)
    save_checkpoint(stage.student, folder, step, stage.state(), facts)
    rotate_checkpoints(folder, config.checkpoint.keep, ranks)


class Logger:
    """Rank 0's files and progress lines."""

    def __init__(self, folder: Path, config: RunConfig, start: int, stack: ExitStack) -> None:
        self._folder = folder
        self._config = config
        self._start = start
        self._started_s = time.monotonic()
        self._boards = open_boards(folder, config, start, stack)

    def log(self, step: int, report: StepReport) -> None:
        """One line each in metrics.jsonl and on the terminal; routing and samples less often.

        UserError when the disk is full.
        """
        with disk_full_is_user_error(self._folder, DISK_FULL_HINT):
            self._log(step, report)

    def _log(self, step: int, report: StepReport) -> None:
        log = self._config.log
        if self._config.is_logged(step):
            append_line(self._folder / "metrics.jsonl", {"step": step, **report.metrics})
            for board in self._boards:
                board(step, report.metrics)
            for sample in report.samples:
                append_line(self._folder / "samples.jsonl", {"step": step, **sample})
            print(self._progress(step, report), file=sys.stderr, flush=True)
        if report.routing and (step + 1 == self._config.steps or step % log.routing_every_steps == 0):
            append_line(self._folder / "routing" / "routing.jsonl", {"step": step, **report.routing})

    def _progress(self, step: int, report: StepReport) -> str:
        done = step + 1 - self._start
        step_s = (time.monotonic() - self._started_s) / done
        left_s = step_s * (self._config.steps - step - 1)
        shown = [f"{name} {report.metrics[name]:.4g}" for name in SHOWN if name in report.metrics]
        place = f"{self._config.stage} step {step + 1}/{self._config.steps}"
        return f"{place} | {', '.join(shown)} | {step_s:.2f} s/step, {clock(left_s)} left"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
