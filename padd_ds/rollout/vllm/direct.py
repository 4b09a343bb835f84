"""New weights straight into the tensors that compute, past a model's loader.

While a loader loads once, `Recorder` watches its copies: from the trainer's files into new tensors, and from those into
the ones that compute. If afterwards all parameters hold just what the files hold at the recorded places, the next
weights can be copied there at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from padd_ds.rollout.vllm.exchange import mapped, views

Part = Mapping[str, Any]
"""As `WeightBoard.parts` tells."""


@dataclass(frozen=True)
class View:
    """Where a tensor lies in its storage, in elements of its type."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "View":
        return cls(tensor.dtype, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))

    def on(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same place in the storage of `tensor`."""
        return tensor.detach().view(self.dtype).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Copy:
    """From a place in a part's row of bytes into a parameter."""

    part: int
    source: View
    into: torch.Tensor


class Recorder(TorchDispatchMode):
    """Active around a model's loading of weights that come by `read`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._parameters = dict(model.named_parameters())
        self._computing = {_place(parameter): parameter for parameter in self._parameters.values()}
        self._parts: dict[int, int] = {}
        """Number of the part, by its row's place."""
        self._rows: list[torch.Tensor] = []
        self._layout: list[dict[str, Any]] = []
        self._loaded: dict[tuple[int, int], list[tuple[int, View, View]]] = {}
        """(part, source, target) in tensors that do not compute, by their place and room. Another tensor may come to
        stand there: what is mixed up so does not hold the files' values."""
        self._copies: list[Copy] = []

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all parts, where they lie."""
        for part in parts:
            row = mapped(Path(part["path"]), part["bytes"])
            self._parts[_place(row)] = len(self._rows)
            self._rows.append(row)
            self._layout.append(_layout_of(part))
            yield from views(part, row)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and not args[0].is_meta and not args[1].is_meta:
            self._note(args[0], args[1])
        return result

    def _note(self, into: torch.Tensor, source: torch.Tensor) -> None:
        target, origin = _place(into), _place(source)
        new, old = (target, _room(into)), (origin, _room(source))
        computing = self._computing.get(target)
        if (part := self._parts.get(origin)) is not None:
            if computing is not None:
                self._copies.append(Copy(part, View.of(source), View.of(into).on(computing)))
            else:
                self._loaded.setdefault(new, []).append((part, View.of(source), View.of(into)))
        elif computing is not None and origin != target:
            loaded = self._loaded.pop(old, [])
            if View.of(into) == View.of(source) and _room(into) == _room(source):
                self._copies += [Copy(part, view, place.on(computing)) for part, view, place in loaded]

    def not_as_in_files(self) -> list[str]:
        """Names of the parameters that hold anything else than the files at the recorded places."""
        others = {
            _place(copy.into)
            for copy in self._copies
            if not torch.equal(copy.into, copy.source.on(self._rows[copy.part]).to(copy.into))
        }
        named = [
            name
            for name, reached in self._reached()
            if _place(self._parameters[name]) in others
            # Zeros may pad a parameter, but are not all of it.
            or not reached.any()
            or (self._parameters[name].ne(0) & ~reached).any()
        ]
        return named + (["what was loaded beside the parameters"] if self._loaded else [])

    def plan(self) -> "Plan":
        """Where everything goes, if nothing is `not_as_in_files`."""
        padded = [self._parameters[name] for name, reached in self._reached() if not reached.all()]
        return Plan(self._copies, padded, self._layout)

    def _reached(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Which elements of a parameter the copies go to, one parameter after the other."""
        into: dict[int, list[torch.Tensor]] = {}
        for copy in self._copies:
            into.setdefault(_place(copy.into), []).append(copy.into)
        for name, parameter in self._parameters.items():
            yield name, _marked(parameter, into.get(_place(parameter), []))


class Plan:
    """Copies from rows of bytes into a model's parameters."""

    def __init__(self, copies: Sequence[Copy], padded: Sequence[torch.Tensor], layout: Sequence[Part]) -> None:
        self._copies, self._padded, self._layout = copies, padded, layout

    def fits(self, parts: Sequence[Part]) -> bool:
        """Whether `parts` are laid out as those recorded."""
        return [_layout_of(part) for part in parts] == self._layout

    @torch.no_grad()
    def apply(self, parts: Sequence[Part]) -> None:
        """Give the parameters the values of `parts`, which `fits`."""
        for parameter in self._padded:
            parameter.zero_()  # what pads it is lost in a sleep
        rows = [mapped(Path(part["path"]), part["bytes"]) for part in parts]
        for copy in self._copies:
            copy.into.copy_(copy.source.on(rows[copy.part]))


def _marked(parameter: torch.Tensor, within: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which elements of `parameter` lie in one of `within`, views of its storage."""
    n_elements = parameter.untyped_storage().nbytes() // parameter.element_size()
    marks = torch.zeros(n_elements, dtype=torch.bool, device=parameter.device)
    for view in within:
        replace(View.of(view), dtype=torch.bool).on(marks).fill_(True)
    return replace(View.of(parameter), dtype=torch.bool).on(marks)


def _layout_of(part: Part) -> dict[str, Any]:
    return {"bytes": part["bytes"], "tensors": part["tensors"]}


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _room(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
