"""A run's folder with one checkpoint, as training leaves it, of a model that was never trained."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from padd_ds.checkpoint.handover import layerwise_logits
from padd_ds.checkpoint.layout import read_checkpoint
from padd_ds.checkpoint.probe import PROBE
from padd_ds.checkpoint.weights import saved_weights
from padd_ds.engine.handover import probe_logits
from padd_ds.files import sha256_of
from tools.tiny_model import make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 3.0,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
}
ROPE = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}


def random_student(**settings: Any) -> Glm4MoeForCausalLM:
    """A student in which norms, biases and selection biases all differ from their defaults."""
    torch.manual_seed(3)
    return spread(Glm4MoeForCausalLM(Glm4MoeConfig(**({**SIZES, "rope_parameters": ROPE} | settings))))


@torch.no_grad()
def spread(model: Any) -> Any:
    """Give every parameter values that matter, so that none can be lost or swapped unseen."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=0.3 if name.endswith("bias") else 1.5 * max(1, parameter.shape[-1]) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model.float().eval()


def write_run(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A run whose newest checkpoint, of step 1, is `model`, as it computes in `dtype`."""
    model = model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    model.save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    weights = folder / "checkpoints" / "step_1" / "weights"
    weights.mkdir(parents=True)
    for path in sorted((folder / "student").glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            by_file: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in load_file(path).items():
                # Training leaves shared experts of width 0 out.
                label = f"layer_{name.split('.')[2]}" if name.startswith("model.layers.") else "rest"
                by_file.setdefault(label, {}).update({name: tensor} if tensor.numel() else {})
            for label, tensors in by_file.items():
                save_file(tensors, weights / f"{label}.rank_00000.safetensors")
        path.unlink()
    save_file(
        {PROBE: probe_logits(model, model.config.vocab_size, torch.device("cpu"))}, weights.parent / "stage.safetensors"
    )
    seal(folder)
    return folder


def seal(run: Path) -> None:
    """Write the manifest of what the checkpoint holds now."""
    step = run / "checkpoints" / "step_1"
    files = {
        str(path.relative_to(step)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(step.rglob("*.safetensors"))
    }
    facts = {"step": 1, "stage": "joint", "bias_target": "selection", "files": files}
    (step / "manifest.json").write_text(json.dumps(facts))


def write_large_run(folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """The same of a student that need not fit into memory; its logits are those of the weights, layer by layer."""
    config = Glm4MoeConfig(**({**SIZES, "rope_parameters": ROPE} | settings))
    config.save_pretrained(folder / "student")
    weights = folder / "checkpoints" / "step_1" / "weights"
    weights.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def write(label: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)
            for name, shape in shapes.items()
        }
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                tensors[name] = tensors[name].float()
        save_file(tensors, weights / f"{label}.rank_00000.safetensors")

    width, vocabulary = config.hidden_size, config.vocab_size
    write("embedding", {"model.embed_tokens.weight": (vocabulary, width)})
    write("head", {"lm_head.weight": (vocabulary, width), "model.norm.weight": (width,)})
    for layer in range(config.num_hidden_layers):
        write(f"layer_{layer}", {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(config).items()})
    seal(folder)
    saved = saved_weights(
        read_checkpoint(weights.parent), json.loads((folder / "student" / "config.json").read_text()), None
    )
    save_file({PROBE: layerwise_logits(config, saved)}, weights.parent / "stage.safetensors")
    seal(folder)
    return folder


def layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an MoE layer."""
    width, head = config.hidden_size, config.head_dim
    rows = {"q": config.num_attention_heads * head, "k": config.num_key_value_heads * head}
    rows["v"] = rows["k"]
    ffns = {f"experts.{expert}": config.moe_intermediate_size for expert in range(config.n_routed_experts)}
    ffns["shared_experts"] = config.moe_intermediate_size * config.n_shared_experts
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.o_proj.weight": (width, rows["q"]),
        "mlp.gate.weight": (config.n_routed_experts, width),
        "mlp.gate.e_score_correction_bias": (config.n_routed_experts,),
    }
    shapes |= {f"self_attn.{part}_proj.weight": (n, width) for part, n in rows.items()}
    for name, inner in ffns.items():
        shapes |= {f"mlp.{name}.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"mlp.{name}.down_proj.weight"] = (width, inner)
    return shapes
