"""Fully qualified names as the user's own module knows them, whatever wraps it.

An Entry is one key of the unwrapped model's `state_dict()` that holds a parameter or buffer, with the dictionary slot
that the live tensor is read from. Slots, not tensors, are kept: `.to()`, re-assigned buffers and re-registered
parameters change the tensor in the slot. A Tree remembers which module is where, so that replacing one is noticed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
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
        names = _FABRIC[:1] if is_fabric(module) else _WRAPPED
        inner = next((module._modules[name] for name in names if module._modules.get(name) is not None), None)
        if inner is None:
            return
        module = inner


def is_fabric(module: nn.Module) -> bool:
    """Whether it is what `Fabric.setup` makes of a module."""
    # By name: nothing here imports Lightning, which may be installed as `lightning` or as `lightning_fabric`.
    return type(module).__name__ == "_FabricModule" and all(name in module._modules for name in _FABRIC)


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside any number of wrappers."""
    return list(wrappers(module))[-1]


def clean(key: str) -> str:
    """A key of a wrapped module's `state_dict()` as the user's own module has it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPED)


def walk(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under its clean prefix ("" or "a.b."), without wrappers; shared ones under each of their names."""
    found = []
    rest = [("", module)]
    while rest:
        prefix, module = rest.pop()
        if module._modules:  # a wrapper has a child
            module = unwrap(module)
            children = reversed(module._modules.items())
            rest.extend((f"{prefix}{name}.", child) for name, child in children if child is not None)
        found.append((prefix, module))
    return found


def entries(model: nn.Module) -> list[Entry]:
    """Every parameter and persistent buffer, in `state_dict()` order; tied ones under each of their names."""
    found = []
    for prefix, module in walk(model):
        slot: dict[str, Any] = module._parameters
        for key, tensor in slot.items():
            if tensor is not None:
                found.append(Entry(prefix + key, slot, key, is_buffer=False))
        slot = module._buffers
        for key, tensor in slot.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                found.append(Entry(prefix + key, slot, key, is_buffer=True))
    return found


@contextmanager
def collector_paused() -> Iterator[None]:
    """While many small objects are made that stay: Python's collector would look through all of them time and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
    """Which module is where below a model, remembered, so that a module replaced, added or removed is noticed.

    So is a hook before the forward of the outermost one, for it may be somebody's who has taken the model over.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = {id(model): model}
        rest = [model]
        while rest:
            for child in rest.pop()._modules.values():
                if child is not None and id(child) not in modules:
                    modules[id(child)] = child
                    rest.append(child)
        parents = [module._modules for module in modules.values() if module._modules]
        self._dicts: list[dict[Any, Any]] = []
        for module in modules.values():
            self._dicts += (module._modules, module._parameters, module._buffers)
        # DeepSpeed's stage 0 takes a module over and leaves no other trace of it.
        self._dicts += (module._forward_pre_hooks for module in wrappers(model))
        self._sizes = list(map(len, self._dicts))
        places = [(children, key, child) for children in parents for key, child in children.items()]
        # A buffer registered as None and set by the first forward is a new key of `state_dict()`.
        for slots in self._dicts:
            places += ((slots, key, None) for key, value in slots.items() if value is None)
        self._slots = [slots for slots, _, _ in places]
        self._keys = [key for _, key, _ in places]
        self._values = [value for _, _, value in places]

    def unchanged(self) -> bool:
        """Local and cheap, loops that run in C: it is asked at every update."""
        return list(map(len, self._dicts)) == self._sizes and all(
            map(is_, map(dict.get, self._slots, self._keys), self._values)
        )


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules that define `get_extra_state` add to `state_dict()`, under the keys it has there."""
    return {
        f"{prefix}_extra_state": module.get_extra_state()
        for prefix, module in walk(model)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
