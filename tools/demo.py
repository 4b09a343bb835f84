"""The whole path on this machine's CPU: teacher, conversion, warm-up, joint training, table, report.html.

`make demo` takes SmolLM2-135M-Instruct (dequantised), `make demo-tiny` a toy teacher that it trains first.
Every command is printed as it is run, so that each can be repeated by hand.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padd_ds.errors import UserError, run_cli
from padd_ds.files import write_text_whole

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RANKS = 2
STAGES = ("teacher", "converted", "warmed-up", "joint")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One demonstration: what differs between the real model and the toy."""

    title: str
    note: str
    make_teacher: list[list[str]]
    """Commands that leave teacher/, data/train.jsonl and data/test.jsonl in the output folder; `{out}` stands
    for it, `{seed}` for the seed."""
    write_texts: Callable[[Path], None] | None = None
    """Writes texts to calibrate on and to measure perplexity on into the data folder, where problems are not enough."""
    convert: list[str]
    """Options of padd-convert."""
    evaluate: list[str]
    """Options of padd-eval."""
    warmup: str
    """Run configuration."""
    joint: str
    overrides: dict[str, list[str]]
    """More section.key=value by stage."""


TINY_EVALUATION = ["--pattern", r"#(-?\d+)$", "--answer-format", "pattern", "--template", "plain"]
TINY_EVALUATION += ["--subject-field", "subject", "--solution-field", "solution"]
TINY_EVALUATION += ["--max-new-tokens", "48", "--batch-size", "128", "--samples", "4"]
TINY_CALIBRATION = ["--calibration", "{out}/data/train.jsonl", "--calibration-part", "A"]
TINY_CALIBRATION += ["--calibration-field", "question,solution", "--calibration-tokens"]

TINY_TEACHER = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    str(RANKS),
    "tools/tiny_teacher.py",
    "--output",
    "{out}/teacher",
    "--data-output",
    "{out}/data",
    "--seed",
    "{seed}",
]


def prose_texts(data: Path) -> None:
    """Python's language reference, which every CPython carries: odd topics to calibrate on, even ones as text.

    Part A of the problems stands in front of the calibration text, in the words of the demonstration.
    """
    from pydoc_data.topics import topics

    from padd_ds.data.problems import FieldMap, map_rows
    from padd_ds.data.sources import read_rows
    from padd_ds.data.split import split_problems

    part_a = split_problems(map_rows(read_rows(str(data / "train.jsonl")), FieldMap())).parts["A"]
    sums = "\n".join(
        f"Calculate {p.question} = ? Reply with the result only.\n{p.question} = {p.answer}" for p in part_a
    )
    names = sorted(topics)
    write_text_whole(data / "calibration.txt", sums + "\n" + "\n".join(topics[name] for name in names[1::2]))
    write_text_whole(data / "text.txt", "\n".join(topics[name] for name in names[0::2]))


SUM_TASKS = ["chain_sum:subject=sum2,min_terms=2,max_terms=2,min_digits=1,max_digits=1"] * 2
SUM_TASKS += ["products:subject=product,min_terms=2,max_terms=2,min_digits=1,max_digits=1"]
SUM_TASKS += ["chain_sum:subject=sum3,min_terms=3,max_terms=3,min_digits=1,max_digits=1"] * 2
MAKE_PROBLEMS = ["tools/make_problems.py", *SUM_TASKS, "--question", "{expression}", "--seed", "{seed}"]
SMOLLM2_EVALUATION = ["--template", "Calculate {question} = ? Reply with the result only.", "--chat"]
SMOLLM2_EVALUATION += ["--answer-format", "last_number", "--max-new-tokens", "16", "--subject-field", "subject"]
SMOLLM2_EVALUATION += ["--batch-size", "50", "--perplexity", "{out}/data/text.txt", "--max-windows", "16"]

DEMOS = {
    "smollm2": Demo(
        title="PADD demo: SmolLM2-135M-Instruct (dequantised) and its mixture-of-experts student",
        note="16 slices per layer, 4 always on, 8 of 12 routed: 75 % of the feed-forward part is active. Perplexity: "
        "16 windows of 256 tokens of Python's language reference.",
        make_teacher=[
            ["tools/smollm2.py", "--output", "{out}/teacher"],
            [*MAKE_PROBLEMS, "--count", "100", "--output", "{out}/data/test.jsonl"],
            [*MAKE_PROBLEMS, "--count", "400", "--output", "{out}/data/train.jsonl"]
            + ["--exclude", "{out}/data/test.jsonl"],
        ],
        write_texts=prose_texts,
        convert=["--experts", "16", "--shared-experts", "4", "--top-k", "8", "--calibration-tokens", "8192"]
        + ["--calibration", "{out}/data/calibration.txt"],
        evaluate=SMOLLM2_EVALUATION,
        warmup="ds_configs/runs/demo_warmup.yaml",
        joint="ds_configs/runs/demo_joint.yaml",
        overrides={"warmup": [], "joint": []},
    ),
    "tiny": Demo(
        title="PADD demo: a toy teacher, seven kinds of arithmetic",
        note="The teacher (0.4M parameters) is trained from scratch; 50 % of its FFN is active in the student. "
        "Perplexity: of the test problems' worked solutions. Sampled: mean of 4 responses at temperature 1.",
        make_teacher=[
            [*TINY_TEACHER, "--steps", "1800"],
        ],
        convert=["--experts", "16", "--shared-experts", "2", "--top-k", "6", *TINY_CALIBRATION, "5120"],
        evaluate=TINY_EVALUATION,
        warmup="ds_configs/runs/demo_tiny_warmup.yaml",
        joint="ds_configs/runs/demo_tiny_joint.yaml",
        overrides={"warmup": [], "joint": []},
    ),
    "smallest": Demo(
        title="PADD demo: the path alone",
        note="Nothing is learnt here in earnest; this size tests that every step runs.",
        make_teacher=[
            [*TINY_TEACHER, "--steps", "4", "--train-problems", "60", "--test-problems", "4"]
            + ["--hidden-size", "32", "--layers", "2", "--ffn-size", "128", "--heads", "2", "--kv-heads", "1"],
        ],
        convert=["--experts", "8", "--shared-experts", "2", "--top-k", "3", *TINY_CALIBRATION, "512"],
        evaluate=[*TINY_EVALUATION, "--max-new-tokens", "8"],
        warmup="ds_configs/runs/demo_tiny_warmup.yaml",
        joint="ds_configs/runs/demo_tiny_joint.yaml",
        overrides={
            "warmup": ["steps=2"],
            "joint": ["steps=2", "rollout.prompts=4", "rollout.group_size=4", "rollout.max_new_tokens=8"],
        },
    ),
}


class Runner:
    """Runs the commands of a demo, prints each, and keeps their output in logs/."""

    def __init__(self, output: Path) -> None:
        self.output = output
        (output / "logs").mkdir(parents=True)
        self._environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or RANKS) // RANKS)),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def python(self, name: str, arguments: list[str], threads: int | None = None) -> None:
        """Run a Python file of the repository."""
        self.run(name, [sys.executable, *arguments], threads)

    def run(self, name: str, command: list[str], threads: int | None = None) -> None:
        """Run `command` from the repository's root; UserError with its last lines if it fails."""
        print(f"\n== {name}: {shlex.join(command)}", flush=True)
        environment = self._environment | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        log = self.output / "logs" / f"{name}.log"
        started_s = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if _worth_showing(line):
                    print(line, end="", flush=True)
            code = process.wait()
        if code != 0:
            last = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
            raise UserError(f"{name} failed with exit code {code}; the whole output is in {log}; its end:\n{last}")
        print(f"   {time.monotonic() - started_s:.0f} s", flush=True)


def run_demo(demo: Demo, output: Path, seed: int) -> None:
    """All steps, then the table and the report."""
    started_s = time.monotonic()
    runner, out = Runner(output), str(output)
    for number, command in enumerate(demo.make_teacher):
        filled = [part.replace("{out}", out).replace("{seed}", str(seed)) for part in command]
        runner.python(f"prepare-{number}", filled)
    if demo.write_texts is not None:
        demo.write_texts(output / "data")
    filled = [part.replace("{out}", out) for part in demo.convert]
    teacher, converted = str(output / "teacher"), str(output / "students" / "converted")
    runner.run(
        "convert",
        [str(BIN / "padd-convert"), "--teacher", teacher, "--output", converted, "--seed", str(seed), *filled],
        threads=os.cpu_count(),
    )
    previous = converted
    for stage, config, result in (("warmup", demo.warmup, "warmed-up"), ("joint", demo.joint, "joint")):
        run_dir, exported = output / "runs" / stage, output / "students" / result
        overrides = [f"run_dir={run_dir}", f"model.student={previous}", f"model.teacher={teacher}", f"seed={seed}"]
        overrides += [f"data.source={output / 'data' / 'train.jsonl'}", *demo.overrides[stage]]
        launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(RANKS)]
        runner.run(stage, [*launcher, "padd_ds/train.py", "--config", config, *overrides])
        runner.run(f"export-{stage}", [str(BIN / "padd-export"), "--run", str(run_dir), "--output", str(exported)])
        previous = str(exported)
    evaluate(demo, runner)
    finish(demo, output, time.monotonic() - started_s)


def evaluate(demo: Demo, runner: Runner) -> None:
    """padd-eval on the teacher and on each student."""
    output = runner.output

    def one(name: str) -> None:
        model = output / "teacher" if name == "teacher" else output / "students" / name
        result = output / "results" / f"{name}.json"
        data = ["--data", str(output / "data" / "test.jsonl")]
        options = [part.replace("{out}", str(output)) for part in demo.evaluate]
        command = [str(BIN / "padd-eval"), "--model", str(model), "--output", str(result), *data, *options]
        runner.run(f"eval-{name}", command)

    # Side by side: two processes of one thread each are faster than one of two.
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(one, STAGES))


def finish(demo: Demo, output: Path, seconds: float) -> None:
    """Print the table, write report.html."""
    from padd_ds.report import format_table, write_report

    conversion = json.loads((output / "students" / "converted" / "padd_conversion.json").read_text(encoding="utf-8"))
    rows = [_row(name, output, conversion) for name in STAGES]
    print(f"\n{demo.title}\n{demo.note}\n\n{format_table(rows)}\n")
    runs = [output / "runs" / stage for stage in ("warmup", "joint")]
    notes = [demo.note, f"The whole path took {seconds / 60:.1f} minutes on {os.cpu_count()} cores."]
    write_report(output / "report.html", title=demo.title, subtitle=demo.note, rows=rows, runs=runs, notes=notes)
    print(f"report: {output / 'report.html'}   ({seconds / 60:.1f} minutes)")


def _row(name: str, output: Path, conversion: dict[str, Any]) -> Any:
    from padd_ds.report import TableRow

    headline = json.loads((output / "results" / f"{name}.json").read_text(encoding="utf-8"))["headline"]
    costs = conversion["costs"]["teacher" if name == "teacher" else "student"]
    low, high = headline["problems"]["interval_95"]
    return TableRow(
        name=name,
        perplexity=(headline["perplexity"] or headline["solution_perplexity"])["value"],
        pass_at_1=headline["problems"]["pass_at_1"],
        pass_at_1_low=low,
        pass_at_1_high=high,
        sampled=headline["samples"]["pass_at_1"] if headline["samples"] else None,
        questions=headline["problems"]["problems"],
        active_parameters=costs["active_parameters"],
        total_parameters=costs["total_parameters"],
        flops_per_token=costs["flops_per_token"],
    )


def _worth_showing(line: str) -> bool:
    quiet = ("[INFO]", "[WARNING]", "Loading weights", "Writing model shards")
    return bool(line.strip()) and not any(word in line for word in quiet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(DEMOS), default="smollm2", help="which demonstration")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="delete the folder of an earlier demonstration first")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    if output.exists():
        if not arguments.overwrite or not (output / "logs").is_dir():
            raise UserError(f"{output} already exists; choose another --output, or pass --overwrite for an old demo")
        shutil.rmtree(output)
    run_demo(DEMOS[arguments.size], output, arguments.seed)


if __name__ == "__main__":
    run_cli(main)
