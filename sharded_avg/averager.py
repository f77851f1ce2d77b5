"""ShardedAverage: rules x schedule x layout x store.

    update              live shards -> rules -> store                          local
    swapped             live shards <-> store, and back                        collective
    summon_full_params  store -> full tensors, with live ones for the rest     collective
    state_dict          store -> items that torch.distributed.checkpoint cuts  local; saving them is collective

Before the first update there is no average: nothing is allocated, a swap leaves the live weights in place, and
whatever would hand out averaged values raises `NotStartedError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .arguments import MANIFEST_KEY, as_device, as_dtype, as_rules, as_schedule, check_buffers, check_storage
from .checkpoint.fit import LoadResult, compare
from .checkpoint.folder import PendingSave, everyone, load_folder, read_manifest, save_folder, save_folder_async
from .checkpoint.manifest import Manifest
from .collectives import all_or_none, gloo_twin
from .errors import CheckpointError, ConfigError, NotStartedError, SwapError
from .history import History
from .keeping import Incoming, describe, items_of
from .members import Include, Members
from .rules import AbstractRule
from .schedule import WhenFn
from .shard import Shard
from .store import Store
from .summon import full_params
from .swap import Pair, swapped_in

_swapped_models: WeakSet[nn.Module] = WeakSet()  # of any ShardedAverage: a model may have several


class ShardedAverage:
    """One or several averages of a model's weights, kept in pieces beside the pieces of the model.

    Each rank stores the average of what it owns of the model, and `update()` touches local memory only.

    Args:
        model: a plain module, or one wrapped by DistributedDataParallel, FullyShardedDataParallel, fully_shard or
            tensor parallelism, or a DeepSpeedEngine. Build the average after the last wrapping.
        rule: a rule, or a mapping of names to rules; a single rule is the average named "average".
        dtype: storage of the average. fp32 by default, because a bf16 average of small steps stands still; `None`
            keeps each parameter's own.
        device: `None` is where each shard lives; "cpu" is host memory, pinned if shards live on a GPU.
        buffers: "copy" uses the live buffers; "average" averages floating-point persistent buffers, each rank its own.
        include: `include(name, tensor) -> bool` chooses parameters; by default those that require grad. It is called
            with a meta tensor of the full shape, the parameter's dtype and `requires_grad`, so that all ranks decide
            alike. Parameters left out cost nothing; full states take them from the live model. A parameter that comes
            to be included later, because it was unfrozen, joins at the next update.
        schedule: which steps update; every one by default.

    On a device mesh smaller than the job, construction may make a process group of its ranks: all of them must call.

    Raises `ConfigError` for an argument that cannot be, and `UnsupportedModelError` for a model that no layout can
    average, each before anything has been changed.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: AbstractRule | Mapping[str, AbstractRule],
        *,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
        buffers: str = "copy",
        include: Include | None = None,
        schedule: WhenFn | None = None,
    ) -> None:
        self._rules = as_rules(rule)
        self._schedule = as_schedule(schedule)
        check_buffers(buffers)
        self._store = Store(tuple(self._rules), as_dtype(dtype), as_device(device))
        self._members = Members(model, include, average_buffers=buffers == "average")
        for shard in self._members.averaged:
            check_storage(shard.name, self._store.dtype_of(shard))
        self._histories = dict.fromkeys(self._rules, History())
        self._step = 0
        self._arranged_for: list[Shard] | None = None  # what the members were when the store was arranged
        self._incoming: Incoming | None = None
        self._pending: PendingSave | None = None
        self._carrier: dist.ProcessGroup | None = None
        self._swapped: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages; ("average",) for a single rule."""
        return tuple(self._rules)

    @property
    def n_averaged(self) -> int:
        """Updates applied so far, as a Python int."""
        return max(history.n_averaged for history in self._histories.values())

    @property
    def nbytes(self) -> int:
        """Bytes of averages that this rank stores, without scratch; 0 before the first update."""
        return self._store.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that `update()` needs beside the averages: for another dtype or device than the weights'."""
        return self._store.scratch_nbytes

    # -- updating --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self) -> bool:
        """Take the live weights into every average if it is time, and say whether it was. Local: no communication.

        Call it after every optimizer step. A step that the engine skipped does not count. Raises `SwapError` inside
        `swapped()`, and `LayoutChangedError` if the model was wrapped or re-cut since the average was built. Should a
        rule of your own raise, or an interruption come in the middle, some parameters have taken this step in and
        others not; the count has not changed.
        """
        self._refuse_while_swapped("update()")
        if self._members.layout.step_was_skipped():
            return False
        due = bool(self._schedule(self._step + 1))
        if due:
            self._arrange(admit=True)
            counts = {name: history.n_averaged for name, history in self._histories.items()}
            self._store.update(self._rules, counts)
            self._histories = {name: history.after(self._step + 1) for name, history in self._histories.items()}
        self._step += 1
        return due

    def _arrange(self, *, admit: bool = False) -> None:
        """Point the store at the live shards, wherever they are now."""
        self._members.refresh()
        joined = admit and self._members.admit()
        if self._arranged_for is not self._members.all:
            try:
                self._store.arrange(self._members.averaged)
            except BaseException:  # out of memory, most likely; without the newcomers there was enough
                if joined:
                    self._members.dismiss()
                raise
            self._arranged_for = self._members.all

    # -- evaluating ------------------------------------------------------------------------------------------------

    @contextmanager
    def swapped(self, name: str | None = None) -> Iterator[bool]:
        """Collective: all ranks must call. Inside, the model computes with averaged weights.

        Live and averaged values are exchanged in place: data pointers stay, and the raw weights are back bit for bit
        afterwards, also after an exception. Yields whether there was an average to bring in: before the first update
        the live weights stay. Raises `SwapError` when nested.
        """
        self._refuse_while_swapped("swapped()")
        name = self._resolve(name)
        if not self._histories[name].n_averaged:
            yield False
            return
        with swapped_in(self._members.layout, partial(self._pairs, name)):
            self._swapped = name
            _swapped_models.add(self._members.layout.model)
            try:
                yield True
            finally:
                self._swapped = None
                _swapped_models.discard(self._members.layout.model)

    def _pairs(self, name: str) -> list[Pair]:
        """What the averaged shards exchange, wherever their live tensors are now; always in one order."""
        self._arrange()
        return [self._pair(name, shard) for shard in self._members.averaged]

    def _pair(self, name: str, shard: Shard) -> Pair:
        master = None if shard.working is None else shard.tensor
        return Pair(shard.target, self._store.view(name, shard.name), master, volatile=shard.is_buffer)

    def _average_of(self, name: str, shard: Shard) -> Tensor:
        """Where the average of a shard lies now: while swapped, perhaps in the live tensor."""
        if self._swapped == name and self._pair(name, shard).in_place:
            return shard.target
        return self._store.view(name, shard.name)

    # -- handing out -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def copy_to_model(self, name: str | None = None) -> None:
        """Collective: all ranks must call. Make the averaged weights the model's own, masters included.

        For the end of training. Raises `NotStartedError` before the first update.
        """
        self._refuse_while_swapped("copy_to_model()")
        name = self._started(name)
        with all_or_none(self._members.layout.group, "copying averages into the model"):
            self._arrange()
            self._members.layout.release()
            for shard in self._members.averaged:
                for live in (shard.tensor, shard.target):
                    live.copy_(self._store.view(name, shard.name))
        self._members.layout.publish()
        self._members.layout.publish_masters()

    @contextmanager
    def summon_full_params(
        self,
        name: str | None = None,
        *,
        offload_to_cpu: bool = True,
        rank0_only: bool = True,
        writeback: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Collective: all ranks must call. Full averaged tensors under the unwrapped model's `state_dict()` keys.

        Yields averages where averaged, in the average's dtype, and live values elsewhere; tied names are all there.
        With `rank0_only`, rank 0 of the model's process group gets them and every other rank gets {}. Gathering takes
        64 MiB at a time beside the result; `offload_to_cpu=False` leaves full tensors on each shard's device.
        `writeback=True` puts edits of averaged tensors back into the shards on exit, from rank 0 or else from each
        rank's own tensors, unless the body raised on some rank; edits of other entries are dropped.

        Raises `NotStartedError` before the first update.
        """
        if writeback:
            self._refuse_while_swapped("summon_full_params(writeback=True)")
        name = self._started(name)
        with all_or_none(self._members.layout.group, "looking up the live weights"):
            self._arrange()
        with full_params(
            self._members,
            partial(self._average_of, name),
            offload_to_cpu=offload_to_cpu,
            rank0_only=rank0_only,
            writeback=writeback,
        ) as full:
            yield full

    # -- keeping ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Collective: all ranks must call. Write a torch.distributed.checkpoint folder that any engine can load.

        Each rank writes its own pieces. The folder has its final name only when it is whole; an earlier one at `path`
        is kept until then. A path with `://` goes through fsspec. Before the first update only counters are saved, so
        that a resumed run starts on time. Raises `CheckpointError` if it cannot be written.
        """
        group = self._quiet_group()
        with all_or_none(group, "collecting what is saved"):
            state = self.state_dict()
        save_folder(path, state, self._manifest(), group)

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
        self._pending = save_folder_async(path, state, self._manifest(), group, self._carrier)
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
        result = compare(manifest, self._manifest())
        if strict:
            result.require_all()
        with all_or_none(group, "making room for the averages to load"):
            incoming = self._incoming_for(manifest, result)
            state: dict[str, Any] = {MANIFEST_KEY: ""}
            for name in self._started_in(manifest):
                left_out = {*result.missing_keys, *result.misfits}
                state[name] = items_of(name, self._members, incoming, present=None, left_out=left_out)
        load_folder(folder, state, group)
        if Manifest.from_json(state[MANIFEST_KEY]) != manifest:
            raise CheckpointError(f"{folder!r} is torn: its manifest is of another save. Nothing was changed")
        self._take_over(manifest, incoming)
        return result

    def _started_in(self, manifest: Manifest) -> list[str]:
        return [name for name, record in manifest.averages.items() if name in self._rules and record.n_averaged]

    def _incoming_for(self, manifest: Manifest, result: LoadResult) -> Incoming:
        """Room for what is read, with the averages that stay as they are; none if nothing has started."""
        self._members.refresh()
        incoming = Incoming(self._members, self._store)
        if self._started_in(manifest) or self.n_averaged:
            incoming.arrange()
            if self.n_averaged:
                incoming.store.take_from(self._store, result.missing_averages)
        return incoming

    def _take_over(self, manifest: Manifest, incoming: Incoming) -> None:
        self._store = incoming.store
        self._arranged_for = self._members.all if incoming.store.arranged else None
        for name, record in manifest.averages.items():
            if name in self._rules:
                self._histories[name] = record.history
        self._step = manifest.step

    def state_dict(self) -> dict[str, Any]:
        """A `Stateful`'s part of `torch.distributed.checkpoint.save({"average": average, ...})`. Local.

        One nested dict for each average, under the parameters' own names, and the manifest. The values are items that
        write and read this rank's pieces; they are not tensors and cannot be pickled.
        """
        self._members.refresh()
        self._incoming = Incoming(self._members, self._store)
        state: dict[str, Any] = {MANIFEST_KEY: self._manifest().to_json()}
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
        compare(manifest, self._manifest()).require_all()
        started = self._started_in(manifest)
        unread = [
            f"{name}.{key}"
            for name in started
            for key in manifest.tensors
            if not getattr(state_dict.get(name, {}).get(key), "is_read", False)
        ]
        if unread or incoming is None:
            raise CheckpointError(
                f"{unread or 'these values'} were not read: call state_dict(), pass what it returns through "
                "torch.distributed.checkpoint.load, and then to load_state_dict(); or call load(path)"
            )
        if started:
            incoming.arrange()
        self._take_over(manifest, incoming)

    def _manifest(self) -> Manifest:
        return describe(self._members, self._store, self._rules, self._histories, self._step, self._schedule)

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
        if self._swapped is not None or self._members.layout.model in _swapped_models:
            which = "of another ShardedAverage" if self._swapped is None else repr(self._swapped)
            raise SwapError(
                f"{what} cannot be called while the average {which} is swapped in: live and averaged values have "
                "changed places. Leave the `with average.swapped():` block first"
            )
