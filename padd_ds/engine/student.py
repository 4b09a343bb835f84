"""A Hugging Face MoE student inside DeepSpeed's expert-parallel engine, with PADD routers; or a dense model, without.

Legend: B sequences, T tokens, S = B * T, D model width, E routed experts.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from transformers import get_scheduler

from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import OptimizerConfig
from padd_ds.engine.activity import measure_activity
from padd_ds.engine.clipping import clip_by_whole_norm
from padd_ds.engine.families import expert_parallel_keys, is_dense
from padd_ds.engine.finite import FiniteWatch
from padd_ds.engine.handover import check_handover, probe_logits
from padd_ds.engine.ranks import Ranks
from padd_ds.engine.token_exchange import over_ranks
from padd_ds.moe.masked import masked_experts, weights_of_all
from padd_ds.moe.router import PaddRouter, RoutingControl, RoutingMode, RoutingRecord


@dataclass
class Student:
    """The model being trained and the handles that stages need."""

    engine: Any
    """deepspeed.DeepSpeedEngine; call it as the Hugging Face model."""
    layers: list[AutoEPMoELayer]
    """MoE layers in the order of the model; none in a dense one."""
    control: RoutingControl
    """Shared by all routers."""
    ranks: Ranks
    accumulation_steps: int
    """Backward passes per optimiser step."""
    watch: FiniteWatch

    @property
    def routers(self) -> list[PaddRouter]:
        return [layer.router for layer in self.layers]

    @property
    def n_experts(self) -> int:
        return self.layers[0].num_experts if self.layers else 0

    @property
    def expert_parallel_size(self) -> int:
        return self.layers[0].ep_size if self.layers else 1

    @property
    def separates_terms(self) -> bool:
        """Whether a backward pass of one term of the loss alone is possible: ZeRO-3 knows whole ones only."""
        return self.zero_stage < 3

    @property
    def precision(self) -> torch.dtype:
        return torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float32

    def probe(self) -> torch.Tensor:
        """[T, V]: logits of fixed tokens, by which the model is known again. Collective."""
        return probe_logits(self.engine, self.model.config.vocab_size, self.ranks.device)

    @property
    def zero_stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def model(self) -> Any:
        return self.engine.module

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, which is already a mean over the global batch times the world size."""
        self.watch.see_loss(loss)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """At an accumulation boundary: reduce, clip, update, advance the schedule.

        TrainingDiverged, on all ranks and with the weights as they were, where a loss or gradient was not finite.
        """
        if self.engine.is_gradient_accumulation_boundary():
            self.watch.check(self.ranks)
        self.engine.step()

    def optimiser_metrics(self) -> dict[str, float]:
        """Learning rate of the last step, and gradient norm before clipping; at ZeRO 0 only where it clips."""
        norm = self.engine.get_global_grad_norm()
        told = {} if norm is None else {"grad_norm": float(norm)}
        return told | {"learning_rate": float(self.engine.get_lr()[0])}

    @contextmanager
    def routing(self, mode: RoutingMode, *, noise: float = 0.0, sample_S: torch.Tensor | None = None) -> Iterator[None]:
        """Route by `mode` inside the block; `backward` belongs into it, as activation checkpointing routes again.

        With `sample_S`, positions among a pass's tokens, as many on every rank, records also get the experts' activity.
        """
        before = (self.control.mode, self.control.noise, self.control.sample_S)
        self._set_routing(mode, noise, sample_S)
        try:
            yield
        finally:
            self._set_routing(*before)

    @contextmanager
    def recording(self, *, graph: bool = False) -> Iterator[RoutingRecord]:
        """Yield a record that the forward passes inside the block fill; with `graph` its scores carry gradients."""
        before = (self.control.record, self.control.keep_graph)
        self.control.record, self.control.keep_graph = RoutingRecord(), graph
        try:
            yield self.control.record
        finally:
            self.control.record, self.control.keep_graph = before

    @contextmanager
    def replaying(self, selected_SK: list[torch.Tensor] | None) -> Iterator[None]:
        """Route by these experts, one [S, K] per layer, inside the block, `backward` included; None changes nothing."""
        before = self.control.replay
        self.control.replay = None if selected_SK is None else dict(enumerate(selected_SK))
        try:
            yield
        finally:
            self.control.replay = before

    @contextmanager
    def tracing(self) -> Iterator[list[dict[int, torch.Tensor]]]:
        """Yield a list to which every forward pass inside the block adds the chosen experts [S, K] by layer."""
        before = self.control.trace
        self.control.trace = []
        try:
            yield self.control.trace
        finally:
            self.control.trace = before

    def _set_routing(self, mode: RoutingMode, noise: float, sample_S: torch.Tensor | None) -> None:
        self.control.mode, self.control.noise, self.control.sample_S = mode, noise, sample_S
        for layer in self.layers:
            # The dispatch of an AutoEP layer reads its own top_k.
            layer.top_k = layer.num_experts if mode == "dense" else layer.router.top_k


def build_student(
    model: Any,
    config: RunConfig,
    deepspeed_tree: dict[str, Any],
    ranks: Ranks,
    *,
    trainable: Callable[[str], bool],
    accumulation_steps: int,
    total_steps: int,
) -> Student:
    """Put `model` under DeepSpeed, train the parameters whose name passes `trainable`, install PADD routers.

    HandoverError, on all ranks, if it then computes something else than before.
    `total_steps` counts optimiser steps, for the learning rate's schedule.
    """
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
    if deepspeed_tree.get("zero_optimization", {}).get("stage") == 3:
        # ZeRO-3 collects a MoE layer's gradients once that of its input is there; without one, before there are any.
        model.enable_input_require_grads()
    selection_biases = _selection_biases(model)
    expected_TV = probe_logits(model, model.config.vocab_size, next(model.parameters()).device)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=_complete_tree(deepspeed_tree, config, model.config, accumulation_steps, ranks.device),
        lr_scheduler=_scheduler(config.optimizer, total_steps),
    )
    layers = [module for module in engine.module.modules() if isinstance(module, AutoEPMoELayer)]
    control = RoutingControl()
    for index, (layer, bias_E) in enumerate(zip(layers, selection_biases, strict=True)):
        layer.router = _padd_router(layer, bias_E.to(ranks.device), index, control)
    if config.model.expert_compute == "masked":
        for layer in layers:
            _compute_masked(layer)
    for index, layer in enumerate(layers):
        measure_activity(layer, index, control)
    if not engine.zero_optimization():
        clip_by_whole_norm(engine, layers[0].ep_group if layers else None)
    student = Student(
        engine=engine,
        layers=layers,
        control=control,
        ranks=ranks,
        accumulation_steps=accumulation_steps,
        watch=FiniteWatch(engine.module, ranks.device),
    )
    check_handover(student.probe(), expected_TV, student.precision, f"{config.model.student} in DeepSpeed", ranks)
    return student


def _compute_masked(layer: AutoEPMoELayer) -> None:
    """Let a layer run its experts with `masked_experts`, in place of sending tokens to each expert."""
    if layer.score_apply != "post":
        raise ValueError("the experts' inputs are weighed: not to be masked")

    def own_experts(x_ND: torch.Tensor, weights_NF: torch.Tensor) -> torch.Tensor:
        return masked_experts(x_ND, weights_NF, layer.experts.w1, layer.experts.w2, layer.experts.w3)

    def forward(hidden_BTD: torch.Tensor) -> Any:
        x_SD = hidden_BTD.flatten(0, 1)
        weights_SK, selected_SK, _ = layer.router(x_SD)
        weights_SE = weights_of_all(weights_SK.to(x_SD.dtype), selected_SK, layer.num_experts)
        if layer.ep_size == 1:
            output_SD = own_experts(x_SD, weights_SE)
        else:
            chosen_SE = torch.zeros_like(weights_SE, dtype=torch.bool).scatter(1, selected_SK, True)
            output_SD = over_ranks(own_experts, x_SD, weights_SE, chosen_SE, layer.ep_size, layer.ep_group)
        return layer._finalize_output(output_SD.view_as(hidden_BTD), x_SD, hidden_BTD, hidden_BTD.shape[-1])

    layer._forward = forward


def _selection_biases(model: Any) -> list[torch.Tensor]:
    """Per MoE layer, before the engine casts it to the model's precision."""
    found = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return [bias_E.detach().float().clone() for bias_E in found]


def _padd_router(layer: AutoEPMoELayer, bias_E: torch.Tensor, index: int, control: RoutingControl) -> PaddRouter:
    old = layer.router
    router = PaddRouter(
        old.gate,
        bias_E,
        layer=index,
        top_k=old.top_k,
        score_function=old.score_func,
        normalise=old.route_norm,
        scale=old.route_scale,
        control=control,
    )
    return router.train(old.training)


def _scheduler(options: OptimizerConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    name = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    return lambda optimizer: get_scheduler(
        name, optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=total_steps
    )


def _fastest_kernels(tree: dict[str, Any], device: torch.device) -> dict[str, str]:
    """Those of AutoEP that need Triton, a CUDA GPU, and its own exchange of tokens; measured in docs/speed.md."""
    has_triton = importlib.util.find_spec("triton") is not None
    own_exchange = tree["expert_parallel"].get("comm_backend", "comm") == "comm"
    if device.type == "cuda" and torch.version.hip is None and has_triton and own_exchange:
        return {"combine_impl": "fused_weighted_sum"}
    return {}


def _complete_tree(
    tree: dict[str, Any], config: RunConfig, model_config: Any, accumulation_steps: int, device: torch.device
) -> dict[str, Any]:
    options = config.optimizer
    adamw = {"lr": options.learning_rate, "betas": list(options.betas), "weight_decay": options.weight_decay}
    complete = tree | {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        # torch's own AdamW needs no compiler on the machine; DeepSpeed's fused and CPU variants are built at run time.
        "optimizer": {"type": "AdamW", "params": adamw | {"torch_adam": True, "fused": True}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    complete.pop("expert_parallel", None)
    if not is_dense(model_config):
        complete["expert_parallel"] = (
            expert_parallel_keys(model_config) | _fastest_kernels(tree, device) | tree["expert_parallel"]
        )
        # ZeRO-3 gathers a MoE layer as one: its parts are read from outside of their own passes, and not by every rank.
        leaf = {"classes": [f"{AutoEPMoELayer.__module__}.{AutoEPMoELayer.__name__}"]}
        complete["zero_optimization"] = {"leaf_module": leaf, **complete.get("zero_optimization", {})}
    return complete
