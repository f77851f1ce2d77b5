"""Which shards are averaged, and whether they are still the live ones.

    all        one Shard for every parameter and persistent buffer of the model
    averaged   those that the averages cover; it grows when a parameter is unfrozen
    waiting    names chosen since: they join at the next update
    lost       averaged names that the model lacks now, or has in another shape or cut: what is averaged goes on without
               them only where it is saved or handed out

A Shard has the name that `state_dict()` gives it, which is the model's own unless a hook renames it (state_dicts.py).
Every decision here follows from names, full shapes and `requires_grad`, so all ranks decide alike.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, LayoutChangedError, UnsupportedModelError
from ..shard import Shard
from ..tensors import overlapping, overlaps_itself
from . import names
from .buffers import BufferPolicy, left_live
from .layouts.base import AbstractLayout
from .layouts.detect import layout_class
from .state_dicts import find_keys, is_rewritten, place, state_dict_with, with_attributes

Include = Callable[[str, Tensor], bool]

_REBUILD = (
    "Build a new ShardedAverage from the model as it is now, and go on with what is left of this one: "
    "new.take_from(old) where what both have is cut alike, and otherwise old.save(path), new.load(path, strict=False)."
)


class Members:
    """The shards of one model: parameters as chosen by `include`, buffers by `buffers`."""

    @names.collector_paused()
    def __init__(
        self,
        model: nn.Module,
        layout: AbstractLayout,
        include: Include | None,
        *,
        buffers: BufferPolicy,
    ) -> None:
        if include is not None and not callable(include):
            raise ConfigError(f"include={include!r}: must be a callable (name, tensor) -> bool, or None")
        self._model, self._include, self._averages_buffer = model, include, buffers
        self.layout = layout
        self._tree = names.Tree(model)
        self.stale = ""  # why the live tensors cannot be read any more
        self.lost: dict[str, str] = {}  # averaged name -> what became of it
        self.waiting: list[str] = []
        self.moved: dict[str, str] = {}  # averaged name -> its name now; cleared by who holds values by name
        self.keyless: frozenset[str] = frozenset()  # names that `state_dict()` has no key for
        self._extra_keys: tuple[str, ...] | None = None
        self._digests: tuple[int, int] = (0, 0)
        self._digested: list[Shard] | None = None  # of which `averaged`
        self._first: dict[str, str] = {}  # a Shard's own name -> what `state_dict()` calls it; see `_find_keys`
        self.layout.release()
        shards = self.layout.shards()
        chosen = self._choose(shards)
        self._refuse_nothing(shards, chosen)
        self._names = dict.fromkeys(chosen)  # an ordered set of own names
        _refuse_shared_memory([shard for shard in shards if shard.name in self._names])
        self.layout.adopt(chosen)
        self._take(self.layout.shards() if self.layout.publishes else shards)  # only what is published was divided

    def _take(self, shards: list[Shard]) -> None:
        """These are the live shards now, under their own names, and none of the averaged ones is lost."""
        averaged = [shard for shard in shards if shard.name in self._names]
        for shard in averaged:
            if overlaps_itself(shard.tensor):
                raise UnsupportedModelError(
                    f"{shard.name!r} of shape {tuple(shard.shape)} has strides {shard.tensor.stride()}: several of its "
                    "elements are one place in memory (it was expanded, say), so it cannot be exchanged with its "
                    "average. Make it a parameter of its own memory with .contiguous(), or leave it out by include="
                )
        self._held = {shard.name: shard for shard in averaged}
        self._cuts = {shard.name: (shard.shape, shard.region) for shard in averaged}
        self.lost = {}
        self._name(shards, averaged)

    def _name(self, shards: list[Shard], averaged: list[Shard]) -> None:
        """Set `all` and `averaged`, under the names that `state_dict()` gives them."""
        self._own_aliases = dict(self.layout.aliases)
        self.keyless, self._extra_keys = frozenset[str](), None
        first, self.aliases = self._find_keys(shards)
        if first:
            shards = [replace(shard, name=first.get(shard.name, shard.name)) for shard in shards]
            averaged = [replace(shard, name=first.get(shard.name, shard.name)) for shard in averaged]
        self._first, self.all, self.averaged = first, shards, averaged

    def _find_keys(self, shards: list[Shard]) -> tuple[dict[str, str], Mapping[str, str]]:
        """Own name -> first name in `state_dict()`, where that is another; and further names of tied tensors."""
        own_aliases, model = self.layout.aliases, self.layout.model
        if not is_rewritten(model):
            return {}, own_aliases
        shapes = {shard.name: shard.shape for shard in shards if shard.name not in self._names}
        kept = {name: live for name, live in with_attributes(model).items() if shapes.get(name) == live.shape}
        try:
            keys = find_keys(model, shards, own_aliases, self.layout.state_keys(), kept)
        except Exception as error:
            warnings.warn(
                f"state_dict() of {type(model).__name__} cannot be asked for its keys without values ({error!r}), so "
                "averages are saved under the parameters' own names",
                stacklevel=6,
            )
            return {}, own_aliases
        # What `state_dict()` has no key for, a load does not ask for; but a tensor made anew may have been made of it.
        self.keyless, self._extra_keys = frozenset() if keys.made else frozenset(keys.absent), keys.extra
        lacking = [name for name in keys.absent if name in self._names]
        if lacking and keys.made:
            warnings.warn(
                f"state_dict() of {type(model).__name__} makes {list(keys.made)} anew and has no {lacking}: full "
                "states are handed out with the former, but averages are saved with the latter, under the parameters' "
                "own names",
                stacklevel=6,
            )
        return dict(keys.first), keys.aliases

    @property
    def digests(self) -> tuple[int, int]:
        """Of names and full shapes: of all that there is, and of what is averaged. Equal on ranks that agree."""
        if self._digested is not self.averaged:
            self._digests = _digest(self.all), _digest(self.averaged)
            self._digested = self.averaged
        return self._digests

    def key_of(self, own: str) -> str:
        """The name of the Shard of what the model itself calls `own`; `own` where there is none."""
        own = self._own_aliases.get(own, own)
        return self._first.get(own, own)

    def _choose(self, shards: list[Shard]) -> list[str]:
        further: dict[str, list[str]] = {}
        for alias, name in self.layout.aliases.items():
            further.setdefault(name, []).append(alias)
        left = left_live(self.layout.model)
        chosen = []
        for shard in shards:
            if not shard.shape.numel():
                continue
            if self._include is None and not shard.is_buffer:
                wanted = shard.trainable
            else:
                all_names = [shard.name, *further.get(shard.name, ())]
                can_average = shard.dtype.is_floating_point or shard.dtype.is_complex
                choose: Include = self._averages_buffer if shard.is_buffer or self._include is None else self._include
                wanted = not shard.is_buffer or (can_average and left.isdisjoint(all_names))
                wanted = wanted and any(bool(choose(name, shard.stand_in())) for name in all_names)
                if wanted and not can_average:
                    raise ConfigError(
                        f"include chose {shard.name!r}, whose dtype {shard.dtype} has no average; leave it out, and "
                        "full states will take it from the live model"
                    )
            if wanted:
                chosen.append(shard.name)
        return chosen

    def _refuse_nothing(self, shards: list[Shard], chosen: list[str]) -> None:
        parameters = [shard.name for shard in shards if not shard.is_buffer]
        if not parameters:
            raise UnsupportedModelError(f"{type(self._model).__name__} has no parameters: there is nothing to average")
        if set(parameters).isdisjoint(chosen):
            which = "include matched none" if self._include is not None else "none require grad: all are frozen"
            raise ConfigError(
                f"nothing to average: of {len(parameters)} parameters ({parameters[0]!r}, ...) {which}. Pass "
                "include=lambda name, tensor: ... that returns True for some"
            )

    def refresh(self) -> None:
        """Re-read the live tensors if they have moved. Raises `LayoutChangedError` if averaged ones are lost."""
        self.look()
        if self.stale:
            raise LayoutChangedError(f"{self.stale}. {_REBUILD}")
        for name, fate in self.lost.items():
            more = f" ({len(self.lost) - 1} more are lost, too)" if len(self.lost) > 1 else ""
            raise LayoutChangedError(
                f"parameter {name!r} {fate}{more}: the model was wrapped, re-sharded or changed afterwards. {_REBUILD}"
            )

    def look(self, *, live: bool = False) -> None:
        """Re-read the live tensors if they have moved; what of the averaged ones is lost is noted.

        If the model cannot be read any more, as it was wrapped, then `stale` says why, and the last shards stay: what
        they say about the averages is still true. With `live`, that is a `LayoutChangedError`.
        """
        if not self.layout.is_current() or not self._tree.unchanged():
            self.stale, shards = self._read()
            if not self.stale:
                self._sort_out(shards)
        if self.stale and live:
            raise LayoutChangedError(f"{self.stale}. {_REBUILD}")

    def _read(self) -> tuple[str, list[Shard]]:
        """What is wrong, if anything, and the live shards."""
        try:
            now, then = layout_class(self._model), type(self.layout)
        except UnsupportedModelError as error:
            return f"the model was wrapped after its average was built: {error}", []
        if now is not then:
            built = f"the average was built for {then.__name__} and the model is now one for {now.__name__}"
            return f"{built}: it was wrapped afterwards", []
        try:
            self.layout.release()
            return "", self.layout.shards()
        except UnsupportedModelError as error:
            return f"the model has changed since the average was built: {error}", []

    @names.collector_paused()
    def _sort_out(self, shards: list[Shard]) -> None:
        """Of shards read anew: which averaged ones are still there, which are lost, and which are new."""
        now = {shard.name: shard for shard in shards}
        followed = list(self._follow_ties(now))
        lost, averaged = {}, []
        for name, then in self._cuts.items():
            shard = now.get(name)
            cut = "gone" if shard is None else (shard.shape, shard.region)
            if cut != then:
                lost[name] = f"was {then} when the average was built and is {cut}"
            # The last Shard and not this one: the values that are kept have its region and its dtype.
            if shard is not None and shard.shape == then[0]:
                averaged.append(self._held[name])
        if lost:
            self._name(shards, averaged)
        else:
            self._take(shards)
        self.lost = lost
        self.moved |= {then: self._first.get(name, name) for then, name in followed}
        self._tree = names.Tree(self._model)
        self.waiting = [name for name in self._choose(shards) if name not in self._names]

    def _follow_ties(self, now: Mapping[str, Shard]) -> Iterator[tuple[str, str]]:
        """A tied tensor whose first name has gone is still there under another, and so is its average.

        Yields the name that the average had, and the model's own name for it now.
        """
        for alias, name in self._own_aliases.items():
            if name in self._cuts and name not in now and alias in now and alias not in self._names:
                self._names = {alias if kept == name else kept: None for kept in self._names}
                self._cuts[alias] = self._cuts.pop(name)
                self._held[alias] = replace(self._held.pop(name), name=alias)
                yield self._first.get(name, name), alias

    def admit(self) -> bool:
        """Let the waiting parameters join; whether there were any."""
        if not self.waiting:
            return False
        self._before = (self._names, self.waiting, self.all, self.averaged, self._cuts, self._held)
        self._names = {**self._names, **dict.fromkeys(self.waiting)}
        self.layout.adopt(self.waiting)
        self.waiting = []
        try:
            self._take(self.layout.shards())
        except BaseException:
            self.dismiss()
            raise
        return True

    def dismiss(self) -> None:
        """Undo the last `admit`: there was no room for the newcomers. They wait again."""
        self._names, self.waiting, self.all, self.averaged, self._cuts, self._held = self._before

    def extra_state(self) -> dict[str, Any]:
        """What `get_extra_state` of the modules gives, under the keys that `state_dict()` has it under. Local."""
        own = self.layout.extra_state()
        keys = self._extra_keys
        return own if keys is None or len(keys) != len(own) else dict(zip(keys, own.values(), strict=True))

    def state(self, full: Mapping[str, Tensor]) -> dict[str, Any]:
        """`state_dict()` of the unwrapped model with these full tensors, which are by the names of `all`. Local."""
        aliases, model = self.layout.aliases, self.layout.model
        by_name: dict[str, Any] = {}
        for key in self.layout.state_keys():
            own = aliases.get(key, key)
            by_name[key] = full[self._first.get(own, own)]
        if not is_rewritten(model):
            return {**by_name, **self.layout.extra_state()}
        shown, found = dict(by_name), {}
        for entry in names.entries(model):
            if entry.name in by_name:
                found[place(entry.tensor)] = by_name[entry.name]  # a hook may hold on to the live one
        for name, live in with_attributes(model).items():
            if name in by_name and aliases.get(name, name) not in self._names and live.shape == by_name[name].shape:
                shown[name] = live
        found |= {place(tensor): tensor for tensor in by_name.values()}
        return {key: found.get(place(value), value) for key, value in state_dict_with(model, shown).items()}


def _digest(shards: list[Shard]) -> int:
    return zlib.crc32("\0".join(f"{shard.name} {tuple(shard.shape)}" for shard in shards).encode())


def _refuse_shared_memory(shards: list[Shard]) -> None:
    pair = overlapping([shard.tensor for shard in shards])
    if pair is not None:
        left, right = (shards[index].name for index in pair)
        raise UnsupportedModelError(
            f"{left!r} and {right!r} share a part of their memory, so each exchange of the one with its average would "
            "change the other: make them one parameter, or give one of them memory of its own with .clone()"
        )
