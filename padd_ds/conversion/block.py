"""One decoder layer of a checkpoint, run on its own.

Shapes: B windows, T tokens of a window, D model width, V vocabulary.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

PREFIX = "model.layers.0."
WINDOWS_PER_BATCH = 8


class Block:
    """A layer as its Hugging Face class computes it, without the model around it."""

    def __init__(self, model: Any) -> None:
        self._body = model.model
        self._ffn = self._body.layers[0].mlp
        self.final_norm = self._body.norm
        self._body.norm = nn.Identity()

    @property
    def ffn(self) -> Any:
        """The feed-forward part: a dense FFN or an MoE layer; [B, T, D] -> [B, T, D]."""
        return self._ffn

    def forward(self, states_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] after the layer."""
        return self._run(states_BTD, self._ffn)

    def attend(self, states_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states after attention, and the input of the FFN (the same, normalised)."""
        catch = _Catch()
        after_attention_BTD = self._run(states_BTD, catch)
        assert catch.input_BTD is not None
        return after_attention_BTD, catch.input_BTD

    @torch.no_grad()
    def feed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] output of the feed-forward part alone."""
        device = next(self._ffn.parameters()).device
        return torch.cat([self._ffn(part.to(device)).to(x_BTD.device) for part in x_BTD.split(WINDOWS_PER_BATCH)])

    @torch.no_grad()
    def normalise(self, states_BTD: torch.Tensor, rounding: torch.dtype | None) -> torch.Tensor:
        """The model's final norm of its last layer's output, the weight rounded to `rounding` where one is given."""
        parameter = self.final_norm.weight
        weight_D = parameter.data
        rounded_D = weight_D if rounding is None else weight_D.to(rounding)
        parameter.data = rounded_D.to(states_BTD.dtype)
        normed_BTD = self.final_norm(states_BTD.to(weight_D.device)).to(states_BTD.device)
        parameter.data = weight_D
        return normed_BTD

    def cast(self, dtype: torch.dtype) -> "Block":
        """Round the parameters only: rotary frequencies and selection biases are buffers and stay in fp32."""
        for module in (self._body, self._ffn, self.final_norm):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
        return self

    @torch.no_grad()
    def _run(self, states_BTD: torch.Tensor, ffn: nn.Module) -> torch.Tensor:
        layer = self._body.layers[0]
        layer.mlp = ffn
        device = next(layer.self_attn.parameters()).device
        result_BTD = torch.empty_like(states_BTD)
        for rows in torch.arange(len(states_BTD)).split(WINDOWS_PER_BATCH):
            batch_BTD = states_BTD[rows].to(device)
            outputs = self._body(inputs_embeds=batch_BTD, use_cache=False)
            result_BTD[rows] = outputs.last_hidden_state.to(states_BTD.device)
        if isinstance(ffn, _Catch):
            ffn.close(states_BTD.device)
        return result_BTD


class _Catch(nn.Module):
    """Stands in for an FFN: keeps its input, adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[torch.Tensor] = []
        self.input_BTD: torch.Tensor | None = None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        self._parts.append(x_BTD.detach().clone())
        return torch.zeros_like(x_BTD)

    def close(self, device: torch.device) -> None:
        self.input_BTD = torch.cat([part.to(device) for part in self._parts])
        self._parts = []


def load_block(
    config: Any,
    layer: int,
    tensors: Mapping[str, torch.Tensor],
    final_norm_D: torch.Tensor,
    dtype: torch.dtype,
    device: str,
    **changes: Any,
) -> Block:
    """Layer `layer` of the model of `config`, through the class's own loader.

    `tensors` by their names within the layer, as the checkpoint stores them; `changes` replace fields of
    the config. RuntimeError where the class lacks one of the tensors or does not know it.
    """
    alone = single_layer_config(config, layer, **changes)
    width = alone.hidden_size
    state = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    state["model.norm.weight"] = final_norm_D
    state["model.embed_tokens.weight"] = torch.zeros(1, width)
    state["lm_head.weight"] = torch.zeros(1, width)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(alone)]
    with _no_progress_bar():
        model, found = model_class.from_pretrained(
            None, config=alone, state_dict=state, dtype=dtype, output_loading_info=True
        )
    missing = [*found["missing_keys"], *found["mismatched_keys"]]
    unexpected = list(found["unexpected_keys"])
    if missing or unexpected:
        raise RuntimeError(f"layer {layer}: the class lacks {missing} and does not know {unexpected}")
    return Block(model.eval().to(device))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def single_layer_config(config: Any, layer: int, **changes: Any) -> Any:
    """The config of a model of one layer that is layer `layer` of the whole one."""
    alone = copy.deepcopy(config)
    alone.num_hidden_layers, alone.vocab_size, alone.tie_word_embeddings = 1, 1, False
    alone.pad_token_id = alone.bos_token_id = alone.eos_token_id = None
    if getattr(alone, "layer_types", None):
        alone.layer_types = alone.layer_types[layer : layer + 1]
    if hasattr(alone, "first_k_dense_replace"):
        alone.first_k_dense_replace = int(layer < config.first_k_dense_replace)
    if hasattr(alone, "mlp_only_layers"):
        sparse = layer not in (config.mlp_only_layers or []) and (layer + 1) % config.decoder_sparse_step == 0
        alone.mlp_only_layers, alone.decoder_sparse_step = ([] if sparse else [0]), 1
    for name, value in changes.items():
        setattr(alone, name, value)
    return alone
