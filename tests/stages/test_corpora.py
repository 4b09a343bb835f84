"""A warm-up step over blended corpora: borders, padding, ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import DataConfig, OptimizerConfig
from padd_ds.data.blend import Blend
from padd_ds.engine.ranks import Ranks
from padd_ds.errors import UserError
from padd_ds.stages.materials import check_sequence_length, open_corpora
from padd_ds.stages.supervision import CorpusSupervision
from padd_ds.stages.warmup import WarmupStage
from tests.corpora import random_documents, write_corpus
from tests.ranks import run_ranks
from tests.stages.test_warmup import make_warmup
from tests.tiny import tiny_student
from tests.world import joint_config
from tools.tiny_model import make_tiny_model, make_tokenizer


def corpora_config(folder: Path, micro_batch_size: int = 2, **options: Any) -> RunConfig:
    chosen = [{"prefix": str(folder / "a"), "weight": 1.0}, {"prefix": str(folder / "b"), "weight": 2.0}]
    warmup = {"batch_size": 8, "init_tokens": 16, "corpora": chosen, "sequence_length": 24, **options}
    optimizer = OptimizerConfig(learning_rate=5e-3)
    return joint_config(
        stage="warmup", warmup=warmup, data=DataConfig(), optimizer=optimizer, micro_batch_size=micro_batch_size
    )


def make_corpora(folder: Path) -> Path:
    for seed, name in enumerate(("a", "b")):
        write_corpus(folder / name, random_documents(60, 40, len(make_tokenizer()), seed))
    return folder


def blend_of(config: RunConfig) -> Blend:
    tokenizer = make_tokenizer()
    return open_corpora(config, tokenizer, len(tokenizer))


def make_stage(ranks: Ranks, config: RunConfig) -> WarmupStage:
    supervision = CorpusSupervision(blend=blend_of(config), pad_token_id=0, config=config)
    return make_warmup(ranks, config, supervision)


def two_steps(ranks: Ranks, folder: str, micro_batch_size: int = 2) -> list[dict[str, Any]]:
    stage = make_stage(ranks, corpora_config(Path(folder), micro_batch_size, init_weight=0.0))
    reports = [stage.step(step) for step in range(2)]
    return [{**report.metrics, "load_share": report.routing["load_share"]} for report in reports]


@pytest.mark.ranks
@pytest.mark.slow
def test_losses_are_those_of_lone_documents_and_neither_padding_nor_ranks_change_the_load(tmp_path: Path) -> None:
    make_corpora(tmp_path)
    teacher, student = make_tiny_model().eval(), tiny_student(vocabulary=len(make_tokenizer()))
    cross_entropies, divergences = [], []
    n_tokens = 0
    for documents in blend_of(corpora_config(tmp_path)).sequences(range(8)):
        for document in documents:
            ids = torch.from_numpy(document)[None]
            with torch.no_grad():
                log_q_RV = student(ids).logits[0, :-1].log_softmax(-1)
                log_p_RV = teacher(ids).logits[0, :-1].log_softmax(-1)
            cross_entropies += (-log_q_RV.gather(-1, ids[0, 1:, None])).flatten().tolist()
            divergences += (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1).tolist()
            n_tokens += len(document)
    assert n_tokens > 8 * 20 and len(cross_entropies) < n_tokens
    runs = [run_ranks(two_steps, 1, str(tmp_path))[0], *run_ranks(two_steps, 2, str(tmp_path))]
    runs.append(run_ranks(two_steps, 1, str(tmp_path), 8)[0])
    for first, second in runs:
        assert first["tokens"] == len(cross_entropies)
        assert first["loss_lm"] == pytest.approx(sum(cross_entropies) / len(cross_entropies), rel=1e-5)
        assert first["loss_kd"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)
        assert second["loss_lm"] == pytest.approx(runs[0][1]["loss_lm"], rel=1e-5)
        assert torch.equal(torch.tensor(first["load_share"]), torch.tensor(runs[0][0]["load_share"]))


def learnt(ranks: Ranks, folder: str) -> list[dict[str, float]]:
    stage = make_stage(ranks, corpora_config(Path(folder)))
    return [dict(stage.step(step).metrics) for step in range(6)]


@pytest.mark.ranks
@pytest.mark.slow
def test_all_three_losses_work_on_packed_rows(tmp_path: Path) -> None:
    metrics = run_ranks(learnt, 1, str(make_corpora(tmp_path)))[0]
    assert metrics[-1]["loss_lm"] < metrics[0]["loss_lm"]
    assert all(of_step["loss_init"] > 0 and of_step["loss_kd"] > 0 for of_step in metrics)


def test_ranks_share_one_batch_that_does_not_depend_on_their_number(tmp_path: Path) -> None:
    config = corpora_config(make_corpora(tmp_path), micro_batch_size=1)
    supervision = CorpusSupervision(blend=blend_of(config), pad_token_id=0, config=config)

    def rows(world: int, step: int) -> list[list[int]]:
        batches = [batch for rank in range(world) for batch in supervision.micro_batches(step, rank, world)]
        return sorted(batch["input_ids_BT"][0].tolist() for batch in batches)

    assert rows(1, 3) == rows(2, 3) == rows(8, 3)
    assert len(rows(1, 3)) == 8 and rows(1, 3) != rows(1, 4)


def test_a_corpus_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    make_corpora(tmp_path)
    write_corpus(tmp_path / "b", [[4], [5]])
    with pytest.raises(UserError, match=r"b: has no document of two tokens or more; drop it from warmup\.corpora"):
        blend_of(corpora_config(tmp_path))


def test_sequences_longer_than_the_models_positions_are_refused() -> None:
    check_sequence_length(128, "model.student s", tiny_student().config)
    with pytest.raises(
        UserError, match=r"warmup\.sequence_length 129 is more than the 128 positions of model\.student s"
    ):
        check_sequence_length(129, "model.student s", tiny_student().config)
