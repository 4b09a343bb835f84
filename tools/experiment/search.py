"""What of the search goes into docs/results.md."""

from typing import Any

from padd_ds.config.load import load_run_config
from tools.experiment.result import Result
from tools.experiment.runner import ROOT

HEAD = """## The search

Greedy and sampled Pass@1 in percent on *validation* questions, seed {seed}, {shape}; every candidate is its row of the
table with one setting changed. **Bold** is what the table has; it was chosen by the mean of the two.

| row | candidate | greedy | sampled | mean |
|---|---|---|---|---|
"""


def search_section(results: list[Result], rows: dict[str, Result], titles: dict[str, str]) -> str:
    """A table of all candidates, from their results and those of the main table by row; empty where there are none."""
    if not results:
        return ""
    lines = []
    for result in results:
        headline, options = result["headline"], result["options"]
        greedy, sampled = 100 * headline["problems"]["pass_at_1"], 100 * headline["samples"]["pass_at_1"]
        row = rows.get(result["row"])
        mark = "**" if row is not None and settings_of(row, options) == settings_of(result, options) else ""
        title = titles[result["row"]].strip("*")
        figures = f"{greedy:.1f} | {sampled:.1f} | {(greedy + sampled) / 2:.1f}"
        lines.append(f"| {title} | {mark}`{options}`{mark} | {figures} |")
    return HEAD.format(seed=results[0]["seed"], shape=results[0]["shape"]) + "\n".join(lines)


def settings_of(result: Result, options: str) -> list[Any]:
    """The values that a cell's run has for the keys of `options`, assignments separated by spaces."""
    command = next(command for command in result["commands"] if "padd_ds/train.py" in command)
    words = [word.replace("{here}", "here").replace("{work}", "work") for word in command]
    words = words[words.index("--config") + 1 :]
    config = load_run_config(ROOT / words[0], words[1:])
    found = []
    for assignment in options.split(" "):
        value: Any = config
        for name in assignment.partition("=")[0].split("."):
            value = getattr(value, name)
        found.append(value)
    return found
