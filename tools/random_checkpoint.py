"""A dense checkpoint of any size with random weights, written layer by layer: to measure conversion at real sizes."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2Config

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.conversion.writer import write_index, write_shard
from padd_ds.errors import run_cli
from padd_ds.files import staged_directory
from padd_ds.hf import DTYPES
from tools.tiny_model import make_tokenizer

SHAPES = {
    "7b": {"layers": 28, "width": 3584, "ffn": 18944, "heads": 28, "kv_heads": 4, "vocabulary": 152064},
    "0.5b": {"layers": 24, "width": 896, "ffn": 4864, "heads": 14, "kv_heads": 2, "vocabulary": 151936},
    "tiny": {"layers": 3, "width": 64, "ffn": 192, "heads": 4, "kv_heads": 2, "vocabulary": 256},
}
"""Those of Qwen2.5-7B and Qwen2.5-0.5B, and one for tests."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.output, SHAPES[arguments.shape], DTYPES[arguments.dtype], arguments.seed)


def write_checkpoint(output: Path, shape: dict[str, int], dtype: torch.dtype, seed: int) -> None:
    """A Qwen2 folder with an untied head; the tokenizer is the toy's, so that texts can be read."""
    config = Qwen2Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    generator = torch.Generator().manual_seed(seed)
    with staged_directory(output) as staged:
        config.save_pretrained(staged)
        make_tokenizer().save_pretrained(staged)
        shards = list(shard_shapes(config))
        for number, shapes in enumerate(tqdm(shards, desc="writing", unit="shard", dynamic_ncols=True), start=1):
            tensors = {name: random_tensor(name, size, generator).to(dtype) for name, size in shapes.items()}
            write_shard(staged, number, len(shards), tensors)
        write_index(staged, len(shards))


def shard_shapes(config: Qwen2Config) -> Iterator[dict[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the model: embedding, a shard per layer, norm with head."""
    width, ffn, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    key_value = (config.num_key_value_heads or heads) * (width // heads)
    rows = {"q": width, "k": key_value, "v": key_value}
    yield {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield {
            **{f"{prefix}.self_attn.{part}_proj.weight": (size, width) for part, size in rows.items()},
            **{f"{prefix}.self_attn.{part}_proj.bias": (size,) for part, size in rows.items()},
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.mlp.gate_proj.weight": (ffn, width),
            f"{prefix}.mlp.up_proj.weight": (ffn, width),
            f"{prefix}.mlp.down_proj.weight": (width, ffn),
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.post_attention_layernorm.weight": (width,),
        }
    yield {"model.norm.weight": (width,), "lm_head.weight": (config.vocab_size, width)}


def random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for norms, zeros for biases, and a spread that keeps activations near their size for matrices."""
    if "norm" in name:
        return torch.ones(size)
    if name.endswith("bias"):
        return torch.zeros(size)
    return torch.randn(size, generator=generator).div_(size[-1] ** 0.5)


if __name__ == "__main__":
    run_cli(main)
