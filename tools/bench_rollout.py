"""Tokens per second of a rollout by each engine, and how long vLLM servers take to get new weights.

One student, the same prompts and lengths: no response ends early. transformers' plain `generate`, the engine `hf`, raw
`vllm.LLM` in its own process, and the engine `vllm` take turns, where a vLLM is named; ratios are medians over turns.
The update is compared with one copy of the same bytes. Under a launcher, without a vLLM, the student's experts are
spread over the ranks, which share the prompts; plain `generate` then runs on every rank with a whole model of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from padd_ds.config.schema import RunConfig
from padd_ds.engine.ranks import Ranks, barrier, start_ranks, stop_ranks
from padd_ds.engine.student import build_student
from padd_ds.errors import UserError, run_cli
from padd_ds.hf import load_tokenizer, read_config
from padd_ds.rollout.generation import Prompts, RolloutEngine, Sampling
from padd_ds.rollout.settings import callers_settings_alone
from padd_ds.rollout.vllm.engine import VllmRollout
from padd_ds.rollout.vllm.server import check_installed
from padd_ds.stages.rollouts import rollout_engine, rollout_servers
from padd_ds.train import quiet_libraries
from tools.measuring import timed

RAW = """
import json, sys, time
from vllm import LLM, SamplingParams

def main():
    told = json.loads(sys.argv[1])
    llm = LLM(model=told["model"], dtype=told["dtype"], max_model_len=told["length"], **told["options"])
    prompts = [{"prompt_token_ids": ids} for ids in told["prompts"]]
    sampling = SamplingParams(n=told["n"], temperature=1.0, max_tokens=told["new"], ignore_eos=True, logprobs=0,
                              detokenize=False, seed=0)
    for line in sys.stdin:
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        print("SECONDS", time.perf_counter() - started, flush=True)

if __name__ == "__main__":
    main()
"""

POLLING_S = 3.0
"""More than vLLM's processes poll, on cores of ours, after their last message."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="folder of the student")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="Python that has vLLM; without it only transformers is measured"
    )
    parser.add_argument("--prompts", type=int, default=8, help="default %(default)s")
    parser.add_argument("--group-size", type=int, default=4, help="responses per prompt (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument(
        "--expert-compute", choices=["dispatched", "masked"], default="dispatched", help="as model.expert_compute"
    )
    parser.add_argument("--turns", type=int, default=5, help="one more first (default %(default)s)")
    parser.add_argument(
        "--vllm-options",
        type=json.loads,
        metavar="JSON",
        help='engine arguments of vLLM, both ways (default: on a CPU {"enforce_eager": true})',
    )
    parser.add_argument("--cache-gib", type=float, default=1.0, help="of vLLM, on a CPU (default %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_args()
    ranks = start_ranks()
    quiet_libraries()
    if ranks.world > 1 and arguments.vllm:
        raise UserError("with --vllm one process measures; start it without a launcher")
    if arguments.prompts % ranks.world:
        raise UserError(f"--prompts {arguments.prompts} must be a multiple of the {ranks.world} ranks")
    on_gpu = ranks.device.type == "cuda"
    if arguments.vllm_options is None:
        arguments.vllm_options = {} if on_gpu else {"enforce_eager": True}
    dtype = torch.bfloat16 if on_gpu else torch.float32
    vocabulary = read_config(str(arguments.student)).vocab_size
    shape = (arguments.prompts, arguments.prompt_tokens)
    prompts_PT = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(ranks.device)
    prompts_PT = prompts_PT[ranks.rank :: ranks.world]
    with tempfile.TemporaryDirectory() as scratch:
        config = run_config(arguments, Path(scratch), on_gpu)
        if config.uses_vllm:
            check_installed(config.vllm)
        with rollout_servers(config, dtype, ranks) as servers:
            tree = {
                "zero_optimization": {"stage": 0},
                "gradient_clipping": 1.0,
                "expert_parallel": {"enabled": True, "autoep_size": ranks.world, "use_grouped_mm": True},
                **({"bf16": {"enabled": True}} if on_gpu else {}),
            }
            model = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=dtype)
            student = build_student(
                model, config, tree, ranks, trainable=lambda name: True, accumulation_steps=1, total_steps=1
            )
            student.engine.eval()
            plain: Any = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=dtype)
            plain.to(ranks.device).eval()
            tokenizer = load_tokenizer(str(arguments.student), trust_remote_code=False)
            engines: dict[str, Any] = {"hf": rollout_engine(config, student, tokenizer)}
            if servers is not None:
                engines["vllm"] = rollout_engine(config, student, tokenizer, servers)
            # Of random prompts hardly a response ends by this one.
            engines = {name: replace(engine, end_token_ids=(vocabulary - 1,)) for name, engine in engines.items()}
            measure(arguments, engines, plain, prompts_PT, dtype, Path(scratch), ranks)
    stop_ranks()


def run_config(arguments: argparse.Namespace, folder: Path, on_gpu: bool) -> RunConfig:
    cpu = {"cache_gib": arguments.cache_gib}
    given: dict[str, Any] = {"arguments": command_line(arguments.vllm_options)}
    settings = {
        "stage": "joint",
        "run_dir": str(folder),
        "deepspeed": "unused",
        "steps": 1,
        "data": {"source": "unused", "max_prompt_tokens": arguments.prompt_tokens},
        "model": {"student": str(arguments.student), "expert_compute": arguments.expert_compute},
        "optimizer": {"learning_rate": 1e-5},
        "distillation": {"weight": 0},
        "rollout": {"engine": "vllm" if arguments.vllm else "hf", "max_new_tokens": arguments.new_tokens},
        "vllm": {"python": arguments.vllm, "sleep": False, **given, **({} if on_gpu else cpu)},
    }
    return TypeAdapter(RunConfig).validate_python(settings)


def command_line(options: dict[str, Any]) -> list[str]:
    """Engine arguments as vLLM's server is told them."""
    words = []
    for name, value in options.items():
        words.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        words += [] if isinstance(value, bool) else [value if isinstance(value, str) else json.dumps(value)]
    return words


def measure(
    arguments: argparse.Namespace,
    engines: dict[str, RolloutEngine],
    plain: Any,
    prompts_PT: torch.Tensor,
    dtype: torch.dtype,
    folder: Path,
    ranks: Ranks,
) -> None:
    """Turns of all ways, then the table; `folder`: for what raw vLLM runs."""

    def until_all_are_done(way: Callable[[], Any]) -> None:
        way()
        barrier()

    seeds = range(0, 1000 * len(prompts_PT), 1000)
    prompts = Prompts(ids_PT=prompts_PT, mask_PT=torch.ones_like(prompts_PT), seeds=seeds)
    sampling = Sampling(group_size=arguments.group_size, max_new_tokens=arguments.new_tokens)
    ways: dict[str, Any] = {"transformers' generate": lambda: generate_plainly(plain, prompts_PT, arguments)}
    ways["engine hf"] = lambda: engines["hf"].generate(prompts, sampling)
    raw = None
    if "vllm" in engines:
        raw = start_raw(arguments, prompts_PT, dtype, folder)
        ways["vllm.LLM"] = lambda: turn_of(raw)
        ways["engine vllm"] = lambda: engines["vllm"].generate(prompts, sampling)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.turns + 1):
        for name, way in ways.items():
            if name == "engine vllm":
                engines["vllm"].ready(turn).__enter__()
            barrier()
            taken_s = timed(partial(until_all_are_done, way), prompts_PT.device)[1]
            seconds[name] += [taken_s] if turn else []
    if raw is not None:
        assert raw.stdin is not None
        raw.stdin.close()
        raw.wait()
    tokens = arguments.prompts * arguments.group_size * arguments.new_tokens
    if ranks.is_main:
        print(table(seconds, tokens))
    if "vllm" in engines:
        versions = range(arguments.turns + 1, 2 * arguments.turns + 1)
        weights = [parameter.detach() for parameter in plain.parameters()]
        print(updates(cast(VllmRollout, engines["vllm"]), versions, weights))


def updates(engine: VllmRollout, versions: range, weights: list[torch.Tensor]) -> str:
    """How long the server takes to get `versions` of new weights, beside one copy of `weights` to the host."""
    device = weights[0].device
    updates_s = []
    for version in versions:
        time.sleep(POLLING_S)
        updates_s.append(timed(engine.ready(version).__enter__, device)[1])
    written_s = [timed(engine.transport.publish, device)[1] for _ in versions]
    copies = [torch.empty_like(weight, device="cpu") for weight in weights]
    copied_s = [timed(lambda: copy_all(weights, copies), device)[1] for _ in range(6)][1:]
    n_mib = sum(weight.nbytes for weight in weights) / 2**20
    update_s, write_s, copy_s = map(statistics.median, (updates_s, written_s, copied_s))
    return (
        f"\nnew weights for the server: {update_s:.3f} s, {update_s / copy_s:.2f} times one copy of their "
        f"{n_mib:.0f} MiB ({copy_s:.3f} s); {write_s:.3f} s of it to write them"
    )


def generate_plainly(model: Any, prompts_PT: torch.Tensor, arguments: argparse.Namespace) -> None:
    ids_BT = prompts_PT.repeat_interleave(arguments.group_size, dim=0)
    with callers_settings_alone(model), torch.inference_mode():
        model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=arguments.new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )


def start_raw(
    arguments: argparse.Namespace, prompts_PT: torch.Tensor, dtype: torch.dtype, folder: Path
) -> "subprocess.Popen[str]":
    """A process with `vllm.LLM` on the same prompts, which generates once for every line that it is given."""
    on_gpu = prompts_PT.device.type == "cuda"
    options: dict[str, Any] = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
    cpu = {"kv_cache_memory_bytes": int(arguments.cache_gib * 2**30)}
    told = {
        "model": str(arguments.student),
        "dtype": str(dtype).removeprefix("torch."),
        "length": arguments.prompt_tokens + arguments.new_tokens,
        "options": options | ({"gpu_memory_utilization": 0.4} if on_gpu else cpu) | arguments.vllm_options,
        "prompts": prompts_PT.tolist(),
        "n": arguments.group_size,
        "new": arguments.new_tokens,
    }
    script = folder / "raw.py"
    script.write_text(RAW, encoding="utf-8")
    command = [arguments.vllm, str(script), json.dumps(told)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def turn_of(raw: "subprocess.Popen[str] | None") -> None:
    assert raw is not None and raw.stdin is not None and raw.stdout is not None
    raw.stdin.write("\n")
    raw.stdin.flush()
    for line in raw.stdout:
        if line.startswith("SECONDS"):
            return
    raise UserError("vllm.LLM ended; see what it says when started by hand")


def copy_all(weights: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
    for weight, copy in zip(weights, copies, strict=True):
        copy.copy_(weight)


def table(seconds: dict[str, list[float]], tokens: int) -> str:
    """A row per way; each engine beside the library that it uses."""
    beside = {"engine hf": "transformers' generate", "engine vllm": "vllm.LLM"}
    lines = ["| responses by | tokens/s | beside its library |", "|---|---|---|"]
    for name, taken in seconds.items():
        ratio = "1"
        if name in beside:
            ratios = [other / one for one, other in zip(taken, seconds[beside[name]], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {tokens / statistics.median(taken):.0f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
