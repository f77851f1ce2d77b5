"""What of a State outlives the process, or comes from elsewhere.

    save, async_save, load          a folder of its own
    state_dict, load_state_dict     a part of the user's own checkpoint
    load_full, take_from            values that are in memory already

Whatever comes in is a Loading until every value of it is there; then the State takes it over at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..averages.arguments import MANIFEST_KEY
from ..averages.state import State
from ..errors import CheckpointError, ConfigError, LayoutChangedError
from ..ranks import Asked, all_or_none, collective, decided, everyone, gather_objects, size_of
from ..shard import take
from ..weights.names import collector_paused
from .fit import LoadResult, compare
from .folder.place import place_of
from .folder.saving import Part, Path, PendingSave, save_folder, save_folder_async
from .items import CarriedError, Incoming, beside_of, describe, extra_of, items_of, pieces_of, rounded, snapshot_items
from .loading import Loading
from .manifest import Manifest
from .opening import Found, find


class Checkpoints:
    """The saved forms of one State. Each method is `ShardedAverage`'s of that name."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._incoming: Incoming | None = None  # where what is read into the last `state_dict()` goes
        self._pending: PendingSave | None = None

    def manifest(self) -> Manifest:
        """What a save at this moment would say about itself. Local."""
        return describe(self._state)

    @collective
    def save(self, path: Path, *, with_buffers: bool) -> None:
        """Collective: all ranks must call."""
        self._ask(f"save(with_buffers={with_buffers!r})")
        self._end_pending()
        collect = partial(self._part, with_buffers=with_buffers)
        with collector_paused():
            save_folder(path, collect, everyone(self._state.group), connected=self._state.group is not None)

    @collective
    def async_save(self, path: Path, dtype: torch.dtype | None = None) -> PendingSave:
        """Collective: all ranks must call."""
        self._ask(f"async_save(dtype={dtype!r})")
        self._end_pending()
        group = everyone(self._state.group)
        self._pending = save_folder_async(
            path, partial(self._part, dtype=dtype), group, connected=self._state.group is not None
        )
        return self._pending

    def _ask(self, call: str) -> None:
        """Collective: all ranks must call. For the same, and of one model the same parts, or tensors have gaps."""
        with all_or_none(self._state.group, "saving") as part:
            self._state.look()
            part.asked = Asked(call, *self._state.members.digests)

    def _end_pending(self) -> None:
        """Collective: all ranks must call. Nothing is on its way any more."""
        pending = self._pending
        if pending is not None:
            pending.wait()
            self._pending = None
            pending.result()

    def _part(self, *, with_buffers: bool = False, dtype: torch.dtype | None = None) -> Part:
        self._state.look(live=with_buffers)
        manifest = self.manifest()
        extra = extra_of(self._state.members, strictly=with_buffers)
        pieces = list(pieces_of(self._state))
        if with_buffers:
            pieces += beside_of(self._state.members)
        if dtype is not None:
            manifest, pieces = rounded(manifest, pieces, dtype)
        return Part(replace(manifest, extra=extra), pieces)

    @collective
    @torch.no_grad()
    def load(self, path: Path, *, strict: bool) -> LoadResult:
        """Collective: all ranks must call."""
        state, group, doing = self._state, everyone(self._state.group), f"loading {path!r}"
        with all_or_none(state.group, doing) as part:
            state.members.refresh()
            part.asked = Asked(f"load(strict={strict!r})", *state.members.digests)
        mine: list[Manifest] = []

        def ask() -> tuple[str, bytes]:
            state.refuse_while_swapped("load()")
            state.members.refresh()
            mine.append(self.manifest())
            place = place_of(path)
            return place.path if state.group is not None else place.identity, mine[0].digest()

        def look(asked: list[tuple[str, bytes]]) -> tuple[Found | None, bool]:
            paths = [path for path, _ in asked]
            if len(set(paths)) > 1 and state.group is not None:
                raise ConfigError(f"path: ranks that hold one model together load different folders, {paths}")
            alike = all(names == asked[0][1] for _, names in asked)
            return (find(path), alike) if len(set(paths)) == 1 else (None, True)

        found, alike = decided(group, ask, look, doing)
        known = set() if alike else set().union(*gather_objects(group, set(mine[0].tensors), doing))
        with all_or_none(group, doing), collector_paused():
            found = find(path) if found is None else found  # a model of this rank's own
            manifest = Manifest.from_json(found.text)
            folder = found.opened()
            result = compare(manifest, mine[0], known)
            if strict:
                result.require_all(whole=_spans_the_job(group))
            loading = Loading(state, manifest, result)
            loading.read(folder)
        loading.take_over()
        return result

    @torch.no_grad()
    def load_full(self, full: Mapping[str, Mapping[str, Tensor]], manifest: Manifest, *, strict: bool) -> LoadResult:
        """Local."""
        self._state.refuse_while_swapped("load_full()")
        loading = Loading(self._state, manifest, result := self._fit(manifest, strict))
        loading.fill(lambda column, shard: take(full[column][shard.name], shard.region), full.keys())
        loading.take_over()
        return result

    @collective
    @torch.no_grad()
    def take_from(self, get_other: Callable[[], State]) -> None:
        """Collective: all ranks must call."""
        with all_or_none(self._state.group, "taking averages over from another object") as part:
            self._state.refuse_while_swapped("take_from()")
            other = get_other()
            self._state.members.refresh()
            part.asked = Asked(other.asks("take_from()").text, *self._state.members.digests)
            _refuse_other_cuts(self._state, other)
            manifest = describe(other)
            loading = Loading(self._state, manifest, self._fit(manifest, strict=False))
            loading.fill_from(other.store)
        loading.take_over()

    def _fit(self, manifest: Manifest, strict: bool) -> LoadResult:
        self._state.members.refresh()
        result = compare(manifest, self.manifest())
        if strict:
            result.require_all()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Local."""
        _refuse_fabric()
        try:
            return self._items()
        except BaseException as failure:
            if size_of(everyone(None)) == 1 or not _caller().startswith("torch.distributed.checkpoint."):
                raise
            return CarriedError(failure)

    def _items(self) -> dict[str, Any]:
        kept = self._state
        kept.look()
        self._incoming = Incoming(kept)
        manifest = replace(self.manifest(), extra=extra_of(kept.members, strictly=False))
        state: dict[str, Any] = {MANIFEST_KEY: manifest.to_json()}
        for name, history in kept.histories.items():
            present = partial(kept.average_of, name) if history.n_averaged else None
            state[name] = items_of(name, kept.members, self._incoming, present=present)
        state |= snapshot_items(kept, self._incoming)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Local."""
        incoming, self._incoming = self._incoming, None
        self._state.refuse_while_swapped("load_state_dict()")
        manifest = Manifest.from_json(state_dict.get(MANIFEST_KEY))
        started = [name for name, a in manifest.averages.items() if name in self._state.rules and a.n_averaged]

        def is_read(key: str) -> bool:
            return all(getattr(state_dict.get(name, {}).get(key), "is_read", False) for name in started)

        # One rank's manifest is in the checkpoint: others may have saved other parts of the model, which DCP has found.
        mine = self.manifest().tensors
        elsewhere = {name: record for name, record in mine.items() if name not in manifest.tensors and is_read(name)}
        kept = {n: r for n, r in manifest.tensors.items() if n in mine or _spans_the_job(self._state.group)}
        manifest = replace(manifest, tensors={**kept, **elsewhere})
        loading = Loading(self._state, manifest, self._fit(manifest, strict=True), incoming)
        unread = [key for key in manifest.tensors if not is_read(key)]
        if unread or incoming is None:
            raise CheckpointError(
                f"{unread or 'these values'} were not read: call state_dict(), pass what it returns through "
                "torch.distributed.checkpoint.load, and then to load_state_dict(); or call load(path)"
            )
        loading.take_over()


def _spans_the_job(group: dist.ProcessGroup | None) -> bool:
    """Whether there is no rank that may hold another part of the model."""
    return not dist.is_initialized() or (group is not None and size_of(group) == dist.get_world_size())


def _refuse_other_cuts(mine: State, other: State) -> None:
    theirs = {shard.name: shard for shard in other.members.averaged}
    for shard in mine.members.averaged:
        was = theirs.get(shard.name, shard)
        if was.shape == shard.shape and was.region != shard.region:  # of another shape, it is left out
            raise LayoutChangedError(
                f"{shard.name!r} is cut into {shard.region} here and was {was.region}: save() the old average and "
                "load(path, strict=False) it into this one"
            )


def _caller() -> str:
    """The module outside of this package that has called."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("sharded_avg."):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")) if frame is not None else ""


def _refuse_fabric() -> None:
    """`Fabric.save` asks every rank for a state, and then pickles rank 0's: it must be told before the ranks part."""
    caller = _caller()
    if caller.startswith(("lightning.fabric.", "lightning_fabric.")):
        raise CheckpointError(
            "Fabric.save writes what rank 0 has into one file, and a sharded average has pieces on every rank: leave "
            "the average out of the state, and call average.save(folder) beside fabric.save(path, state), and "
            "average.load(folder) beside fabric.load(path, state), on all ranks"
        )
