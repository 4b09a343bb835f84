"""padd_ds/train.py with the collectives of its second step counted, and its memory watched.

    torchrun --nproc_per_node 2 tools/watched_train.py OUTPUT --config RUN.yaml ...

Every rank writes OUTPUT/rank_N.json: `traffic`, the bytes that it handed to each kind of collective in step 1 (the
first one is step 0); `memory`, the most bytes that it held before it loaded anything, while it built the stage, in the
steps, and between them (on a CPU the process's anonymous memory, on a GPU what its allocator has handed out); `seconds`
of each step; and on a GPU its name, `device`, and `overhead`, the bytes that it gave out beside the allocator's.
"""

import inspect
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# The repository in place of this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

MOVED = {
    "all_reduce": "tensor",
    "broadcast": "tensor",
    "reduce": "tensor",
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "all_to_all_single": "input",
}
"""Collective -> its argument that holds what is moved, in whole; of an all-to-all what this rank gives."""
INTERVAL_S = 0.002
ON_GPU = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


class Watch:
    """Counts bytes by collective and group size, and follows the memory of this process or of its GPU."""

    def __init__(self) -> None:
        self.moved: Counter[str] = Counter()
        self.counting = False
        self.peaks: dict[str, int] = {}
        self.seconds: list[float] = []
        self.phase = "imported"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def enter(self, phase: str) -> None:
        """From here on what is held counts for `phase`."""
        if ON_GPU:
            torch.cuda.synchronize()
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def count(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def counted(*arguments: Any, **options: Any) -> Any:
            if self.counting:
                given = signature.bind(*arguments, **options).arguments
                tensors = given[MOVED[name]] if isinstance(given[MOVED[name]], list) else [given[MOVED[name]]]
                size = dist.get_world_size(group=given.get("group"))
                self.moved[f"{name} over {size}"] += sum(tensor.nbytes for tensor in tensors)
            return function(*arguments, **options)

        return counted

    def _follow(self) -> None:
        while not self._stop.is_set():
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), anonymous_bytes())
            time.sleep(INTERVAL_S)

    @contextmanager
    def watching(self) -> Iterator[None]:
        if ON_GPU:  # its allocator remembers the largest by itself
            yield
            return
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()


def overhead_bytes() -> int:
    """What the GPU gave out that the allocator does not hold: context, libraries, and other processes' memory."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def anonymous_bytes() -> int:
    """What this process holds of its own: files that are mapped, and can be dropped, do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no RssAnon")


def copy_loaded_weights() -> None:
    """Weights stay in their mapped file on a CPU as long as nothing changes them; here they are copied, as to a GPU."""
    import padd_ds.stages.materials as materials

    load = materials.load_causal_lm

    def loading(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return model

    materials.load_causal_lm = loading


def watch_collectives(watch: Watch) -> None:
    """Before deepspeed is imported, which keeps references to some of them."""
    for name in MOVED:
        counted = watch.count(name, getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d):
            setattr(module, name, counted)


def watch_steps(watch: Watch) -> None:
    """Mark where loading ends and steps begin, and count the second step's collectives; no checkpoint is written."""
    import padd_ds.run.loop as loop
    import padd_ds.stages.build as build

    read_inputs, train = build.read_inputs, loop.train

    def reading(*arguments: Any) -> Any:
        inputs = read_inputs(*arguments)
        watch.enter("building")
        return inputs

    def training(stage: Any, *arguments: Any) -> None:
        step = stage.step

        def counted_step(number: int) -> Any:
            watch.enter(f"step {number}")
            watch.counting = number == 1
            started_s = time.perf_counter()
            report = step(number)
            watch.enter("between steps")
            watch.seconds.append(time.perf_counter() - started_s)
            watch.counting = False
            return report

        object.__setattr__(stage, "step", counted_step)
        train(stage, *arguments)

    build.read_inputs, loop.train = reading, training  # type: ignore[assignment]
    loop._checkpoint = lambda *_: None


def main() -> None:
    output, arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    watch = Watch()
    watch_collectives(watch)
    watch_steps(watch)
    copy_loaded_weights()

    from padd_ds import train

    with watch.watching():
        train.main(arguments)
    facts = {
        "traffic": dict(watch.moved),
        "memory": watch.peaks,
        "seconds": watch.seconds,
        **({"device": torch.cuda.get_device_name(), "overhead": overhead_bytes()} if ON_GPU else {}),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"rank_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
