"""A real server follows the student that is trained: same responses, same likelihoods, every weight and bias."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds.engine.ranks import Ranks
from padd_ds.engine.student import Student, build_student
from padd_ds.hf import load_causal_lm, response_logits
from padd_ds.losses.tokens import token_logprobs
from padd_ds.rollout.generation import Prompts, Responses, Sampling
from padd_ds.rollout.vllm.client import Client, Request
from padd_ds.rollout.vllm.exchange import WeightBoard
from padd_ds.rollout.vllm.server import Server, ServerFault
from padd_ds.stages.rollouts import RolloutServers, rollout_engine
from tests.ranks import run_ranks
from tests.vllm.conftest import tiny_server, vllm_options
from tests.world import deepspeed_tree, joint_config
from tools.tiny_model import make_tokenizer

PROMPTS = torch.tensor([[0, 0, 9, 7, 12], [5, 8, 30, 11, 4], [0, 0, 0, 0, 6], [40, 41, 42, 43, 44]])
MASK = (PROMPTS != 0).long()
ASKED = Prompts(ids_PT=PROMPTS, mask_PT=MASK, seeds=[10, 20, 30, 40])
GREEDY = Sampling(group_size=2, max_new_tokens=12, temperature=0.0)
DRAWN = Sampling(group_size=2, max_new_tokens=12, temperature=0.9)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = tiny_server(tmp_path_factory.mktemp("server"))
    one.start()
    one.wait_until_ready()
    yield one
    one.stop()


class Started:
    """The server of the test's own process, for its ranks: loaded from here, started and ended there."""

    def restart(self) -> None:
        raise AssertionError("the server failed")


def made(ranks: Ranks, model: str, expert_parallel: int, zero_stage: int) -> tuple[Any, Student]:
    """(configuration, student) of the server's model."""
    config = joint_config(vllm=vllm_options(), rollout={"engine": "vllm", "prompts": 4, "group_size": 2})
    tree = deepspeed_tree(expert_parallel, zero_stage)
    loaded = load_causal_lm(model, torch.float32, trust_remote_code=False)
    student = build_student(
        loaded, config, tree, ranks, trainable=lambda name: True, accumulation_steps=1, total_steps=1
    )
    student.engine.eval()
    return config, student


def engines(ranks: Ranks, model: str, url: str, folder: str, expert_parallel: int = 1, zero_stage: int = 2) -> Any:
    """(student, transformers' engine, vLLM's)."""
    config, student = made(ranks, model, expert_parallel, zero_stage)
    tokenizer, everyone = make_tokenizer(), tuple(range(ranks.world))
    servers = RolloutServers(
        server=Started() if ranks.is_main else None,  # type: ignore[arg-type]
        url=url,
        all_urls=(url,),
        neighbours=everyone,
        exchanging=everyone,
        folder=Path(folder),
        sleep=False,
    )
    return student, rollout_engine(config, student, tokenizer), rollout_engine(config, student, tokenizer, servers)


def trainers_logprobs(student: Student, responses: Responses, temperature: float) -> torch.Tensor:
    """[B, R] as training computes them."""
    ids_BT, mask_BT = PROMPTS.repeat_interleave(2, dim=0), MASK.repeat_interleave(2, dim=0)
    mask_BL = torch.cat([mask_BT, responses.mask_BR.long()], dim=1)
    ids_BL = torch.cat([ids_BT, responses.ids_BR], dim=1)
    with torch.no_grad():
        logits_BRV = response_logits(student.engine, ids_BL, mask_BL, responses.ids_BR.shape[1])
    return token_logprobs(logits_BRV, responses.ids_BR, temperature)


def apart(student: Student, responses: Responses) -> float:
    """The largest difference between what the server told and what training computes, nats."""
    assert responses.logprobs_BR is not None
    difference_BR = responses.logprobs_BR - trainers_logprobs(student, responses, DRAWN.temperature)
    return float(difference_BR[responses.mask_BR].abs().max())


def compared(ranks: Ranks, model: str, url: str, folder: str) -> dict[str, Any]:
    student, ours, theirs = engines(ranks, model, url, folder)
    found: dict[str, Any] = {}
    with theirs.ready(0):
        greedy = [engine.generate(ASKED, GREEDY) for engine in (ours, theirs)]
        found["greedy"] = [[row[kept].tolist() for row, kept in zip(r.ids_BR, r.mask_BR, strict=True)] for r in greedy]
        drawn = theirs.generate(ASKED, DRAWN)
        again = theirs.generate(ASKED, DRAWN)
        found["same again"] = torch.equal(drawn.ids_BR, again.ids_BR)
        found["before"] = apart(student, drawn)
    layer = student.layers[1]
    changes = {
        "an expert's weight": lambda: layer.experts.w2[2].add_(0.5),
        "the selection bias": lambda: layer.router.e_score_correction_bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0])),
        "an attention weight": lambda: student.model.model.layers[0].self_attn.k_proj.weight.mul_(3.0),
        "the head": lambda: student.model.lm_head.weight.mul_(1.5),
        "the embedding": lambda: student.model.model.embed_tokens.weight.mul_(1.5),
        "a norm": lambda: student.model.model.norm.weight.mul_(0.7),
        "a shared expert": lambda: student.model.model.layers[0].mlp.shared_experts.up_proj.weight.mul_(2.0),
        # The server's third update and all after it go another way.
        "an expert's weight again": lambda: layer.experts.w2[2].sub_(0.3),
    }
    for version, (what, change) in enumerate(changes.items(), start=1):
        with torch.no_grad():
            change()
        stale = apart(student, drawn)
        with theirs.ready(version):
            drawn = theirs.generate(ASKED, DRAWN)
        found[what] = (stale, apart(student, drawn))
    return found


def test_a_server_is_in_step_with_every_weight(server: Server, tmp_path: Path) -> None:
    found = run_ranks(compared, 1, server.model, server.url, str(tmp_path / "weights"))[0]
    ours, theirs = found.pop("greedy")
    assert ours == theirs
    assert found.pop("same again")
    assert found.pop("before") < 1e-4
    for what, (stale, fresh) in found.items():
        assert stale > 1e-2 and fresh < 1e-4, what


def spread(ranks: Ranks, model: str, url: str, folder: str, zero_stage: int) -> list[float]:
    student, _, theirs = engines(ranks, model, url, folder, expert_parallel=2, zero_stage=zero_stage)
    found = []
    for version in (100, 101, 102):  # the server's third update goes another way
        with theirs.ready(version):
            drawn = theirs.generate(ASKED, DRAWN)
        found.append(apart(student, drawn))
        with torch.no_grad():  # each rank's own experts
            student.layers[0].router.e_score_correction_bias.copy_(torch.tensor([5.0, 0.0, 5.0, 0.0]))
            if zero_stage == 2:
                student.layers[0].experts.w1.mul_(1.0 + ranks.rank)
    return found


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_weights_come_from_the_shards_of_all_ranks(server: Server, tmp_path: Path, zero_stage: int) -> None:
    for found in run_ranks(spread, 2, server.model, server.url, str(tmp_path / "weights"), zero_stage):
        assert max(found) < 1e-4


def commands_that_write_to(log: Path) -> Iterator[bytes]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd" / "1") == str(log):
                yield (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended


def test_on_a_cpu_no_worker_polls_beside_the_engine(server: Server) -> None:
    commands = list(commands_that_write_to(server.log_path))
    assert any(b"VLLM::EngineCore" in command for command in commands)
    assert not any(b"VLLM::Worker" in command for command in commands)


def test_a_server_takes_many_responses_at_once(server: Server) -> None:
    log = server.log_path.read_text()
    assert "responses leave the engine when they are whole" in log
    assert "'performance_mode': 'throughput'" in log and "'block_size': 32" in log


def test_a_stale_version_is_refused(server: Server, tmp_path: Path) -> None:
    run_ranks(spread, 2, server.model, server.url, str(tmp_path / "weights"), 2)
    request = Request(token_ids=[5], n=1, seed=0, max_new_tokens=4, temperature=1.0, top_p=1.0, end_token_ids=(2,))
    assert Client(server.url, 60).generate(request, "102")
    with pytest.raises(ServerFault, match=r"weights \['102'\] where 101"):
        Client(server.url, 60).generate(request, "101")


def test_an_update_that_fails_half_way_is_never_used(server: Server, tmp_path: Path) -> None:
    """The last of this server, whose weights are then in an unknown state."""
    weights = load_causal_lm(server.model, torch.float32, trust_remote_code=False).state_dict()
    client, board, norm = Client(server.url, 60), WeightBoard(tmp_path, 0), weights["model.norm.weight"]
    board.write("all", {"model.layers.0.input_layernorm.weight": norm, "model.norm.weight": norm[:-1]})
    client.begin_update()
    with pytest.raises(ServerFault):
        client.update({"parts": board.parts})
    request = Request(token_ids=[5], n=1, seed=0, max_new_tokens=4, temperature=1.0, top_p=1.0, end_token_ids=(2,))
    with pytest.raises(ServerFault):
        client.generate(request, "7")
