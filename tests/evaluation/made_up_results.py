"""Results of padd-eval with made-up verdicts, for tests of comparisons."""

import json
from pathlib import Path
from typing import Any

SUBJECTS = ("algebra", "<b>geometry</b>")


def make_result(
    path: Path,
    greedy: str,
    drawn: str = "",
    problems: str = "a",
    costs: tuple[int, int] | None = (100, 100),
    samples: int = 2,
    **settings: Any,
) -> Path:
    """A mark per response: 1 right, 0 wrong, ? with a gold answer that cannot be read."""
    rows = [_row(place, 0, mark) for place, mark in enumerate(greedy)]
    sampled = [_row(place // samples, 1 + place % samples, mark) for place, mark in enumerate(drawn)]
    config = {"model_type": "qwen3", "rope": {"theta": 1e4}} | ({"experts": 4} if costs and costs[0] < costs[1] else {})
    facts = (
        {"active_parameters": costs[0], "total_parameters": costs[1], "flops_per_token": 3 * costs[0]} if costs else {}
    )
    document = {
        "headline": {"problems": _scores(rows, 1), "samples": _scores(sampled, samples) if drawn else None},
        "settings": {
            "model": f"models/{path.stem}",
            "data": "data/test.jsonl",
            "benchmark": None,
            "problems_sha256": problems,
            "dtype": "float32",
            "device": "cpu",
            **settings,
        },
        "versions": {"torch": "2.13.0"},
        "responses_file": f"{path.stem}.responses.jsonl",
        "responses": [{key: row[key] for key in ("problem", "sample", "correct", "status")} for row in rows],
        "sampled_responses": [{key: row[key] for key in ("problem", "sample", "correct", "status")} for row in sampled],
    }
    if costs is not None:
        document["model"] = {"config": config, "costs": facts}
    path.write_text(json.dumps(document))
    lines = [json.dumps(row) + "\n" for row in [*rows, *sampled]]
    path.with_name(f"{path.stem}.responses.jsonl").write_text("".join(lines))
    return path


def _row(place: int, sample: int, mark: str) -> dict[str, Any]:
    return {
        "problem": place,
        "sample": sample,
        "question": f"What is {place} < {place + 1}? <script>alert({place})</script>",
        "gold": f"<i>{place}</i>",
        "subject": SUBJECTS[place % 2],
        "level": None,
        "response": f"</pre><script>alert('response {place}')</script> $x$",
        "extracted": f"<u>{place}</u>",
        "correct": mark == "1",
        "status": "gold_unparsable" if mark == "?" else "ok",
        "tokens": 7,
        "ended": True,
    }


def _scores(rows: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    counted = [row for row in rows if row["status"] == "ok"]
    by: dict[str, list[int]] = {}
    for row in counted:
        right, total = by.get(row["subject"], (0, 0))
        by[row["subject"]] = [right + row["correct"], total + 1]
    return {
        "pass_at_1": sum(row["correct"] for row in counted) / max(1, len(counted)),
        "interval_95": [0.1, 0.9],
        "problems": len(counted) // samples,
        "samples": samples,
        "truncated": 1,
        "tokens_mean": 7.0,
        "by_subject": by,
        "by_level": {},
    }
