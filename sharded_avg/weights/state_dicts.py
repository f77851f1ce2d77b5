"""What the user's own modules make of their state dict: hooks that rename, overrides that leave out or add.

The keys of `model.state_dict()` are names, parent by parent, unless a module says otherwise. Then only `state_dict()`
knows them, and under an engine it cannot be asked: it communicates, or hands out shards. So a Double is asked.

    Double    a copy of the tree of modules, without wrappers and engines' hooks, that shares everything with the model
              but parameters and buffers; those are given: its `state_dict()` is local, and what the model's would be
    stand-in  a fake tensor of a parameter's full shape and dtype: it has an identity to find it by, and no memory
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..shard import Shard
from . import names

_ENGINES = ("torch.distributed.", "deepspeed.")  # whose hooks gather or cut, and change no name
_HOOKS = ("_state_dict_pre_hooks", "_state_dict_hooks")


@dataclass(frozen=True)
class Keys:
    """Where `state_dict()` has the tensors of a model."""

    first: Mapping[str, str] = field(default_factory=dict)  # a Shard's name -> the first of its keys, if it is another
    aliases: Mapping[str, str] = field(default_factory=dict)  # its further keys -> the first
    absent: tuple[str, ...] = ()  # Shards that have no key of their own: they keep their name
    made: tuple[str, ...] = ()  # keys of tensors that are no parameter or buffer
    extra: tuple[str, ...] | None = (
        None  # keys of what `get_extra_state` gives, in order; `None` as the modules have them
    )


def is_rewritten(model: nn.Module) -> bool:
    """Whether `state_dict()` may have other keys than the names of parameters and buffers. Local."""
    for _, module in names.walk(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        cls, own = type(module), vars(module)
        if cls.state_dict is not nn.Module.state_dict or "state_dict" in own:
            return True
        if cls._save_to_state_dict is not nn.Module._save_to_state_dict:
            return True
        if any(own[kind] and any(map(_is_users, own[kind].values())) for kind in _HOOKS):
            return True
    return False


def _is_users(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return not where.startswith(_ENGINES)


def state_dict_with(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`model.state_dict()` as it would be if its parameters and persistent buffers were `tensors`. Local.

    `tensors` has all of them by name, tied ones under each of their names, in the order of `state_dict()`.
    """
    keys_in: dict[str, list[str]] = {}
    for name in tensors:
        prefix, dot, key = name.rpartition(".")
        keys_in.setdefault(prefix + dot, []).append(key)
    doubles: dict[int, nn.Module] = {}

    def double(module: nn.Module, prefix: str) -> nn.Module:
        module = names.unwrap(module)
        if id(module) in doubles or isinstance(module, torch.jit.ScriptModule):
            return doubles.get(id(module), module)
        copy = doubles[id(module)] = object.__new__(type(module))
        vars(copy).update(vars(module))
        parameters = {key: tensors[prefix + key] for key in keys_in.get(prefix, ()) if key not in module._buffers}
        for key in parameters:
            vars(copy).pop(key, None)  # FSDP1 may keep a view of the flat parameter as a plain attribute
        vars(copy).update(
            _parameters={**{key: None for key, value in module._parameters.items() if value is None}, **parameters},
            _buffers={key: tensors.get(prefix + key, value) for key, value in module._buffers.items()},
            _modules={
                key: None if child is None else double(child, f"{prefix}{key}.")
                for key, child in module._modules.items()
            },
        )
        return copy

    root = double(model, "")
    for copy in doubles.values():
        for kind in _HOOKS:
            hooks = vars(copy)[kind].items()
            vars(copy)[kind] = OrderedDict((key, _rebound(hook, doubles)) for key, hook in hooks if _is_users(hook))
        if "state_dict" in vars(copy):
            vars(copy)["state_dict"] = _rebound(vars(copy)["state_dict"], doubles)
    return dict(root.state_dict())


def _rebound(function: Any, doubles: Mapping[int, nn.Module]) -> Any:
    """A hook that is bound to a module of the model, bound to its double."""
    if isinstance(function, partial):
        args = [doubles.get(id(value), value) for value in function.args]
        return partial(_rebound(function.func, doubles), *args, **function.keywords)
    if isinstance(function, MethodType) and id(function.__self__) in doubles:
        return MethodType(function.__func__, doubles[id(function.__self__)])
    return function


def with_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Live tensors of a class of their own, which hooks may ask for more than values: quantised weights, say."""
    live = {entry.name: entry.tensor for entry in names.entries(model)}
    plain = (Tensor, nn.Parameter)
    return {name: t for name, t in live.items() if type(t) not in plain and not _is_wrapper(t)}


def _is_wrapper(tensor: Any) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def place(value: Any) -> object:
    """What a tensor and its `detach()` have in common, and no other."""
    if not isinstance(value, Tensor) or _is_wrapper(value) or value.layout != torch.strided:
        return id(value)
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride()


def find_keys(
    model: nn.Module,
    shards: Sequence[Shard],
    aliases: Mapping[str, str],
    order: Sequence[str],
    kept: Mapping[str, Tensor],
) -> Keys:
    """Where `state_dict()` has the tensors of these Shards, asked with stand-ins. Raises whatever a hook raises.

    `order`: the names of all parameters and persistent buffers; `aliases`: further names of tied ones; `kept`: live
    tensors that hooks are shown themselves.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, list[str]] = {shard.name: [] for shard in shards}
    made, extra = [], []
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {shard.name: torch.empty(shard.shape, dtype=shard.dtype) for shard in shards} | dict(kept)
        name_at = {place(fake): name for name, fake in fakes.items()}
        state = state_dict_with(model, {name: fakes[aliases.get(name, name)] for name in order})
        for key, value in state.items():
            if key.rpartition(".")[2] == "_extra_state":
                extra.append(key)
            elif isinstance(value, Tensor):
                own = aliases.get(key, key)  # a copy, in another dtype perhaps, is known by its name
                same = own in fakes and fakes[own].shape == value.shape
                name = name_at.get(place(value), own if same else None)
                made.append(key) if name is None else found[name].append(key)
    absent = tuple(name for name, keys in found.items() if not keys)
    main = {name: name if name in keys or not keys else keys[0] for name, keys in found.items()}
    if len(set(main.values())) < len(main):  # one tensor under the name of another that is left out
        return Keys(aliases=aliases, absent=absent, made=tuple(state), extra=tuple(extra))
    further = {key: main[name] for name, keys in found.items() for key in keys if key != main[name]}
    return Keys({name: key for name, key in main.items() if key != name}, further, absent, tuple(made), tuple(extra))
