"""The page that a finished run leaves."""

from collections.abc import Callable
from pathlib import Path

from padd_ds.errors import UserError
from padd_ds.files import write_text_whole
from padd_ds.report.runs_page import runs_page
from padd_ds.report.source import read_runs

REPORT = "report.html"


def write_run_report(folder: Path, say: Callable[[str], None]) -> None:
    """Into the run's folder; where a file of it cannot be read a line, as the training itself is done and saved."""
    try:
        write_text_whole(folder / REPORT, runs_page(read_runs([folder])))
    except UserError as error:
        say(f"no {REPORT}: {error}")
