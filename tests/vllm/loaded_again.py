"""Run by vLLM's Python with a student's folder: updates from the same files, in one process with vLLM on a CPU."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

from padd_ds.rollout.vllm.exchange import WeightBoard
from padd_ds.rollout.vllm.worker import MappedFiles, Parts

PROMPT = [5, 9, 3, 7, 12, 30]
LIKELIHOODS = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)


@contextmanager
def raises(words: str) -> Iterator[None]:
    """As pytest's, which vLLM's environment need not have."""
    try:
        yield
    except Exception as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no error that says {words}")


def main() -> None:
    student = Path(sys.argv[1])
    llm = LLM(str(student), dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**26)
    model: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    searched: list[str] = []
    """Names that vLLM's loader was given in the last update."""
    load_weights = model.load_weights
    copies: list[bool] = [False]
    """Whether it gets copies, as of a loader that changes what it is given."""

    def noted(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            searched.append(name)
            yield name, tensor.clone() if copies[-1] else tensor

    model.load_weights = lambda tensors: load_weights(noted(tensors))

    def new_engine() -> MappedFiles:
        return MappedFiles(None, llm.llm_engine.vllm_config, torch.device("cpu"), model)

    def update(engine: MappedFiles, tensors: dict[str, torch.Tensor], board: WeightBoard) -> list[float]:
        """The likelihoods of a prompt's tokens afterwards."""
        board.write("all", tensors)
        searched.clear()
        engine.start_weight_update()
        engine.receive_weights(Parts(board.parts))
        engine.finish_weight_update()
        llm.reset_prefix_cache()
        (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], LIKELIHOODS, use_tqdm=False)
        return [told[token].logprob for told, token in zip(answer.prompt_logprobs[1:], PROMPT[1:], strict=True)]

    generator = torch.Generator().manual_seed(1)
    first = load_file(next(student.glob("*.safetensors")))
    versions = [
        {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in first.items()}
        for _ in range(4)
    ]
    biases = {name for name in first if name.endswith("e_score_correction_bias")}
    assert biases
    kinds = ("q_proj.bias", "q_norm.weight", "layers.0.mlp.down_proj.weight")
    assert all(any(name.endswith(kind) for name in first) for kind in kinds)
    with tempfile.TemporaryDirectory() as folder:
        by_search = []
        for rank, version in enumerate(versions, start=1):
            by_search.append(update(new_engine(), version, WeightBoard(Path(folder), rank)))
            assert set(searched) == set(first)
        assert len({tuple(likelihoods) for likelihoods in by_search}) == len(versions)

        engine, board = new_engine(), WeightBoard(Path(folder), 0)
        for place, version in enumerate(versions):
            assert update(engine, version, board) == by_search[place], f"update {place}"
            assert set(searched) == (set(first) if place < 2 else biases), f"update {place}"

        (path,) = {Path(part["path"]) for part in board.parts}
        path.unlink()
        del board  # it maps the file, too
        another = WeightBoard(Path(folder), 0)
        assert update(engine, versions[0], another) == by_search[0], "another training's file of the same name"
        assert set(searched) == set(first)
        in_another_order = dict(reversed(versions[1].items()))
        assert update(engine, in_another_order, WeightBoard(Path(folder), 9)) == by_search[1], "another layout"
        assert set(searched) == set(first)

        copies.append(True)
        engine, board = new_engine(), WeightBoard(Path(folder), 10)
        for place, version in enumerate(versions):
            assert update(engine, version, board) == by_search[place], f"update {place} of copies"
            assert set(searched) == set(first), f"update {place} of copies"

        engine, norm = new_engine(), "model.norm.weight"
        with raises("Attempted to load weight"):
            update(engine, first | {norm: first[norm][:-1]}, WeightBoard(Path(folder), 11))
        with raises("failed half way"):
            update(engine, first, WeightBoard(Path(folder), 12))
    print("AS BEFORE")


if __name__ == "__main__":
    main()
