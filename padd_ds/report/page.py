"""The report as one HTML file that needs no network and runs no script."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from padd_ds.errors import UserError
from padd_ds.files import write_text_whole
from padd_ds.report.html import NO_DATA, cut, document, folded, panel_grid
from padd_ds.report.numbers import readable
from padd_ds.report.panels import logged_seconds, training_panels
from padd_ds.report.routing_panels import routing_panels
from padd_ds.report.source import RunData, read_runs
from padd_ds.report.tables import TableRow, html_table

MAX_SAMPLES_PER_STEP = 4
_HINT = (
    "Thin lines: single steps, or means of neighbouring ones in a long run. Thick lines: running mean. "
    "Beside a name: mean of the first tenth of the steps → mean of the last tenth."
)


def write_report(
    path: Path, *, title: str, subtitle: str, rows: list[TableRow], runs: list[Path], notes: list[str]
) -> None:
    """Write a page on the models in `rows` and the run folders in `runs` to `path`, whole or not at all.

    A part that a run did not log is left out or said to have no data. UserError, before anything is written,
    where `path` is a folder or a run has no metrics.jsonl or an unreadable one.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the HTML file to write")
    read = read_runs(runs)
    body = [_head(title, subtitle, read), _headline(rows, notes)]
    body += [run_section(run, index) for index, run in enumerate(read, start=1)]
    write_text_whole(path, document(title, "\n".join(body)))


def _head(title: str, subtitle: str, runs: Sequence[RunData]) -> str:
    links = ['<a href="#results">Results</a>']
    links += [f'<a href="#run-{index}">{escape(run_title(run))}</a>' for index, run in enumerate(runs, start=1)]
    return f'<h1>{escape(title)}</h1>\n<p class="subtitle">{escape(subtitle)}</p>\n<nav>{"".join(links)}</nav>'


def _headline(rows: Sequence[TableRow], notes: Sequence[str]) -> str:
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    listed = f'<ul class="notes">{listed}</ul>' if notes else ""
    return f'<section id="results">\n<h2>Results</h2>\n{html_table(rows)}\n{listed}</section>'


def run_section(run: RunData, index: int) -> str:
    """All that a run logged, as the `index`-th run of the page."""
    key = f"run-{index}"
    return f"""<section id="{key}">
<h2>{escape(run_title(run))}</h2>
<p class="facts">{escape(_facts(run))}</p>
<h3>Training</h3>
<p class="hint">{_HINT}</p>
{panel_grid(training_panels(run), f"{key}/training")}
<h3>Routing by layer and expert</h3>
{panel_grid(routing_panels(run), f"{key}/routing")}
<h3>Responses</h3>
{_responses(run.samples)}
<h3>Settings</h3>
{folded("Configuration (config.yaml)", run.config)}
{folded("Environment (environment.json)", run.environment)}
</section>"""


def run_title(run: RunData) -> str:
    """Its stage in words, and its name."""
    stage = {"teacher_grpo": "GRPO of the teacher", "warmup": "Warm-up", "joint": "Joint training"}.get(
        run.stage, run.stage
    )
    return f"{stage} ({run.name})"


def _facts(run: RunData) -> str:
    facts = [str(run.folder), f"{len(run.metrics)} logged steps"]
    if run.metrics:
        facts.append(f"last step {run.metrics[-1]['step']}")
    if seconds := logged_seconds(run):
        facts.append(f"{readable(seconds)} s")
    return " · ".join(facts)


def _responses(samples: Sequence[Mapping[str, Any]]) -> str:
    """A few responses of the first step that has any, and of the last."""
    if not samples:
        return NO_DATA
    parts = []
    for step in dict.fromkeys((samples[0]["step"], samples[-1]["step"])):
        chosen = [sample for sample in samples if sample["step"] == step][:MAX_SAMPLES_PER_STEP]
        parts += [f'<p class="hint">Step {step}</p>', '<div class="samples">', *map(_response, chosen), "</div>"]
    return "\n".join(parts)


def _response(sample: Mapping[str, Any]) -> str:
    facts = [f"{name} {sample[name]}" for name in ("gold", "status") if sample.get(name) is not None]
    facts += [f"{name} {readable(sample[name])}" for name in ("reward", "advantage") if sample.get(name) is not None]
    return (
        f'<article class="sample"><header>{escape(" · ".join(facts))}</header>'
        f"<p>{escape(cut(sample.get('question', '')))}</p>"
        f"<pre>{escape(cut(sample.get('response', '')))}</pre></article>"
    )
