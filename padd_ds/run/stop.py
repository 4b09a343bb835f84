"""A stop that the machine asks for by a signal, put off until the step, or what is being loaded, is done."""

import json
import signal
from pathlib import Path
from types import FrameType, TracebackType

from padd_ds.files import write_text_whole

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm sends at preemption or cancellation, and what slurm/*.sbatch ask it to send before the time limit."""


STOPPED = "stopped.json"
"""In the run folder, from the saved stop to the next start: which signal, after which step."""


class StoppedEarly(Exception):
    """The run ended before its last step because a signal asked for it; it can be resumed."""


class StopRequest:
    """While the block runs, a signal of SIGNALS is remembered in place of ending the process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """Of the first signal that came, None while none has."""
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def carried_out(self, folder: Path, step: int, is_main: bool) -> StoppedEarly:
        """What all ranks raise behind `step` saved steps, where one was asked to stop; the main one leaves STOPPED."""
        name = self.signal_name or "a signal to another rank"
        if is_main:
            write_text_whole(folder / STOPPED, json.dumps({"signal": name, "step": step}) + "\n")
        return StoppedEarly(f"stopped by {name} {f'after step {step}, and saved' if step else 'before the first step'}")
