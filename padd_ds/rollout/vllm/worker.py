"""What vLLM's workers run to take over a trainer's weights, from mapped files or over the network.

Named on the server's command line as --worker-extension-cls, so that every worker imports it and finds the engines
under padd_ and the name of vllm.transport. Written against vLLM 0.32.
"""

from contextlib import nullcontext
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

from padd_ds.rollout.vllm.direct import Plan, Recorder
from padd_ds.rollout.vllm.exchange import read_part
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

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            # vLLM repacks expert weights for its CPU kernel only together with setting the kernel up: without this an
            # update would leave them in the checkpoint's layout, which the kernel reads as other weights.
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, UnquantizedFusedMoEMethod):
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to do."""


class MappedFiles(ThroughLoader):
    """Loads from files, on a GPU the second time and after straight into the tensors that compute, where it can."""

    init_info_cls = Nothing
    update_info_cls = Parts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plan: Plan | None = None
        self._recorder: Recorder | None = None
        # On a CPU weights are repacked for oneDNN even where their own tensors stay as they are.
        self._records = self.device.type == "cuda" and bool(torch.version.cuda) and not self.model_config.quantization

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        if self._plan is None:
            self._recorder = Recorder(self.model) if self._records else None
            super().start_weight_update()

    def receive_weights(self, update_info: Parts) -> None:
        if self._plan is not None and not self._plan.fits(update_info.parts):  # another training's
            self._plan = None
            self.start_weight_update()
        if self._plan is not None:
            self._plan.apply(update_info.parts)
        elif self._recorder is not None:
            with self._recorder:
                self.model.load_weights(self._recorder.read(update_info.parts))
        else:
            self.model.load_weights(chain.from_iterable(read_part(part) for part in update_info.parts))

    def finish_weight_update(self) -> None:
        if self._plan is not None:
            # As vLLM's own reload does: attention may keep what it computes from its parameters.
            for module in self.model.modules():
                if is_deferred_attention_layer(module):
                    module.process_weights_after_loading(self.model_config.dtype)
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            return
        with self._recorder or nullcontext():
            super().finish_weight_update()
        if self._recorder is not None:
            others = self._recorder.not_as_in_files()
            if others:
                self._records = False
                logger.info("padd_ds: weights go through vLLM's loader; not as in the files: %s", others[0])
            else:
                self._plan = self._recorder.plan()
                logger.info("padd_ds: further weights go straight into the model")
            self._recorder = None


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
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self._group = None


WeightTransferEngineFactory.register_engine("padd_files", MappedFiles)
WeightTransferEngineFactory.register_engine("padd_network", Broadcasts)


class WorkerExtension:
    """Adds nothing to a worker: importing this module is all that is wanted."""
