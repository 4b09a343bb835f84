"""Two ranks with servers of their own: all weights reach both, one that fails in the middle of them included."""

from pathlib import Path

import pytest
import torch

from padd_ds.engine.ranks import Ranks
from padd_ds.rollout.generation import Prompts, Sampling
from padd_ds.stages.rollouts import rollout_engine, rollout_servers
from tests.ranks import run_ranks
from tests.rollout.fake_vllm import FakeVllm
from tests.world import deepspeed_tree, joint_config, make_student, make_tokenizer


def rollouts(ranks: Ranks, urls: list[str], transport: str, folder: str) -> list[list[int]]:
    config = joint_config(
        run_dir=f"{folder}/run",
        rollout={"engine": "vllm", "prompts": 2},
        vllm={"servers": urls, "transport": transport, "exchange": folder, "answer_timeout_s": 5},
    )
    ids, drawn = torch.tensor([[5, 6, 7 + ranks.rank]]), []
    prompts = Prompts(ids_PT=ids, mask_PT=torch.ones_like(ids), seeds=[100 * (ranks.rank + 1)])
    student = make_student(ranks, config, deepspeed_tree(2, 3))
    with rollout_servers(config, torch.float32, ranks) as servers:
        assert servers is not None and servers.url == urls[ranks.rank]
        engine = rollout_engine(config, student, make_tokenizer(), servers)
        for version in range(2):
            with engine.ready(version):
                answers = engine.generate(prompts, Sampling(group_size=2, max_new_tokens=5))
            drawn.append(answers.ids_BR[:, 1].tolist())
    return drawn


@pytest.mark.ranks
@pytest.mark.parametrize(("transport", "restarts"), [("files", [0, 1]), ("network", [1, 1])])
def test_both_servers_get_all_weights_though_one_fails_meanwhile(
    transport: str, restarts: list[int], tmp_path: Path
) -> None:
    fakes = [FakeVllm(), FakeVllm()]
    fakes[1].faults = [None] * 3 + [500]
    drawn = run_ranks(rollouts, 2, [fake.url for fake in fakes], transport, str(tmp_path))
    for fake in fakes:
        fake.stop()
    assert drawn == [[[100, 101]] * 2, [[200, 201]] * 2]
    assert [fake.restarts for fake in fakes] == restarts
    assert fakes[0].received == fakes[1].received
    assert len([name for name in fakes[0].received if name.endswith("mlp.gate.e_score_correction_bias")]) == 2
    assert len([name for name in fakes[0].received if ".mlp.experts." in name]) == 2 * 4 * 3
    assert not list(tmp_path.glob("padd-*"))
