"""What of a State outlives the process, or comes from elsewhere.

    save, async_save, load          a folder of its own
    state_dict, load_state_dict     a part of the user's own checkpoint
    load_full, take_from            values that are in memory already

Whatever comes in is a Loading until every value of it is there; then the State takes it over at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..averages.arguments import MANIFEST_KEY
from ..averages.state import State
from ..errors import CheckpointError, LayoutChangedError
from ..ranks import all_or_none, gloo_twin
from ..shard import take
from .fit import LoadResult, compare
from .folder import Path, PendingSave, everyone, load_folder, read_manifest, save_folder, save_folder_async
from .items import Incoming, buffers_of, describe, items_of
from .loading import Loading
from .manifest import BESIDE_KEY, Manifest


class Checkpoints:
    """The saved forms of one State. Each method is `ShardedAverage`'s of that name."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._incoming: Incoming | None = None  # where what is read into the last `state_dict()` goes
        self._pending: PendingSave | None = None
        self._carrier: dist.ProcessGroup | None = None

    def manifest(self) -> Manifest:
        """What a save at this moment would say about itself. Local."""
        return describe(self._state)

    def save(self, path: Path, *, with_buffers: bool) -> None:
        """Collective: all ranks must call."""
        group = self._quiet_group()
        with all_or_none(group, "collecting what is saved"):
            state = self.state_dict()
            if with_buffers:
                state[BESIDE_KEY] = buffers_of(self._state.members)
        save_folder(path, state, self.manifest(), group)

    def async_save(self, path: Path) -> PendingSave:
        """Collective: all ranks must call."""
        group = self._quiet_group()
        if self._carrier is None and group is not None:
            self._carrier = gloo_twin(group)
        with all_or_none(group, "collecting what is saved"):
            state = self.state_dict()
        self._pending = save_folder_async(path, state, self.manifest(), group, self._carrier)
        return self._pending

    def _quiet_group(self) -> dist.ProcessGroup | None:
        """Collective: all ranks must call. The ranks that save together, once nothing is on its way any more."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return everyone(self._state.group)

    @torch.no_grad()
    def load(self, path: Path, *, strict: bool) -> LoadResult:
        """Collective: all ranks must call."""
        self._state.refuse_while_swapped("load()")
        group = everyone(self._state.group)
        folder, manifest = read_manifest(path, group)
        result = self._fit(manifest, strict)
        with all_or_none(group, "making room for the averages to load"):
            loading = Loading(self._state, manifest, result)
            state: dict[str, Any] = {MANIFEST_KEY: "", **loading.items()}
        load_folder(folder, state, group)
        if Manifest.from_json(state[MANIFEST_KEY]) != manifest:
            raise CheckpointError(f"{folder!r} is torn: its manifest is of another save. Nothing was changed")
        loading.take_over()
        return result

    @torch.no_grad()
    def load_full(self, full: Mapping[str, Mapping[str, Tensor]], manifest: Manifest, *, strict: bool) -> LoadResult:
        """Local."""
        self._state.refuse_while_swapped("load_full()")
        loading = Loading(self._state, manifest, result := self._fit(manifest, strict))
        loading.fill(lambda name, shard: take(full[name][shard.name], shard.region))
        loading.take_over()
        return result

    @torch.no_grad()
    def take_from(self, other: State) -> None:
        """Collective: all ranks must call."""
        self._state.refuse_while_swapped("take_from()")
        with all_or_none(self._state.group, "taking averages over from another object"):
            _refuse_other_cuts(self._state, other)
            manifest = describe(other)
            loading = Loading(self._state, manifest, self._fit(manifest, strict=False))
            loading.fill(lambda name, shard: other.store.view(name, shard.name))
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
        kept = self._state
        kept.look()
        self._incoming = Incoming(kept)
        state: dict[str, Any] = {MANIFEST_KEY: self.manifest().to_json()}
        for name, history in kept.histories.items():
            present = partial(kept.average_of, name) if history.n_averaged else None
            state[name] = items_of(name, kept.members, self._incoming, present=present)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Local."""
        incoming, self._incoming = self._incoming, None
        self._state.refuse_while_swapped("load_state_dict()")
        manifest = Manifest.from_json(state_dict.get(MANIFEST_KEY))
        loading = Loading(self._state, manifest, self._fit(manifest, strict=True), incoming)
        unread = [
            f"{name}.{key}"
            for name in loading.started
            for key in manifest.tensors
            if not getattr(state_dict.get(name, {}).get(key), "is_read", False)
        ]
        if unread or incoming is None:
            raise CheckpointError(
                f"{unread or 'these values'} were not read: call state_dict(), pass what it returns through "
                "torch.distributed.checkpoint.load, and then to load_state_dict(); or call load(path)"
            )
        loading.take_over()


def _refuse_other_cuts(mine: State, other: State) -> None:
    theirs = {shard.name: shard for shard in other.members.averaged}
    for shard in mine.members.averaged:
        was = theirs.get(shard.name, shard)
        if was.shape == shard.shape and was.region != shard.region:  # of another shape, it is left out
            raise LayoutChangedError(
                f"{shard.name!r} is cut into {shard.region} here and was {was.region}: save() the old average and "
                "load(path, strict=False) it into this one"
            )


def _refuse_fabric() -> None:
    """`Fabric.save` asks every rank for a state, and then pickles rank 0's: it must be told before the ranks part."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("sharded_avg."):
        frame = frame.f_back
    caller = frame.f_globals.get("__name__", "") if frame is not None else ""
    if caller.startswith(("lightning.fabric.", "lightning_fabric.")):
        raise CheckpointError(
            "Fabric.save writes what rank 0 has into one file, and a sharded average has pieces on every rank: leave "
            "the average out of the state, and call average.save(folder) beside fabric.save(path, state), and "
            "average.load(folder) beside fabric.load(path, state), on all ranks"
        )
