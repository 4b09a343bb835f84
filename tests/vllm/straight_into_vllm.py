"""Run by vLLM's Python with a student's folder: what `MappedFiles` does on a GPU, in one process with vLLM on a CPU.

vLLM repacks weights for a CPU's kernels: with that, they must go through its loader; with that switched off, straight.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import load_file
from vllm import LLM
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from padd_ds.rollout.vllm.exchange import WeightBoard
from padd_ds.rollout.vllm.worker import MappedFiles, Parts


def leave_as_it_is(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def leave_experts_as_they_are(model: torch.nn.Module) -> None:
    UnquantizedFusedMoEMethod._setup_kernel = lambda *arguments, **named: None
    for layer in model.modules():
        if isinstance(getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
            for name, shaped in get_layerwise_info(layer).restore_metadata[0].items():
                layer.register_parameter(name, torch.nn.Parameter(torch.zeros(shaped.shape), requires_grad=False))


def main() -> None:
    student = Path(sys.argv[1])
    utils.dispatch_cpu_unquantized_gemm = leave_as_it_is
    llm = LLM(str(student), dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**26)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    model = worker.model_runner.model
    first = load_file(next(student.glob("*.safetensors")))
    generator = torch.Generator().manual_seed(1)
    second = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in first.items()}

    def engine(records: bool) -> MappedFiles:
        made = MappedFiles(None, llm.llm_engine.vllm_config, torch.device("cpu"), model)
        made._records = records
        return made

    def update(by: MappedFiles, tensors: dict[str, torch.Tensor], board: WeightBoard) -> dict[str, torch.Tensor]:
        board.write("all", tensors)
        by.start_weight_update()
        by.receive_weights(Parts(board.parts))
        by.finish_weight_update()
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        board, another = WeightBoard(Path(folder), 0), WeightBoard(Path(folder), 1)
        repacking = engine(records=True)
        update(repacking, first, board)
        assert repacking._plan is None and not repacking._records, "packed experts were taken for the files' own"
        leave_experts_as_they_are(model)
        straight = engine(records=True)
        before = update(straight, first, board)
        plan = straight._plan
        assert plan is not None, "everything is as in the files, and yet weights go through the loader"
        by_copies = update(straight, second, board)
        assert straight._plan is plan, "the weights fit, and yet they went through the loader"
        update(engine(records=False), first, board)
        by_loader = update(engine(records=False), second, board)
        in_another_order = update(straight, dict(reversed(first.items())), another)
        assert straight._plan is not plan, "weights in another layout were taken for the same"
    for name, expected in by_loader.items():
        assert torch.equal(by_copies[name], expected), name
        assert not torch.equal(before[name], expected), name
        assert torch.equal(in_another_order[name], before[name]), name
    print("STRAIGHT")


if __name__ == "__main__":
    main()
