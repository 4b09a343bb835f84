"""How the problems of a warm-up step are dealt to ranks."""

from itertools import chain, pairwise

from padd_ds.data.problems import Problem
from padd_ds.stages.supervision import ProblemSupervision
from tests.world import joint_config
from tools.tiny_model import make_tokenizer


def test_all_ranks_read_problems_of_like_length_at_the_same_time() -> None:
    problems = [Problem(question="1+" * n + "1=", answer=str(n), solution=str(n)) for n in range(1, 41)]
    config = joint_config(stage="warmup", micro_batch_size=2, warmup={"batch_size": 16})
    supervision = ProblemSupervision(problems=problems, tokenizer=make_tokenizer(), config=config)

    def dealt(world: int) -> list[list[list[int]]]:
        """By micro-batch, the tokens of all ranks' rows, without padding."""
        by_rank = [supervision.micro_batches(3, rank, world) for rank in range(world)]
        return [
            sorted(
                row[kept.bool()].tolist()
                for batch in together
                for row, kept in zip(batch["input_ids_BT"], batch["attention_mask_BT"], strict=True)
            )
            for together in zip(*by_rank, strict=True)
        ]

    for world in (1, 2, 4):
        micro_batches = dealt(world)
        assert [len(rows) for rows in micro_batches] == [2 * world] * (8 // world)
        for shorter, longer in pairwise(micro_batches):
            assert max(map(len, shorter)) <= min(map(len, longer))
        assert sorted(chain(*micro_batches)) == sorted(chain(*dealt(1)))
