"""What vLLM's workers run to take over a trainer's weights, from mapped files or over the network.

Named on the server's command line as --worker-extension-cls, so that every worker imports it and finds the engines
under padd_ and the name of vllm.transport. Written against vLLM 0.32.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from padd_ds.rollout.vllm.exchange import read_part
from padd_ds.rollout.vllm.loading import Loading
from padd_ds.rollout.vllm.network import go_to_meeting, join, receive

logger = init_logger("vllm.padd_ds")


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class Parts(WeightTransferUpdateInfo):
    """Files as `WeightBoard.parts` tells them."""

    parts: list[dict[str, Any]]


class ThroughLoader(WeightTransferEngine[Any, Any]):
    """Loads tensors under their checkpoint names; vLLM shards, fuses and repacks them as it does at its start."""

    supports_draft_weight_update = False

    def start_weight_update(self) -> None:
        self._unpack_experts()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Nothing to do."""

    def _unpack_experts(self) -> None:
        """vLLM repacks expert weights for its CPU kernel only together with setting the kernel up: without this an
        update would leave them in the checkpoint's layout, which the kernel reads as other weights."""
        if self.device.type == "cpu":
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, UnquantizedFusedMoEMethod):
                    method.moe_kernel = None


class MappedFiles(ThroughLoader):
    """Loads from files, all of them at once. Those that come again and again are loaded as before, without vLLM's
    search for where each tensor goes."""

    init_info_cls = Nothing
    update_info_cls = Parts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._files: list[Any] = []
        """Those of the update before."""
        self._loading: Loading | None = None
        """Of `_files`; as long as it maps them no others can have their inodes' numbers."""
        self._notes = not self.model_config.quantization
        self._failed = False

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do before the files are known."""

    def receive_weights(self, update_info: Parts) -> None:
        if self._failed:
            raise RuntimeError("an update failed half way: the server must be started again")
        files = [(part, _inode(part["path"])) for part in update_info.parts]
        self._failed = True
        if files != self._files:
            self._files, self._loading = files, None
            self._load(_tensors(update_info.parts))
        elif self._loading is not None:
            self._unpack_experts()
            self._loading.repeat()
            # As vLLM's loader does in the end: attention may keep what it computes from its parameters.
            for module in self.model.modules():
                if is_deferred_attention_layer(module):
                    module.process_weights_after_loading(self.model_config.dtype)
        elif self._notes:
            tensors = dict(_tensors(update_info.parts))
            loading = Loading(self.model, tensors)
            with loading.noting():
                self._load(tensors.items())
            self._notes = loading.is_repeatable
            self._loading = loading if self._notes else None
            logger.info("padd_ds: further weights are loaded %s", "as before" if self._notes else "by a search")
        else:
            self._load(_tensors(update_info.parts))
        self._failed = False

    def finish_weight_update(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().start_weight_update()
        self.model.load_weights(tensors)
        super().finish_weight_update()


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the sender's store is, and which ranks of the group this server's workers are."""

    address: str
    port: int
    first_rank: int
    world: int
    timeout_s: float
    """For the sender's next layer."""


@dataclass
class Layer(WeightTransferUpdateInfo):
    """What comes next, as `exchange.laid_out` tells."""

    part: dict[str, Any]


class Broadcasts(ThroughLoader):
    """Loads rows of bytes that the trainer's rank 0 sends."""

    init_info_cls = Meeting
    update_info_cls = Layer

    def init_transfer_engine(self, init_info: Meeting) -> None:
        own = self.parallel_config
        rank = init_info.first_rank + own.data_parallel_index * own.world_size + own.rank
        store = go_to_meeting(init_info.address, init_info.port, init_info.timeout_s)
        self._group = join(store, rank, init_info.world, self.device, init_info.timeout_s)

    def receive_weights(self, update_info: Layer) -> None:
        self.model.load_weights(receive(self._group, update_info.part, self.device))

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._group = None


def _tensors(parts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    return chain.from_iterable(read_part(part) for part in parts)


def _inode(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


WeightTransferEngineFactory.register_engine("padd_files", MappedFiles)
WeightTransferEngineFactory.register_engine("padd_network", Broadcasts)


class WorkerExtension:
    """Adds nothing to a worker: importing this module is all that is wanted."""
