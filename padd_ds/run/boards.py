"""Where a run's metrics go beside its own files: tensorboard, and Weights & Biases where that is asked for."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from padd_ds.config.load import as_yaml
from padd_ds.config.schema import RunConfig
from padd_ds.errors import UserError
from padd_ds.files import write_text_whole

Board = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its metrics."""
WANDB_ID = "wandb_id"
"""File of the run's folder by which a resumed run goes on under its own name there."""


def check_boards(config: RunConfig) -> None:
    """UserError for a package that is asked for and not installed."""
    if config.log.wandb is not None and find_spec("wandb") is None:
        raise UserError(
            f"log.wandb={config.log.wandb}: wandb is not installed; run pip install wandb, or leave the key out"
        )


def log_in(config: RunConfig) -> None:
    """Where metrics go to wandb, its login, which asks for a key on a terminal; UserError where there is none."""
    if config.log.wandb is not None:
        import wandb

        with _told(config.log.wandb):
            wandb.login()


@contextmanager
def _told(project: str) -> Iterator[None]:
    """wandb's own errors as one line."""
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise UserError(
            f"log.wandb={project}: wandb does not start ({' '.join(str(error).split())}); run wandb login, or set "
            "WANDB_MODE=offline"
        ) from error


def open_boards(folder: Path, config: RunConfig, start: int, stack: ExitStack) -> list[Board]:
    """Those that `config.log` names, closed with `stack`, for a run whose next step is `start`.

    UserError where wandb does not start.
    """
    boards = []
    if config.log.tensorboard:
        boards.append(_tensorboard(folder, start, stack))
    if config.log.wandb is not None:
        boards.append(_wandb(folder, config, config.log.wandb, stack))
    return boards


def _tensorboard(folder: Path, start: int, stack: ExitStack) -> Board:
    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard"), purge_step=start))

    def board(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return board


def _wandb(folder: Path, config: RunConfig, project: str, stack: ExitStack) -> Board:
    import wandb

    known_as = folder / WANDB_ID
    if not known_as.exists():
        write_text_whole(known_as, secrets.token_hex(8) + "\n")
    with _told(project):
        run = wandb.init(
            project=project,
            name=folder.absolute().name,
            id=known_as.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=yaml.safe_load(as_yaml(config)),
        )
    stack.enter_context(run)
    # A resumed run does again what follows its checkpoint, and wandb's own steps only grow.
    run.define_metric("*", step_metric="step")
    return lambda step, metrics: run.log({"step": step, **metrics})
