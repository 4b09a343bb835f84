"""A narrower dense model: every FFN keeps the neurons that contribute most on a text.

The dense baseline of a student: as many active parameters, chosen from the same teacher, without routing.
Shapes: S tokens, D model width, F neurons of an FFN, K of them kept.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.data.batches import supervised_batch
from padd_ds.data.problems import FieldMap, map_rows
from padd_ds.data.prompts import render, resolve_template
from padd_ds.data.sources import read_rows
from padd_ds.data.split import split_problems
from padd_ds.errors import UserError, run_cli
from padd_ds.files import check_output_free, staged_directory
from padd_ds.hf import load_causal_lm, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="dense checkpoint")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--keep", required=True, type=int, metavar="NEURONS", help="width of the new FFNs")
    parser.add_argument("--calibration", required=True, help="JSONL with question, solution, answer; part A is used")
    parser.add_argument("--template", help="in which a question stands, as data.template of a run (default: none)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    check_output_free(arguments.output, overwrite=False)
    model, tokenizer = load_causal_lm(arguments.teacher, torch.float32), load_tokenizer(arguments.teacher)
    width = model.config.intermediate_size
    if not 1 <= arguments.keep <= width:
        raise UserError(f"--keep is {arguments.keep}; the teacher's FFNs have {width} neurons")
    problems = split_problems(map_rows(read_rows(arguments.calibration), FieldMap(solution="solution"))).parts["A"]
    template = None if arguments.template is None else resolve_template(arguments.template)
    batch = supervised_batch(
        [problem.question if template is None else render(template, problem, tokenizer) for problem in problems],
        [problem.solution or problem.answer for problem in problems],
        tokenizer,
        model.config.max_position_embeddings,
    )
    model.to(arguments.device)
    ids_BT, mask_BT = batch["input_ids_BT"].to(arguments.device), batch["attention_mask_BT"].to(arguments.device)
    narrow(model, arguments.keep, ids_BT, mask_BT)
    with staged_directory(arguments.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{arguments.output}: {arguments.keep} of {width} neurons in each of {len(model.model.layers)} layers")


@torch.no_grad()
def narrow(model: Any, keep: int, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
    """Cut every FFN of `model` to its `keep` neurons of the largest summed square contribution on the real tokens."""
    mask_S, squares = mask_BT.flatten().bool(), dict[int, torch.Tensor]()

    def watch(layer: int) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            squares[layer] = inputs[0].flatten(0, 1)[mask_S].float().square().sum(0)

        return hook

    layers = [layer.mlp for layer in model.model.layers]
    handles = [mlp.down_proj.register_forward_pre_hook(watch(index)) for index, mlp in enumerate(layers)]
    model.model(input_ids=ids_BT, attention_mask=mask_BT)
    for handle in handles:
        handle.remove()
    for index, mlp in enumerate(layers):
        importance_F = squares[index] * mlp.down_proj.weight.float().square().sum(0)
        kept_K = importance_F.topk(keep).indices.sort().values
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[kept_K].contiguous())
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, kept_K].contiguous())
    model.config.intermediate_size = keep


if __name__ == "__main__":
    run_cli(main)
