"""Run by vLLM's Python with a student's folder: updates from the same files, in one process with vLLM on a CPU."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

from padd_ds.rollout.vllm.exchange import WeightBoard
from padd_ds.rollout.vllm.worker import MappedFiles, Parts

Tensors = dict[str, torch.Tensor]

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


class Served:
    """vLLM with a student, whose loader tells what it was given; updates do not go through vLLM's server."""

    def __init__(self, student: Path) -> None:
        self._llm = LLM(
            str(student), dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**26
        )
        self._model: Any = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        self._load_weights = self._model.load_weights
        self._model.load_weights = lambda tensors: self._load_weights(self._noted(tensors))
        self.searched: set[str] = set()
        """Names that vLLM's loader was given in the last update."""
        self.gets_copies = False
        """As of a loader that changes what it is given."""

    def new_engine(self) -> MappedFiles:
        return MappedFiles(None, self._llm.llm_engine.vllm_config, torch.device("cpu"), self._model)

    def update(self, engine: MappedFiles, tensors: Tensors, board: WeightBoard) -> list[float]:
        """The likelihoods of a prompt's tokens afterwards."""
        board.write("all", tensors)
        self.searched.clear()
        engine.start_weight_update()
        engine.receive_weights(Parts(board.parts))
        engine.finish_weight_update()
        self._llm.reset_prefix_cache()
        (answer,) = self._llm.generate([{"prompt_token_ids": PROMPT}], LIKELIHOODS, use_tqdm=False)
        return [told[token].logprob for told, token in zip(answer.prompt_logprobs[1:], PROMPT[1:], strict=True)]

    def _noted(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self.searched.add(name)
            yield name, tensor.clone() if self.gets_copies else tensor


def other_files_are_searched(served: Served, folder: Path, versions: Sequence[Tensors]) -> list[list[float]]:
    """The likelihoods of each version."""
    found = []
    for rank, version in enumerate(versions, start=1):
        found.append(served.update(served.new_engine(), version, WeightBoard(folder, rank)))
        assert served.searched == version.keys()
    assert len({tuple(likelihoods) for likelihoods in found}) == len(versions)
    return found


def the_same_files_are_not(
    served: Served, folder: Path, versions: Sequence[Tensors], expected: Sequence[list[float]]
) -> None:
    names = versions[0].keys()
    biases = {name for name in names if name.endswith("e_score_correction_bias")}
    assert biases
    engine, board = served.new_engine(), WeightBoard(folder, 0)
    for place, version in enumerate(versions):
        assert served.update(engine, version, board) == expected[place], f"update {place}"
        assert served.searched == (names if place < 2 else biases), f"update {place}"

    (path,) = {Path(part["path"]) for part in board.parts}
    path.unlink()
    del board  # it maps the file, too
    another = WeightBoard(folder, 0)
    assert served.update(engine, versions[0], another) == expected[0], "another training's file of the same name"
    assert served.searched == names
    in_another_order = dict(reversed(versions[1].items()))
    assert served.update(engine, in_another_order, WeightBoard(folder, 9)) == expected[1], "another layout"
    assert served.searched == names


def copies_are_searched(
    served: Served, folder: Path, versions: Sequence[Tensors], expected: Sequence[list[float]]
) -> None:
    served.gets_copies = True
    engine, board = served.new_engine(), WeightBoard(folder, 10)
    for place, version in enumerate(versions):
        assert served.update(engine, version, board) == expected[place], f"update {place} of copies"
        assert served.searched == version.keys(), f"update {place} of copies"


def a_failure_half_way_is_the_last_update(served: Served, folder: Path, first: Tensors) -> None:
    engine, norm = served.new_engine(), "model.norm.weight"
    with raises("Attempted to load weight"):
        served.update(engine, first | {norm: first[norm][:-1]}, WeightBoard(folder, 11))
    with raises("failed half way"):
        served.update(engine, first, WeightBoard(folder, 12))


def main() -> None:
    student = Path(sys.argv[1])
    generator = torch.Generator().manual_seed(1)
    first = load_file(next(student.glob("*.safetensors")))
    kinds = ("q_proj.bias", "q_norm.weight", "layers.0.mlp.down_proj.weight")
    assert all(any(name.endswith(kind) for name in first) for kind in kinds)
    versions = [
        {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in first.items()}
        for _ in range(4)
    ]
    served = Served(student)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = other_files_are_searched(served, folder, versions)
        the_same_files_are_not(served, folder, versions, expected)
        copies_are_searched(served, folder, versions, expected)
        a_failure_half_way_is_the_last_update(served, folder, first)
    print("AS BEFORE")


if __name__ == "__main__":
    main()
