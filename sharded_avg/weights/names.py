"""Fully qualified names as the user's own module knows them, whatever wraps it.

An Entry is one key of the unwrapped model's `state_dict()` that holds a parameter or buffer, with the dictionary slot
that the live tensor is read from. Slots, not tensors, are kept: `.to()`, re-assigned buffers and re-registered
parameters change the tensor in the slot. A Tree remembers which module is where, so that replacing one is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# A wrapper registers the wrapped module as the only child, under one of these names: FSDP1, activation checkpointing
# and offload, torch.compile. DDP's "module" is too common a word to be recognised by name alone.
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# Lightning Fabric's registers two: the model as its strategy wrapped it, and as it was before.
_FABRIC = ("_forward_module", "_original_module")


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter or persistent buffer: `slot[key]` is the live tensor."""

    name: str
    slot: dict[str, Any]
    key: str
    is_buffer: bool

    @property
    def tensor(self) -> Tensor:
        # dict's own lookup: ZeRO-3's slots are a subclass that, after a forward that raised, gathers what it hands out
        # and registers it as an external parameter, which breaks the next forward.
        value: Tensor = dict.__getitem__(self.slot, self.key)
        return value


def wrappers(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what it wraps, down to the user's own, which is the last."""
    while True:
        yield module
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
            continue
        names = _FABRIC[:1] if _is_fabric(module) else _WRAPPED
        inner = next((module._modules[name] for name in names if module._modules.get(name) is not None), None)
        if inner is None:
            return
        module = inner


def without_fabric(model: nn.Module) -> nn.Module:
    """What `Fabric.setup` returned, without Fabric's own wrapper: the model as its strategy wrapped it."""
    return next(module for module in wrappers(model) if not _is_fabric(module))


def _is_fabric(module: nn.Module) -> bool:
    # By name: nothing here imports Lightning, which may be installed as `lightning` or as `lightning_fabric`.
    return type(module).__name__ == "_FabricModule" and all(name in module._modules for name in _FABRIC)


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside any number of wrappers."""
    return list(wrappers(module))[-1]


def clean(key: str) -> str:
    """A key of a wrapped module's `state_dict()` as the user's own module has it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPED)


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under its clean prefix ("" or "a.b."), without wrappers; shared ones under each of their names."""
    module = unwrap(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}{name}.")


def entries(model: nn.Module) -> list[Entry]:
    """Every parameter and persistent buffer, in `state_dict()` order; tied ones under each of their names."""
    found = []
    for prefix, module in walk(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.append(Entry(prefix + key, module._parameters, key, is_buffer=False))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                found.append(Entry(prefix + key, module._buffers, key, is_buffer=True))
    return found


def split_ties(all_entries: list[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """The first entry of each tensor, and a map from every other name to that first name."""
    first: dict[int, str] = {}
    unique, aliases = [], {}
    for entry in all_entries:
        key = id(entry.tensor)
        if key in first:
            aliases[entry.name] = first[key]
        else:
            first[key] = entry.name
            unique.append(entry)
    return unique, aliases


class Tree:
    """Which module is where below a model, remembered, so that a module replaced, added or removed is noticed."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [module._modules for module in modules]
        self._slots: list[dict[str, Any]] = [module._parameters for module in modules]
        self._slots += [module._buffers for module in modules]
        self._sizes = [len(slots) for slots in (*self._children, *self._slots)]
        # A buffer registered as None and set by the first forward is a new key of `state_dict()`.
        self._unset = [(slots, key) for slots in self._slots for key in slots if dict.get(slots, key) is None]
        self._places = [(children, key, child) for children in self._children for key, child in children.items()]

    def unchanged(self) -> bool:
        """Local and cheap: it is asked at every update."""
        return (
            [*map(len, self._children), *map(len, self._slots)] == self._sizes
            and all(children.get(key) is child for children, key, child in self._places)
            and all(dict.get(slots, key) is None for slots, key in self._unset)
        )


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules that define `get_extra_state` add to `state_dict()`, under the keys it has there."""
    return {
        f"{prefix}_extra_state": module.get_extra_state()
        for prefix, module in walk(model)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
