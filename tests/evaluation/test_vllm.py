"""Responses drawn by a server: asked for one by one, kept as they come, the same after an interruption."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds import evaluate
from padd_ds.config.sections import VllmConfig
from padd_ds.errors import OneRankError, UserError
from padd_ds.evaluation import vllm
from padd_ds.evaluation.costs import model_facts
from padd_ds.evaluation.generate import GenerationOptions
from padd_ds.evaluation.kept import Share, work_folder
from padd_ds.hf import end_token_ids, files_hash, load_causal_lm, load_skeleton
from padd_ds.rollout.vllm.client import Client, Request
from padd_ds.rollout.vllm.devices import gpus_of_server
from padd_ds.rollout.vllm.server import ServerFault
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.rollout.fake_vllm import END, FakeVllm
from tests.tiny import tiny_student

PROMPTS = ["3 + 4", "1", "22 + 1"]
FIRST = 13
"""Token that the seed of this number draws; of higher ones the next 80 by turns."""
SEEDS = [FIRST, FIRST + 1, FIRST + 2]
TEXTS = [VOCABULARY[seed] for seed in SEEDS]


class Served(FakeVllm):
    """The fake in the place of a Server."""

    def __init__(self, **_: Any) -> None:
        self.runs = False
        super().__init__()
        self.options = VllmConfig(answer_timeout_s=10)
        self.log_path = Path("server.log")
        self.devices: str | None = None

    def start(self) -> None:
        if not self.runs:
            super().start()
        self.runs = True

    def stop(self) -> None:
        super().stop()
        self.runs = False

    def wait_until_ready(self) -> None:
        pass

    def choice(self, index: int, sampling: dict[str, Any]) -> dict[str, Any]:
        return super().choice(index, sampling | {"seed": FIRST + (sampling["seed"] - FIRST) % 80})


@pytest.fixture
def server() -> Iterator[Served]:
    one = Served()
    yield one
    one.stop()


def drawn(server: Served, **options: Any) -> Iterator[dict[int, Any]]:
    chosen = GenerationOptions(max_new_tokens=8, **{"batch_size": 2, **options})
    return vllm.draw_responses(server, character_tokenizer(), [END], PROMPTS, chosen, SEEDS, False)


def all_of(batches: Iterator[dict[int, Any]]) -> dict[int, Any]:
    return {row: response for batch in batches for row, response in batch.items()}


def test_a_response_is_a_request_of_its_own_seed(server: Served) -> None:
    responses = all_of(drawn(server, temperature=0.5, top_p=0.9))
    assert [responses[row].text for row in range(3)] == TEXTS
    assert [(responses[row].tokens, responses[row].ended) for row in range(3)] == [(3, True)] * 3
    asked = sorted((one["sampling_params"]["seed"], one["token_ids"]) for one in server.seen)
    tokenizer = character_tokenizer()
    assert asked == [(seed, tokenizer(prompt).input_ids) for seed, prompt in zip(SEEDS, PROMPTS, strict=True)]
    sampling = server.seen[0]["sampling_params"]
    assert (sampling["n"], sampling["temperature"], sampling["top_p"], sampling["max_tokens"]) == (1, 0.5, 0.9, 8)
    assert sampling["stop_token_ids"] == [END] and sampling["stop"] == [] and not sampling["detokenize"]


def test_a_stop_text_is_told_to_the_server_and_cut_off(server: Served) -> None:
    responses = all_of(drawn(server, stop=(TEXTS[1],)))
    assert [responses[row].text for row in range(3)] == [TEXTS[0], "", TEXTS[2]]
    assert responses[1].ended and responses[1].tokens == 2
    assert all(one["sampling_params"]["stop"] == [TEXTS[1]] for one in server.seen)
    assert all(one["sampling_params"]["detokenize"] for one in server.seen)


def test_only_a_stop_text_that_was_asked_for_ends_a_response(server: Served) -> None:
    def stopped(told: Any) -> Any:
        choice = told["choices"][0]
        choice |= {"token_ids": [0], "finish_reason": "stop", "stop_reason": "###"}
        choice["logprobs"]["content"] = choice["logprobs"]["content"][:1]
        return told

    asked: dict[str, Any] = {"token_ids": [5], "n": 1, "seed": 1, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0}
    server.faults = [stopped, stopped]
    (answer,) = Client(server.url, 5).generate(Request(**asked, end_token_ids=(END,), stop=("###",)), "default")
    assert answer.ended and answer.token_ids == [0]
    with pytest.raises(ServerFault, match="ended by stop with token 0"):
        Client(server.url, 5).generate(Request(**asked, end_token_ids=(END,)), "default")


def test_a_server_that_fails_is_started_again_for_what_is_missing(server: Served, capsys: Any) -> None:
    server.faults = [None, "die"]
    assert sorted(all_of(drawn(server, batch_size=1))) == [0, 1, 2]
    assert server.restarts == 1
    assert [one["sampling_params"]["seed"] for one in server.seen].count(SEEDS[0]) == 1
    assert "the vLLM server is started again" in capsys.readouterr().err


def test_a_server_that_fails_again_and_again_ends_the_evaluation(server: Served) -> None:
    server.options = VllmConfig(max_restarts=1)
    # Until the first failure is seen, the next request may have met another.
    server.faults = [None, *["die"] * 3]
    batches = drawn(server, batch_size=1)
    assert list(next(batches)) == [0]
    with pytest.raises(
        OneRankError, match=r"failed 2 times, at last: .*; see server\.log; finished responses are kept"
    ):
        list(batches)


def test_what_a_server_refuses_is_not_asked_again(server: Served) -> None:
    server.faults = [400]
    with pytest.raises(OneRankError, match=r"refuses what it is asked.*see server\.log"):
        list(drawn(server, batch_size=1))
    assert server.restarts == 0


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command whose server is the fake."""
    model = tiny_student(vocabulary=len(VOCABULARY))
    model.generation_config.eos_token_id = END
    model.save_pretrained(tmp_path / "model")
    character_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    rows = [{"question": f"{n} + 1", "answer": n + 1} for n in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.32.0\n")
    python.chmod(0o755)
    monkeypatch.setattr(vllm, "Server", Served)
    command = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "problems.jsonl"), "--template", "plain"]
    command += ["--backend", "vllm", "--vllm", f"python={python}", "--samples", "2", "--max-new-tokens", "4"]
    return [*command, "--answer-format", "last_number"]


def test_an_interrupted_evaluation_draws_the_rest_as_it_would_have(
    evaluation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.main([*evaluation, "--output", str(tmp_path / "whole.json")])
    output = tmp_path / "out.json"
    draw = vllm.draw_responses

    def interrupted(*arguments: Any) -> Iterator[dict[int, Any]]:
        for number, batch in enumerate(draw(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(vllm, "draw_responses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*evaluation, "--batch-size", "1", "--output", str(output)])
    assert (work_folder(output) / "rank_0.jsonl").read_text()
    monkeypatch.setattr(vllm, "draw_responses", draw)
    for more in (["--vllm", "arguments=[--quantization,fp8]"], ["--dtype", "bfloat16"]):
        with pytest.raises(UserError, match="an interrupted evaluation with another"):
            evaluate.main([*evaluation, *more, "--output", str(output)])
    evaluate.main([*evaluation, "--vllm", "memory_share=0.5", "--output", str(output)])
    whole, again = (path.with_suffix(".responses.jsonl").read_text() for path in (tmp_path / "whole.json", output))
    assert whole == again
    assert len({json.loads(line)["response"] for line in whole.splitlines()}) > 6
    settings = json.loads(output.read_text())["settings"]
    assert (settings["backend"], settings["vllm_version"], settings["batch_size"]) == ("vllm", "0.32.0", 256)
    assert not work_folder(output).exists()


def test_a_server_that_does_not_start_stands_in_the_way_of_nothing(
    evaluation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Served) -> None:
        raise UserError("the vLLM server did not start: planted")

    with monkeypatch.context() as patched:
        patched.setattr(Served, "wait_until_ready", broken)
        with pytest.raises(UserError, match="planted"):
            evaluate.main([*evaluation, "--output", str(tmp_path / "out.json")])
    evaluate.main([*evaluation, "--seed", "1", "--output", str(tmp_path / "out.json")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--backend", "hf"], "--vllm goes with --backend vllm"),
        (["--vllm", "cache_gb=1"], "--vllm: unknown key cache_gb; did you mean cache_gib"),
        (["--vllm", "ranks_per_server=2"], "--vllm: unknown key ranks_per_server"),
        (["--vllm", "memory_share=2"], "--vllm: memory_share = 2: "),
        (["--vllm", "eager"], "--vllm 'eager' is not of the form KEY=VALUE"),
        (["--vllm", "python=/none"], "/none does not run"),
        (["--perplexity", "text.txt"], "--perplexity cannot be measured with --backend vllm"),
        (["--solution-field", "answer"], "--solution-field cannot be measured with --backend vllm"),
        (["--routing-analysis"], "--routing-analysis cannot be measured with --backend vllm"),
        (["--device", "cpu"], "takes the GPUs of CUDA_VISIBLE_DEVICES"),
        (["--max-new-tokens", "400"], "more than the model's 128 positions"),
    ],
)
def test_what_does_not_go_together_is_told(
    evaluation: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        evaluate.main([*evaluation, *more, "--output", str(tmp_path / "out.json")])
    assert sorted(tmp_path.iterdir()) == before


def test_a_skeleton_tells_of_the_model_what_the_loaded_one_does(tmp_path: Path) -> None:
    model = tiny_student(vocabulary=len(VOCABULARY))
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path)
    loaded, skeleton = load_causal_lm(str(tmp_path), torch.float32), load_skeleton(str(tmp_path), torch.float32)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert model_facts(skeleton) == model_facts(loaded)
    tokenizer = character_tokenizer()
    assert end_token_ids(skeleton, tokenizer) == end_token_ids(loaded, tokenizer) == [1, 7]


def test_other_weights_are_told_apart(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny_student(seed=seed).save_pretrained(tmp_path / name)
    one, same, other = (files_hash(str(tmp_path / name), None) for name in ("one", "same", "other"))
    assert one == same != other
    with pytest.raises(UserError, match="no safetensors"):
        files_hash(str(tmp_path), None)


def test_a_tied_student_which_vllm_computes_wrongly_is_refused() -> None:
    config = tiny_student().config
    vllm.check_servable("folder", config)
    config.tie_word_embeddings = True
    with pytest.raises(UserError, match=r"folder: .* reads no tied head"):
        vllm.check_servable("folder", config)


def test_ranks_give_their_servers_gpus_of_their_own(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    server.options = VllmConfig(tensor_parallel=2, ranks_per_server=2)
    start = partial(vllm._start, server)
    monkeypatch.setattr(server, "start", lambda: None)
    start(Share())
    assert server.devices is None
    start(Share(rank=5, world=8, device="cuda:1"))
    assert server.devices == "6,7"
    with pytest.raises(UserError, match="rank 6 sees the GPUs 4,5,6,7 and its server's first is number 4"):
        start(Share(rank=6, world=8, device="cuda:2"))
    assert gpus_of_server(0, 0, 4) == "4,5,6,7"
