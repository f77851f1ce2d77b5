"""Which weights are in the model, in autograd's own terms: the version counters of its parameters.

A graph remembers the version of each parameter that it saved, and its backward raises if that is another by then. In a
swap the parameters have a version of their own, and afterwards the one that they had, for the values are back bit for
bit. So a backward after the swap of a graph from before it works, and one on the other side of a swap's end raises
instead of computing with the wrong weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_APART = 1 << 30  # more steps than anyone takes: no version outside is one inside


class Versions:
    """The counters of a model's parameters, before a swap and in it."""

    def __init__(self, model: nn.Module) -> None:
        found = [parameter for module in model.modules() for parameter in module._parameters.values()]
        self._counted = [parameter for parameter in found if parameter is not None and not parameter.is_inference()]
        self._before = [parameter._version for parameter in self._counted]
        self._inside = [version % _APART + _APART for version in self._before]
        self._written: set[int] = set()

    def enter(self) -> None:
        """Averages are in the model now."""
        _set(self._counted, self._inside)

    def written(self) -> list[Tensor]:
        """The parameters that somebody has written to since `enter`, but for `.data`; to be called before `leave`."""
        pairs = zip(self._counted, self._inside, strict=True)
        written: list[Tensor] = [parameter for parameter, version in pairs if parameter._version != version]
        self._written = set(map(id, written))
        return written

    def leave(self) -> None:
        """The raw weights are back. What was written to keeps its version: it may be a weight that was not swapped."""
        if not self._written:
            _set(self._counted, self._before)
            return
        pairs = zip(self._counted, self._before, strict=True)
        kept = [(parameter, version) for parameter, version in pairs if id(parameter) not in self._written]
        _set([parameter for parameter, _ in kept], [version for _, version in kept])


def _set(parameters: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Private to torch, as is the context manager for FSDP that it was made for: there is no other way."""
    if parameters:
        torch._C._autograd._unsafe_set_version_counter(tuple(parameters), tuple(versions))
