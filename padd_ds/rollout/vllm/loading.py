"""An update of weights once more: what vLLM's loader did for each layer, without its search for where tensors go.

That loader (vllm/model_executor/model_loader/reload/layerwise.py, 0.32) gathers the calls that fill a layer until they
are whole, makes them into new tensors, has the layer pack these for its kernels, and copies the outcome into the
tensors that compute.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import BoundArguments
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers


class Loading:
    """One update by vLLM's loader, from `tensors` by their checkpoint names, which stay where they are while their
    values change."""

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._model: Any = model
        self._tensors = tensors
        self._layers: list[tuple[torch.nn.Module, list[tuple[str, BoundArguments]]]] = []
        """In the loader's order, each with (parameter, call that fills some of it)."""

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Around all that the loader does."""
        process = layerwise._layerwise_process

        def note_and_process(layer: torch.nn.Module, info: Any) -> None:
            calls = info.loaded_weights
            process(layer, info)
            _let_go(calls)
            self._layers.append((layer, calls))

        layerwise._layerwise_process = note_and_process
        try:
            yield
        finally:
            layerwise._layerwise_process = process

    @property
    def is_repeatable(self) -> bool:
        """Whether the loader filled layers from `tensors` themselves, not from what it made of them."""
        places = {_place(tensor) for tensor in self._tensors.values()}
        return bool(self._layers) and all(_place(tensor) in places for tensor in self._taken())

    def repeat(self) -> None:
        """The same with the values of now."""
        for layer, calls in self._layers:
            info = layerwise.get_layerwise_info(layer)
            # As vLLM's initialize_layerwise_reload does it.
            info.kernel_tensors = get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            restore_layer_on_meta(layer, info)
            info.loaded_weights = calls
            layerwise._layerwise_process(layer, info)
            _let_go(calls)
        # Some the loader puts into tensors that compute at once, such as routers' selection bias; some it passes over.
        taken = {tensor.data_ptr() for tensor in self._taken()}
        self._model.load_weights(
            (name, tensor) for name, tensor in self._tensors.items() if tensor.data_ptr() not in taken
        )

    def _taken(self) -> Iterator[torch.Tensor]:
        for _, calls in self._layers:
            for _, call in calls:
                yield from (value for value in call.arguments.values() if isinstance(value, torch.Tensor))


def _let_go(calls: list[tuple[str, BoundArguments]]) -> None:
    """Of the tensors that were filled: each time there are new ones."""
    for _, call in calls:
        call.arguments["param"] = None


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
