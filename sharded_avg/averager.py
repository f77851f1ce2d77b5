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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .arguments import MANIFEST_KEY, as_device, as_dtype, as_rules, as_schedule, check_buffers
from .checkpoint.dcp import Destination, ShardItem
from .checkpoint.fit import LoadResult, compare
from .checkpoint.folder import PendingSave, everyone, load_folder, read_manifest, save_folder, save_folder_async
from .checkpoint.manifest import AverageRecord, Manifest, TensorRecord
from .errors import CheckpointError, ConfigError, NotStartedError, SwapError
from .history import History
from .members import Include, Members
from .rules import AbstractRule
from .schedule import WhenFn, schedule_settings
from .shard import Shard
from .store import Store
from .summon import full_params
from .swap import Pair, swapped_in
from .version import __version__


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
        self._histories = dict.fromkeys(self._rules, History())
        self._step = 0
        self._arranged_for: list[Shard] | None = None  # what the members were when the store was arranged
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
        `swapped()`, and `LayoutChangedError` if the model was wrapped or re-cut since the average was built.
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
        if admit:
            self._members.admit()
        if self._arranged_for is not self._members.all:
            self._store.arrange(self._members.averaged)
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
            try:
                yield True
            finally:
                self._swapped = None

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
        save_folder(path, self.state_dict(), self._manifest(), self._members.layout.group)

    def async_save(self, path: str | os.PathLike[str]) -> PendingSave:
        """Collective: all ranks must call. As `save`, but returns once the values are copied to host memory.

        Training, updates and swaps may go on; call `result()` of what is returned, on all ranks, to wait for the
        bytes and give the folder its name. The first call makes a gloo group for the traffic.
        """
        group = everyone(self._members.layout.group)
        if self._carrier is None and group is not None:
            self._carrier = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
        return save_folder_async(path, self.state_dict(), self._manifest(), group, self._carrier)

    @torch.no_grad()
    def load(self, path: str | os.PathLike[str], *, strict: bool = True) -> LoadResult:
        """Collective: all ranks must call. Read what `save` wrote, on any engine and any number of ranks.

        Raises `CheckpointError`, and changes nothing, if averages, names, shapes or dtypes do not fit, or if the
        folder is torn. With `strict=False`, loads what fits and says in the result what it left out: an average that
        is missing stays as it is, a parameter that is missing starts again from its live value.
        """
        self._refuse_while_swapped("load()")
        folder, manifest = read_manifest(path, self._members.layout.group)
        result = compare(manifest, self._manifest())
        if strict:
            result.require_all()
        fresh = self._store_to_read(manifest, result)
        # Into a store of its own, which takes the place of the present one when everything has been read.
        state = {MANIFEST_KEY: "", **self._items_to_read(fresh, manifest, result)}
        load_folder(folder, state, self._members.layout.group)
        if Manifest.from_json(state[MANIFEST_KEY]) != manifest:
            raise CheckpointError(f"{folder!r} is torn: its manifest is of another save. Nothing was changed")
        self._store = fresh
        self._arranged_for = self._members.all if fresh.arranged else None
        self._take_over(manifest)
        return result

    def _store_to_read(self, manifest: Manifest, result: LoadResult) -> Store:
        """An arranged store: live values, and the averages that stay as they are; nothing if nothing has started."""
        self._members.refresh()
        fresh = self._store.like()
        if any(record.n_averaged for record in manifest.averages.values()) or self.n_averaged:
            fresh.arrange(self._members.averaged)
            if self.n_averaged:
                fresh.take_from(self._store, result.missing_averages)
        return fresh

    def _items_to_read(self, store: Store, manifest: Manifest, result: LoadResult) -> dict[str, Any]:
        left_out = {*result.missing_keys, *result.misfits}
        return {
            name: {
                shard.name: self._shard_item(shard, None, partial(store.view, name, shard.name))
                for shard in self._members.averaged
                if shard.name not in left_out
            }
            for name, record in manifest.averages.items()
            if name in self._rules and record.n_averaged
        }

    def _take_over(self, manifest: Manifest) -> None:
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
        state: dict[str, Any] = {MANIFEST_KEY: self._manifest().to_json()}
        for name in self._rules:
            started = self._histories[name].n_averaged and self._store.arranged
            state[name] = {
                shard.name: self._shard_item(
                    shard, self._average_of(name, shard) if started else None, partial(self._arranged_view, name, shard)
                )
                for shard in self._members.averaged
            }
        return state

    def _shard_item(self, shard: Shard, local: Tensor | None, destination: Callable[[], Tensor]) -> ShardItem:
        return ShardItem(shard.shape, shard.region, self._store.dtype_of(shard), local, Destination(destination))

    def _arranged_view(self, name: str, shard: Shard) -> Tensor:
        self._arrange()
        return self._average_of(name, shard)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over counters after torch.distributed.checkpoint has read the values into `state_dict()`'s items.

        Raises `CheckpointError` if averages, names, shapes or dtypes do not fit, or if the values were not read.
        """
        self._refuse_while_swapped("load_state_dict()")
        manifest = Manifest.from_json(state_dict.get(MANIFEST_KEY))
        compare(manifest, self._manifest()).require_all()
        started = [name for name, record in manifest.averages.items() if record.n_averaged]
        for name in started:
            unread = [key for key, item in state_dict[name].items() if not isinstance(item, ShardItem)]
            if unread:
                raise CheckpointError(
                    f"{unread} of the average {name!r} were not read: pass state_dict() through "
                    "torch.distributed.checkpoint.load first, or call load(path)"
                )
        if started:
            self._arrange()
        self._take_over(manifest)

    def _manifest(self) -> Manifest:
        shards = self._members.averaged
        tensors = {
            shard.name: TensorRecord(
                shape=list(shard.shape), dtype=str(self._store.dtype_of(shard)).removeprefix("torch.")
            )
            for shard in shards
        }
        histories = self._histories
        return Manifest(
            step=self._step,
            averages={
                name: AverageRecord(
                    rule=rule.settings(), n_averaged=histories[name].n_averaged, updates=histories[name].as_lists()
                )
                for name, rule in self._rules.items()
            },
            tensors=tensors,
            aliases={alias: name for alias, name in self._members.layout.aliases.items() if name in tensors},
            schedule=schedule_settings(self._schedule),
            package=__version__,
            torch=str(torch.__version__),
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
        if self._swapped is not None:
            raise SwapError(
                f"{what} cannot be called while the average {self._swapped!r} is swapped in: live and averaged values "
                "have changed places. Leave the `with average.swapped():` block first"
            )
