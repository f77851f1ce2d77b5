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
from torch import Tensor, nn

from .arguments import MANIFEST_KEY, as_device, as_dtype, as_rules, as_schedule, check_buffers
from .checkpoint.dcp import NOT_STARTED, ShardItem
from .checkpoint.folder import load_folder, read_manifest, save_folder
from .checkpoint.manifest import AverageRecord, Manifest
from .collectives import agree, rank_in
from .errors import CheckpointError, ConfigError, NotStartedError, SwapError
from .gather import Item, gather, scatter
from .members import Include, Members
from .rules import AbstractRule
from .schedule import WhenFn
from .shard import Shard
from .store import Store
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
        self._counts = dict.fromkeys(self._rules, 0)
        self._step = 0
        self._swapped: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages; ("average",) for a single rule."""
        return tuple(self._rules)

    @property
    def n_averaged(self) -> int:
        """Updates applied so far, as a Python int."""
        return max(self._counts.values())

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
            self._store.update(self._rules, self._counts)
            self._counts = {name: count + 1 for name, count in self._counts.items()}
        self._step += 1
        return due

    def _arrange(self, *, admit: bool = False) -> None:
        """Point the store at the live shards, wherever they are now."""
        before = self._members.all
        self._members.refresh()
        if admit:
            self._members.admit()
        if self._members.all is not before or not self._store.arranged:
            self._store.arrange(self._members.averaged)

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
        if not self._counts[name]:
            yield False
            return
        self._arrange()
        with swapped_in(self._members.layout, [self._pair(name, shard) for shard in self._held()]):
            self._swapped = name
            try:
                yield True
            finally:
                self._swapped = None

    def _held(self) -> list[Shard]:
        """The averaged shards that have an average yet."""
        return [shard for shard in self._members.averaged if shard.name in self._store]

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
        for shard in self._held():
            for live in (shard.tensor, shard.target):
                live.copy_(self._store.view(name, shard.name))
        self._members.layout.publish()

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
        state = self._full_state(name, offload_to_cpu, rank0_only)
        error: BaseException | None = None
        try:
            yield state
        except BaseException as failure:
            error = failure
            raise
        finally:
            if writeback:
                self._write_back(name, state, error, rank0_only)

    @torch.no_grad()
    def _full_state(self, name: str, offload_to_cpu: bool, rank0_only: bool) -> dict[str, Any]:
        layout = self._members.layout
        self._arrange()
        layout.release()
        device = torch.device("cpu") if offload_to_cpu else None
        full = gather(layout.group, self._items(name, self._members.all), rank0_only=rank0_only, device=device)
        return self._members.state(full) if self._keeps(rank0_only) else {}

    def _keeps(self, rank0_only: bool) -> bool:
        return not rank0_only or rank_in(self._members.layout.group) == 0

    def _items(self, name: str, shards: list[Shard]) -> list[Item]:
        return [
            Item(s.name, s.shape, s.region, self._average_of(name, s) if s.name in self._store else s.tensor)
            for s in shards
        ]

    @torch.no_grad()
    def _write_back(self, name: str, state: dict[str, Any], error: BaseException | None, rank0_only: bool) -> None:
        held = self._held()
        if error is None and self._keeps(rank0_only):
            error = _misfit(state, held)
        agree(self._members.layout.group, error, "editing the full averages; none were written back")
        scatter(self._members.layout.group, self._items(name, held), state, rank0_only=rank0_only)

    # -- keeping ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Collective: all ranks must call. Write a torch.distributed.checkpoint folder that any engine can load.

        Each rank writes its own pieces. The folder has its final name only when it is whole; an earlier one at `path`
        is kept until then. Before the first update only counters are saved, so that a resumed run starts on time.
        Raises `CheckpointError` if it cannot be written.
        """
        save_folder(path, self.state_dict(), self._manifest(), self._members.layout.group)

    @torch.no_grad()
    def load(self, path: str | os.PathLike[str]) -> None:
        """Collective: all ranks must call. Read what `save` wrote, on any engine and any number of ranks.

        Raises `CheckpointError`, and changes nothing, if names, shapes or the set of averages differ.
        """
        self._refuse_while_swapped("load()")
        self._check_fit(read_manifest(path))
        state = self.state_dict()
        load_folder(path, state, self._members.layout.group)
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """A `Stateful`'s part of `torch.distributed.checkpoint.save({"average": average, ...})`. Local.

        One nested dict for each average, under the parameters' own names, and the manifest. The values are items that
        write and read this rank's pieces; they are not tensors and cannot be pickled.
        """
        self._members.refresh()
        state: dict[str, Any] = {MANIFEST_KEY: self._manifest().to_json()}
        for name in self._rules:
            state[name] = {shard.name: self._shard_item(name, shard) for shard in self._members.averaged}
        return state

    def _shard_item(self, name: str, shard: Shard) -> ShardItem:
        started = bool(self._counts[name]) and shard.name in self._store
        values = partial(self._values, name, shard)
        return ShardItem(shard.shape, shard.region, self._store.dtype_of(shard), values, started=started)

    def _values(self, name: str, shard: Shard) -> Tensor:
        if shard.name not in self._store:
            self._store.arrange(self._members.averaged)
        return self._average_of(name, shard)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over counters after torch.distributed.checkpoint has read the values into `state_dict()`'s items."""
        self._refuse_while_swapped("load_state_dict()")
        manifest = Manifest.from_json(state_dict.get(MANIFEST_KEY))
        self._check_fit(manifest)
        for name, record in manifest.averages.items():
            for key, item in state_dict[name].items():
                if record.n_averaged and not isinstance(item, ShardItem):
                    raise CheckpointError(
                        f"{name}.{key} is {item if item == NOT_STARTED else type(item).__name__!r}, not an item that "
                        "was read: pass state_dict() through torch.distributed.checkpoint.load first"
                    )
        if any(record.n_averaged for record in manifest.averages.values()):
            self._arrange()
        self._counts = {name: record.n_averaged for name, record in manifest.averages.items()}
        self._step = manifest.step

    def _manifest(self) -> Manifest:
        shards = self._members.averaged
        dtypes = sorted({str(self._store.dtype_of(shard)).removeprefix("torch.") for shard in shards})
        shapes = {shard.name: list(shard.shape) for shard in shards}
        return Manifest(
            step=self._step,
            averages={
                name: AverageRecord(rule=rule.settings(), n_averaged=self._counts[name], dtype=",".join(dtypes))
                for name, rule in self._rules.items()
            },
            shapes=shapes,
            aliases={alias: name for alias, name in self._members.layout.aliases.items() if name in shapes},
            package=__version__,
            torch=str(torch.__version__),
        )

    def _check_fit(self, manifest: Manifest) -> None:
        mine = self._manifest()
        problems = [*_differences("average", manifest.averages, mine.averages, lambda a, b: True)]
        problems += _differences("parameter", manifest.shapes, mine.shapes, lambda a, b: list(a) == list(b))
        if problems:
            raise CheckpointError("the saved average does not fit: " + "; ".join(problems) + ". Nothing was changed")

    # -- guards ----------------------------------------------------------------------------------------------------

    def _resolve(self, name: str | None) -> str:
        if name is None and len(self._rules) == 1:
            return next(iter(self._rules))
        if name not in self._rules:
            raise ConfigError(f"name={name!r}: this object keeps the averages {list(self._rules)}; name one of them")
        return name

    def _started(self, name: str | None) -> str:
        name = self._resolve(name)
        if not self._counts[name]:
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


def _misfit(state: Mapping[str, Any], shards: list[Shard]) -> ConfigError | None:
    """What is wrong with edited full tensors, if anything."""
    for shard in shards:
        edited = state.get(shard.name)
        if not isinstance(edited, Tensor) or edited.shape != shard.shape:
            found = f"one of shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else type(edited).__name__
            return ConfigError(
                f"writeback of {shard.name!r}: expected a tensor of shape {tuple(shard.shape)}, got {found}"
            )
    return None


def _differences(
    what: str, saved: Mapping[str, Any], mine: Mapping[str, Any], equal: Callable[[Any, Any], bool]
) -> Iterator[str]:
    missing = [name for name in mine if name not in saved]
    unexpected = [name for name in saved if name not in mine]
    unequal = [f"{n!r} (saved {saved[n]}, here {mine[n]})" for n in mine if n in saved and not equal(saved[n], mine[n])]
    if missing:
        yield f"{what}s missing from it: {missing}"
    if unexpected:
        yield f"{what}s it has and the model's average lacks: {unexpected}"
    if unequal:
        yield f"{what}s of another shape: {unequal}"
