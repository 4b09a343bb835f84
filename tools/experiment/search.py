"""What of the search goes into docs/results.md."""

from tools.experiment.result import Result
from tools.experiment.settings import SHAPES, TUNED

HEAD = """## The search, {title}

Pass@1 in percent on *validation* questions, seed {seed}. **Bold** is what the tables have; it was chosen by the mean of
greedy and sampled.

| row | candidate | greedy | sampled | mean |
|---|---|---|---|---|
"""


def search_section(results: list[Result], titles: dict[str, str]) -> str:
    """A table of the candidates of one shape."""
    lines = []
    for result in results:
        headline, options, row = result["headline"], result["options"], result["row"]
        greedy, sampled = 100 * headline["problems"]["pass_at_1"], 100 * headline["samples"]["pass_at_1"]
        mark = "**" if options == " ".join(TUNED[result["shape"]][row]) else ""
        figures = f"{greedy:.1f} | {sampled:.1f} | {(greedy + sampled) / 2:.1f}"
        title = titles[row].strip("*").removeprefix("the same after ")
        lines.append(f"| {title} | {mark}`{options}`{mark} | {figures} |")
    return HEAD.format(seed=results[0]["seed"], title=SHAPES[results[0]["shape"]].title) + "\n".join(lines)
