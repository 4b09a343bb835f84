"""GSM8K by padd-eval and by lm-eval: one model, the same prompts and batch size, the scores and the seconds of each.

lm-eval puts its own task gsm8k (five shots), generates and judges; then padd-eval's generation answers the very same
prompts and its checker judges them. Both take turns. Items that the two judge differently are listed with the reason.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from padd_ds.data.answers import AnswerFormat
from padd_ds.errors import UserError, run_cli
from padd_ds.evaluation.generate import GenerationOptions, generate_responses
from padd_ds.evaluation.intervals import wilson_interval
from padd_ds.files import check_output_free, write_text_whole
from padd_ds.hf import load_causal_lm, load_tokenizer
from padd_ds.rollout.verify import AnswerChecker
from tools.measuring import peak_mib, timed

JUDGES = {"strict-match": AnswerFormat(name="hash"), "flexible-extract": AnswerFormat(name="last_number")}
"""lm-eval's filters of the task, and the answer formats of padd-eval that look in the same place."""
MAX_NEW_TOKENS = 256
"""lm-eval's own limit where a task sets none."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One problem, as both have answered it and judged the answers: one verdict for each of JUDGES."""

    theirs: str
    ours: str
    their_verdicts: tuple[bool, ...]
    our_verdicts: tuple[bool, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="GSM8K's test set, JSON Lines")
    parser.add_argument("--shots", type=Path, required=True, metavar="FILE", help="its training set, for the shots")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="the first N problems (default 200)")
    parser.add_argument("--batch-size", type=int, default=32, help="of both (default 32)")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each takes (default 2)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU's")
    parser.add_argument("--output", type=Path, metavar="FILE", help="all responses and verdicts, as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace it")
    arguments = parser.parse_args()
    for path in (arguments.test, arguments.shots):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name GSM8K's files in JSON Lines")
    for name in ("limit", "batch_size", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if arguments.output:
        check_output_free(arguments.output, arguments.overwrite)
    harness = import_harness()
    device = torch.device(arguments.device)
    model = load_causal_lm(arguments.model, getattr(torch, arguments.dtype)).to(device).eval()
    tokenizer = load_tokenizer(arguments.model)
    lm = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    requests, documents = ask_harness(harness, lm, arguments.test, arguments.shots, arguments.limit)
    prompts, stop = [request.args[0] for request in requests], tuple(requests[0].args[1]["until"])
    options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS, batch_size=arguments.batch_size, stop=stop)

    seconds: dict[str, list[float]] = {"lm-eval": [], "padd-eval": []}
    peaks: dict[str, str] = {}
    for _ in range(arguments.rounds):
        reset_peak(device)
        theirs, taken_s = timed(lambda: lm.generate_until(requests), device)
        seconds["lm-eval"].append(taken_s)
        peaks["lm-eval"] = peak_of(device)
        reset_peak(device)
        ours, taken_s = timed(lambda: generate_responses(model, tokenizer, prompts, options), device)
        seconds["padd-eval"].append(taken_s)
        peaks["padd-eval"] = peak_of(device)
    texts = [response.text for response in ours]
    verdicts = judge(texts, [document["gold"] for document in documents])
    items = [
        Item(theirs=theirs[row], ours=texts[row], their_verdicts=documents[row]["verdicts"], our_verdicts=verdicts[row])
        for row in range(len(prompts))
    ]
    about = f"{len(items)} problems, batches of {arguments.batch_size}, {arguments.dtype}, {device_name(device)}"
    print(f"\n{arguments.model}: {about}\n\n{report(items, seconds, peaks)}")
    if arguments.output:
        rows = [{"prompt": prompt} | vars(item) for prompt, item in zip(prompts, items, strict=True)]
        write_text_whole(arguments.output, json.dumps({"seconds": seconds, "items": rows}, indent=1))


def import_harness() -> Any:
    """What is used of lm-eval."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm-eval is missing ({error}); install it with: pip install -e '.[general]'") from error
    return argparse.Namespace(HFLM=HFLM, TaskManager=TaskManager, package=lm_eval)


def ask_harness(harness: Any, lm: Any, test: Path, shots: Path, limit: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """lm-eval's requests for the first problems, and for each of them its gold answer and lm-eval's verdicts."""
    own = Path(harness.package.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    files = {"train": str(shots.resolve()), "test": str(test.resolve())}
    task = {"include": str(own), "task": "gsm8k_files", "dataset_path": "json", "dataset_name": None}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.yaml").write_text(json.dumps(task | {"dataset_kwargs": {"data_files": files}}))
        manager = harness.TaskManager(include_path=folder, include_defaults=False)
        found = harness.package.simple_evaluate(lm, tasks=["gsm8k_files"], limit=limit, task_manager=manager)
    samples = found["samples"]["gsm8k_files"]
    documents: dict[int, dict[str, Any]] = {}
    for sample in samples:
        gold = sample["target"].split("####")[-1].strip().replace(",", "")
        document = documents.setdefault(sample["doc_id"], {"gold": gold, "by": {}, "arguments": sample["arguments"]})
        document["by"][sample["filter"]] = bool(sample["exact_match"])
    ordered = [documents[number] for number in sorted(documents)]
    for document in ordered:
        document["verdicts"] = tuple(document["by"][name] for name in JUDGES)
    requests = [request_of(document["arguments"]) for document in ordered]
    return requests, ordered


def request_of(arguments: Any) -> Any:
    """A request as `generate_until` takes it, from what lm-eval keeps of it."""
    from lm_eval.api.instance import Instance

    (prompt, settings), *_ = arguments
    return Instance(request_type="generate_until", doc={}, arguments=(prompt, settings), idx=0)


def judge(texts: Sequence[str], gold: Sequence[str]) -> list[tuple[bool, ...]]:
    """padd-eval's verdicts of responses."""
    by_judge = []
    for answer_format in JUDGES.values():
        with AnswerChecker(answer_format) as checker:
            verdicts = checker.check(list(zip(texts, gold, strict=True)))
        by_judge.append([verdict.correct for verdict in verdicts])
    return list(zip(*by_judge, strict=True))


def report(items: Sequence[Item], seconds: dict[str, list[float]], peaks: dict[str, str]) -> str:
    """Scores, what differs and speed, as a text."""
    lines = ["| | " + " | ".join(JUDGES) + " | seconds | peak MiB |", "|---|" + "---|" * (len(JUDGES) + 2)]
    verdicts = {"lm-eval": [i.their_verdicts for i in items], "padd-eval": [i.our_verdicts for i in items]}
    for name, rows in verdicts.items():
        scores = [share([row[place] for row in rows]) for place in range(len(JUDGES))]
        times = ", ".join(f"{one:.1f}" for one in seconds[name])
        lines.append(f"| {name} | {' | '.join(scores)} | {times} | {peaks[name]} |")
    ratios = [them / us for them, us in zip(seconds["lm-eval"], seconds["padd-eval"], strict=True)]
    lines.append(f"\npadd-eval answers {statistics.median(ratios):.2f} times as many problems per second")
    lines.append(f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}).")
    other = [item for item in items if item.ours.strip() != item.theirs.strip()]
    differences = []
    for number, item in enumerate(items, 1):
        for name, them, us in zip(JUDGES, item.their_verdicts, item.our_verdicts, strict=True):
            if them != us:
                why = "the responses differ" if item in other else "the same response, judged otherwise"
                differences.append(f"- problem {number}, {name}: lm-eval {them}, padd-eval {us}: {why}")
    told = f"{len(other)} of {len(items)} responses differ; "
    lines += [told + ("verdicts differ on:" if differences else "all verdicts agree"), *differences]
    return "\n".join(lines)


def share(verdicts: Sequence[bool]) -> str:
    """How many are right, with a 95 % interval."""
    low, high = wilson_interval(sum(verdicts), len(verdicts))
    return f"{sum(verdicts)} of {len(verdicts)} ({100 * low:.1f} to {100 * high:.1f} %)"


def reset_peak(device: torch.device) -> None:
    """So that the next peak is of what comes now; a CPU's cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> str:
    """Since the last reset."""
    return f"{peak_mib(device):.0f}" if device.type == "cuda" else "-"


def device_name(device: torch.device) -> str:
    """Of a GPU, its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    run_cli(main)
