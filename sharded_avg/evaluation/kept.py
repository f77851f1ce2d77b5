"""What a block changes of a model, and puts back on leaving: buffers, and attributes of modules.

Values are copied into the tensors that are live then, so optimizers, DDP and compiled graphs go on seeing the tensors
they know. Keeping and putting back are local.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..errors import ConfigError

_ATTEMPTS = 3  # at putting one value back


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """A buffer's values before the block, and the dictionary slot that it lives in."""

    slot: dict[str, Any]
    key: str
    values: Tensor

    def put_back(self) -> None:
        live = self.slot.get(self.key)
        if live is None or live.is_inference():
            with torch.inference_mode(False):  # training could not write to a tensor that was made under it
                self.slot[self.key] = self.values.clone()
        elif live.shape == self.values.shape:  # else a cache that was built anew for another size: leave it
            live.copy_(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class _Attribute:
    owner: nn.Module
    name: str
    value: Any

    def put_back(self) -> None:
        setattr(self.owner, self.name, self.value)


class Kept:
    """Values before the block, in the order in which they were kept."""

    def __init__(self) -> None:
        self._things: list[_Buffer | _Attribute] = []

    @torch.no_grad()
    def buffer(self, slot: dict[str, Any], key: str) -> None:
        """Keep a copy of `slot[key]`."""
        self._things.append(_Buffer(slot, key, slot[key].detach().clone()))

    def buffers(self, modules: Iterable[nn.Module]) -> None:
        """Keep copies of the modules' own buffers, where they can be written at all."""
        for module in modules:
            for key, buffer in module._buffers.items():
                if buffer is not None and is_writable(buffer):
                    self.buffer(module._buffers, key)

    def attribute(self, modules: Iterable[nn.Module], name: str) -> None:
        """Keep an attribute of each module."""
        self._things += [_Attribute(module, name, getattr(module, name)) for module in modules]

    def no_sync(self, model: nn.Module) -> None:
        """Keep DDP from sending rank 0's buffers to all ranks at the next forward, which a forward without grad clears.

        Off inside the block, lest rank 0's statistics replace what other ranks have recomputed; as it was afterwards,
        so that training goes on as if there had been no block.
        """
        wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self.attribute(wrappers, "require_forward_param_sync")
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False

    @torch.no_grad()
    def put_back(self) -> None:
        """Put everything back. An error or interruption (Ctrl-C) is raised when all that can be back are."""
        failure: BaseException | None = None
        for thing in self._things:
            for _ in range(_ATTEMPTS):
                try:
                    thing.put_back()
                    break
                except BaseException as error:
                    failure = failure or error
        if failure is not None:
            raise failure


def is_writable(buffer: Tensor) -> bool:
    """Whether there is memory, and no two elements share it (`expand`): what cannot be written, nobody changes."""
    if is_lazy(buffer) or buffer.is_meta or buffer.layout != torch.strided:
        return False
    return all(step or size <= 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True))


def require_module(model: object) -> None:
    """Raise `ConfigError` if `model` has no buffers to keep."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module or a DeepSpeedEngine, not {type(model).__name__}")
