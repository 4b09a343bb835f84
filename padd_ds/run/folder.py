"""The folder that a run leaves.

`config.yaml` (resolved), `environment.json` (versions, commit, ranks), `student/` (all of the student but its
weights), `metrics.jsonl`, `samples.jsonl`, `routing/routing.jsonl`, `tensorboard/`, with log.wandb `wandb/` and
`wandb_id`, `checkpoints/step_N/`, `report.html` when all is done, `dropped_questions.jsonl` if there are any.
"""

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from padd_ds.checkpoint.layout import STUDENT, Checkpoint
from padd_ds.config.load import as_yaml
from padd_ds.config.schema import RunConfig
from padd_ds.conversion.card import CARD_NAME, LICENCE_FILES
from padd_ds.conversion.companions import write_generation_config
from padd_ds.errors import UserError
from padd_ds.files import check_creatable, staged_directory, write_text_whole

PACKAGES = ("padd-ds", "torch", "deepspeed", "transformers", "datasets", "math-verify")
LINE_FILES = ("metrics.jsonl", "samples.jsonl", "routing/routing.jsonl")


def check_run_folder(folder: Path, resume: bool) -> None:
    """UserError for a new run in a folder that is taken or cannot be made, or a resumed one where there is none."""
    if resume and not folder.is_dir():
        raise UserError(f"{folder}: no run to resume; check run_dir or leave out --resume")
    if not resume and folder.exists():
        raise UserError(f"{folder} already exists; choose another run_dir, or continue it with --resume")
    if not resume:
        check_creatable(folder)


def is_finished(folder: Path, config: RunConfig, resumed: Checkpoint) -> bool:
    """Whether a resumed run has no step left; UserError where that is so and it was another configuration."""
    if resumed.step < config.steps:
        return False
    if (folder / "config.yaml").read_text(encoding="utf-8") != as_yaml(config):
        raise UserError(
            f"{folder}: finished at step {resumed.step}, with other settings (config.yaml in it), so these train "
            f"nothing; choose another run_dir, or set steps above {resumed.step} to go on"
        )
    return True


def start_run_folder(folder: Path, config: RunConfig, world: int, resumed: Checkpoint | None = None) -> None:
    """Make the folder with the resolved configuration and where it runs.

    A configuration that was changed for a resumed run takes the place of the earlier one, which stays
    as `config.until_step_N.yaml`. UserError for a checkpoint of another stage.
    """
    if resumed is not None and resumed.facts["stage"] != config.stage:
        raise UserError(f"{resumed.folder}: a checkpoint of stage {resumed.facts['stage']}, resumed as {config.stage}")
    (folder / "routing").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    text = as_yaml(config)
    path = folder / "config.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        path.rename(folder / f"config.until_step_{resumed.step if resumed else 0}.yaml")
    write_text_whole(path, text)
    write_text_whole(folder / "environment.json", json.dumps(environment(world), indent=1) + "\n")


def keep_student_files(folder: Path, model: Any, tokenizer: Any, source: Path) -> None:
    """Put all that an exported student needs but its weights into the run.

    That is config, tokenizer, conversion files, card and licence.
    """
    source = source.expanduser()
    with staged_directory(folder / STUDENT, overwrite=True) as staged:
        model.config.save_pretrained(staged)
        write_generation_config(source, staged, model.generation_config)
        tokenizer.save_pretrained(staged)
        for pattern in ("padd_*", CARD_NAME, *LICENCE_FILES) if source.is_dir() else ():
            for path in source.glob(pattern):
                shutil.copy2(path, staged / path.name)


def environment(world: int) -> dict[str, Any]:
    """Versions, commit, machine and ranks."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "commit": _commit(),
        "ranks": world,
    }


def drop_lines_from(folder: Path, step: int) -> None:
    """Forget what was logged at `step` and later, before it is done again."""
    for name in LINE_FILES:
        path = folder / name
        if path.exists():
            # What follows the last newline is a line that was not finished.
            *lines, _ = path.read_bytes().split(b"\n")
            kept = [line.decode() for line in lines if json.loads(line)["step"] < step]
            write_text_whole(path, "".join(line + "\n" for line in kept))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One JSON line, flushed."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, None outside of one."""
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
