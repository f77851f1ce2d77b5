"""What of a ShardedAverage outlives the process, or comes from elsewhere.

    save, async_save, load          a folder of its own
    state_dict, load_state_dict     a part of the user's own checkpoint
    load_full, take_from            values that are in memory already

The averages themselves (`_store`, `_histories`, `_step`) are replaced all at once, by `_take_over`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .averages.arguments import MANIFEST_KEY
from .averages.history import History
from .averages.store import Store
from .errors import CheckpointError, ConfigError, LayoutChangedError, NotStartedError, SwapError
from .exchange.swap import Pair
from .ranks import all_or_none, gloo_twin
from .rules.base import AbstractRule
from .rules.schedule import WhenFn
from .saved.fit import LoadResult, compare
from .saved.folder import PendingSave, everyone, load_folder, read_manifest, save_folder, save_folder_async
from .saved.items import Incoming, buffers_of, describe, items_of
from .saved.loading import Loading
from .saved.manifest import BESIDE_KEY, Manifest
from .shard import Shard, take
from .weights.members import Members

swapped_models: WeakSet[nn.Module] = WeakSet()  # of any ShardedAverage: a model may have several


class AbstractKeeper:
    """The averages of some members, and how they are kept; `ShardedAverage` adds what training does with them."""

    def __init__(self, rules: dict[str, AbstractRule], schedule: WhenFn, store: Store, members: Members) -> None:
        self._rules, self._schedule, self._store, self._members = rules, schedule, store, members
        self._histories = dict.fromkeys(rules, History())
        self._step = 0
        self._arranged_for: list[Shard] | None = None  # what the members were when the store was arranged
        self._incoming: Incoming | None = None
        self._pending: PendingSave | None = None
        self._carrier: dist.ProcessGroup | None = None
        self._swapped: str | None = None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the model together; `None` where each process holds all of it."""
        return self._members.layout.group

    def save(self, path: str | os.PathLike[str], *, with_buffers: bool = False) -> None:
        """Collective: all ranks must call. Write a torch.distributed.checkpoint folder that any engine can load.

        Each rank writes its own pieces. The folder has its final name only when it is whole; an earlier one at `path`
        is kept until then. A path with `://` goes through fsspec. Before the first update only counters are saved, so
        that a resumed run starts on time. With `with_buffers`, buffers that are not averaged are in the folder, too:
        `load` has no use for them, and `load_averaged_state_dict` hands them out. Raises `CheckpointError` if it
        cannot be written.
        """
        group = self._quiet_group()
        with all_or_none(group, "collecting what is saved"):
            state = self.state_dict()
            if with_buffers:
                state[BESIDE_KEY] = buffers_of(self._members)
        save_folder(path, state, self.manifest(), group)

    def async_save(self, path: str | os.PathLike[str]) -> PendingSave:
        """Collective: all ranks must call. As `save`, but returns once the values are copied to host memory.

        Training, updates and swaps may go on; call `result()` of what is returned, on all ranks, to wait for the
        bytes and give the folder its name. The next save waits for this one. The first call makes a gloo group for
        the traffic.
        """
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
        return everyone(self._members.layout.group)

    @torch.no_grad()
    def load(self, path: str | os.PathLike[str], *, strict: bool = True) -> LoadResult:
        """Collective: all ranks must call. Read what `save` wrote, on any engine and any number of ranks.

        Raises `CheckpointError`, and changes nothing, if averages, names, shapes or dtypes do not fit, or if the
        folder is torn. With `strict=False`, loads what fits and says in the result what it left out: an average that
        is missing stays as it is, a parameter that is missing starts again from its live value.
        """
        self._refuse_while_swapped("load()")
        group = everyone(self._members.layout.group)
        folder, manifest = read_manifest(path, group)
        result = self._fit(manifest, strict)
        with all_or_none(group, "making room for the averages to load"):
            loading = self._loading(manifest, result)
            state: dict[str, Any] = {MANIFEST_KEY: "", **loading.items()}
        load_folder(folder, state, group)
        if Manifest.from_json(state[MANIFEST_KEY]) != manifest:
            raise CheckpointError(f"{folder!r} is torn: its manifest is of another save. Nothing was changed")
        self._take_over(loading)
        return result

    @torch.no_grad()
    def load_full(
        self, full: Mapping[str, Mapping[str, Tensor]], manifest: Manifest, *, strict: bool = True
    ) -> LoadResult:
        """Take over full averaged tensors, `full[average][name]`; `manifest` says how they came about. Local.

        Each rank copies its own pieces out of them, so they may lie in a memory-mapped file. Raises as `load`.
        """
        self._refuse_while_swapped("load_full()")
        loading = self._loading(manifest, result := self._fit(manifest, strict))
        loading.fill(lambda name, shard: take(full[name][shard.name], shard.region))
        self._take_over(loading)
        return result

    @torch.no_grad()
    def take_from(self, other: AbstractKeeper) -> None:
        """Collective: all ranks must call. Go on where `other` is: the same averages of a model that is cut alike.

        For a model that was wrapped anew. Raises `LayoutChangedError`, and changes nothing, if on some rank the cut
        is another one; then save and load instead.
        """
        self._refuse_while_swapped("take_from()")
        with all_or_none(self._members.layout.group, "taking averages over from another object"):
            self._refuse_other_cuts(other)
            loading = self._loading(manifest := other.manifest(), self._fit(manifest, strict=False))
            loading.fill(lambda name, shard: other._store.view(name, shard.name))
        self._take_over(loading)

    def _refuse_other_cuts(self, other: AbstractKeeper) -> None:
        theirs = {shard.name: shard.region for shard in other._members.averaged}
        for shard in self._members.averaged:
            if theirs.get(shard.name, shard.region) != shard.region:
                raise LayoutChangedError(
                    f"{shard.name!r} is cut into {shard.region} here and was {theirs[shard.name]}: save() the old "
                    "average and load() it into this one"
                )

    def _fit(self, manifest: Manifest, strict: bool) -> LoadResult:
        self._members.refresh()
        result = compare(manifest, self.manifest())
        if strict:
            result.require_all()
        return result

    def _loading(self, manifest: Manifest, result: LoadResult, incoming: Incoming | None = None) -> Loading:
        return Loading(self._members, self._store, manifest, result, incoming)

    def _take_over(self, loading: Loading) -> None:
        self._store = loading.incoming.store
        self._arranged_for = self._members.all if self._store.arranged else None
        for name, record in loading.manifest.averages.items():
            if name in self._rules:
                self._histories[name] = record.history
        self._step = loading.manifest.step

    def state_dict(self) -> dict[str, Any]:
        """A `Stateful`'s part of `torch.distributed.checkpoint.save({"average": average, ...})`. Local.

        One nested dict for each average, under the parameters' own names, and the manifest. The values are items that
        write and read this rank's pieces; they are not tensors and cannot be pickled.
        """
        self._members.refresh()
        self._incoming = Incoming(self._members, self._store)
        state: dict[str, Any] = {MANIFEST_KEY: self.manifest().to_json()}
        for name, history in self._histories.items():
            present = partial(self._average_of, name) if history.n_averaged else None
            state[name] = items_of(name, self._members, self._incoming, present=present)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what torch.distributed.checkpoint has read into the items of the last `state_dict()`.

        Raises `CheckpointError`, and changes nothing, if averages, names, shapes or dtypes do not fit, or if the
        values were not read.
        """
        incoming, self._incoming = self._incoming, None
        self._refuse_while_swapped("load_state_dict()")
        manifest = Manifest.from_json(state_dict.get(MANIFEST_KEY))
        loading = self._loading(manifest, self._fit(manifest, strict=True), incoming)
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
        self._take_over(loading)

    def manifest(self) -> Manifest:
        """What a save at this moment would say about itself. Local."""
        return describe(self._members, self._store, self._rules, self._histories, self._step, self._schedule)

    def _pair(self, name: str, shard: Shard) -> Pair:
        master = None if shard.working is None else shard.tensor
        return Pair(shard.target, self._store.view(name, shard.name), master, volatile=shard.is_buffer)

    def _average_of(self, name: str, shard: Shard) -> Tensor:
        """Where the average of a shard lies now: while swapped, perhaps in the live tensor."""
        if self._swapped == name and self._pair(name, shard).in_place:
            return shard.target
        return self._store.view(name, shard.name)

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a ShardedAverage cannot be copied or pickled: it belongs to its model and process group. Build another "
            "one for another model, and carry the averages over with save() and load()"
        )

    # -- guards ----------------------------------------------------------------------------------------------------

    def _resolve(self, name: str | None) -> str:
        if name is None and len(self._rules) == 1:
            return next(iter(self._rules))
        if name not in self._rules:
            raise ConfigError(f"name={name!r}: this object keeps the averages {list(self._rules)}; name one of them")
        return name

    def _started(self, name: str | None) -> str:
        name = self._resolve(name)
        if not self._histories[name].n_averaged:
            raise NotStartedError(
                f"the average {name!r} has had no update yet ({self._step} steps seen), so there are no averaged "
                "weights to hand out. Call update() after optimizer steps, and check the schedule's start_step"
            )
        return name

    def _refuse_while_swapped(self, what: str) -> None:
        if self._swapped is not None or self._members.layout.model in swapped_models:
            which = "of another ShardedAverage" if self._swapped is None else repr(self._swapped)
            raise SwapError(
                f"{what} cannot be called while the average {which} is swapped in: live and averaged values have "
                "changed places. Leave the `with average.swapped():` block first"
            )
