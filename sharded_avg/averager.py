"""ShardedAverage: rules x schedule x layout x store.

    update              live shards -> rules -> store                          local
    swapped             live shards <-> store, and back                        collective
    summon_full_params  store -> full tensors, with live ones for the rest     collective
    state_dict          store -> items that torch.distributed.checkpoint cuts  local; saving them is collective

Before the first update there is no average: nothing is allocated, a swap leaves the live weights in place, and
whatever would hand out averaged values raises `NotStartedError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .averages.arguments import as_device, as_dtype, as_rules, as_schedule, check_buffers, check_storage
from .averages.store import Store
from .evaluation.distance import distance
from .evaluation.finite import all_finite
from .exchange.summon import full_params
from .exchange.swap import Pair, swapped_in
from .keeper import AbstractKeeper, swapped_models
from .ranks import all_or_none, gather_objects
from .rules.base import AbstractRule
from .rules.schedule import WhenFn
from .weights.aside import RawWeights, bring_back, holds_either, live_tensors, set_aside
from .weights.members import Include, Members


class ShardedAverage(AbstractKeeper):
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
        rules, when = as_rules(rule), as_schedule(schedule)
        check_buffers(buffers)
        store = Store(tuple(rules), as_dtype(dtype), as_device(device))
        members = Members(model, include, average_buffers=buffers == "average")
        for shard in members.averaged:
            check_storage(shard.name, store.dtype_of(shard))
        super().__init__(rules, when, store, members)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages; ("average",) for a single rule."""
        return tuple(self._rules)

    @property
    def n_averaged(self) -> int:
        """Updates applied so far, as a Python int."""
        return max(history.n_averaged for history in self._histories.values())

    @property
    def num_steps(self) -> int:
        """Optimizer steps seen so far: calls of `update()` that followed a real one."""
        return self._step

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
    def update(self, *, unscheduled: bool = False) -> bool:
        """Take the live weights into every average if it is time, and say whether it was. Local: no communication.

        Call it after every optimizer step. A step that the engine skipped does not count. With `unscheduled`, the
        weights are taken in whatever the schedule says, and no step is counted: for the end of an epoch, say.

        Raises `SwapError` inside `swapped()`, and `LayoutChangedError` if the model was wrapped or re-cut since the
        average was built. Should a rule of your own raise, or an interruption come in the middle, some parameters have
        taken this step in and others not; the count has not changed.
        """
        self._refuse_while_swapped("update()")
        if unscheduled:
            self._take_in(max(1, self._step))
            return True
        if self._members.layout.step_was_skipped():
            return False
        due = bool(self._schedule(self._step + 1))
        if due:
            self._take_in(self._step + 1)
        self._step += 1
        return due

    def _take_in(self, step: int) -> None:
        self._arrange(admit=True)
        counts = {name: history.n_averaged for name, history in self._histories.items()}
        self._store.update(self._rules, counts)
        self._histories = {name: history.after(step) for name, history in self._histories.items()}

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
            swapped_models.add(self._members.layout.model)
            try:
                yield True
            finally:
                self._swapped = None
                swapped_models.discard(self._members.layout.model)

    @property
    def has_stale_replicas(self) -> bool:
        """Whether a swap ended without other ranks, so that their parts of this rank's weights still are averages."""
        return self._members.layout.has_stale_replicas

    @torch.inference_mode(False)
    @torch.no_grad()
    def republish(self) -> None:
        """Collective: all ranks must call. Make up for a swap that ended without some ranks, if they are back."""
        layout = self._members.layout
        if layout.publishes and any(gather_objects(layout.group, layout.has_stale_replicas)):
            layout.publish()
            layout.has_stale_replicas = False

    def _pairs(self, name: str) -> list[Pair]:
        """What the averaged shards exchange, wherever their live tensors are now; always in one order."""
        self._arrange()
        return [self._pair(name, shard) for shard in self._members.averaged]

    # -- looking -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def distance(self, name: str | None = None) -> float:
        """Collective: all ranks must call. How far the average is from the live weights, relative to those.

        ||live - average|| / ||live||, Euclidean over all averaged elements; one small reduction. Raises
        `NotStartedError` before the first update.
        """
        self._refuse_while_swapped("distance()")
        name = self._started(name)
        group = self._members.layout.group
        with all_or_none(group, "looking up the live weights"):
            self._arrange()
        return distance(self._members.averaged, partial(self._average_of, name), group)

    @torch.no_grad()
    def live_is_finite(self) -> bool:
        """Collective: all ranks must call. Whether no averaged parameter has a NaN or an infinity on any rank.

        A NaN that an average has taken in stays: `if average.live_is_finite(): average.update()` keeps it out, at
        the price of a pass over the weights, a host sync and one small reduction.
        """
        group = self._members.layout.group
        with all_or_none(group, "looking up the live weights"):
            self._members.refresh()
        return all_finite([shard.tensor for shard in self._members.averaged], group)

    # -- handing out -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def raw_weights(self, name: str | None = None) -> RawWeights:
        """Collective: all ranks must call. Copies, in host memory, of what `copy_to_model(name)` will replace."""
        self._refuse_while_swapped("raw_weights()")
        name = self._started(name)
        with all_or_none(self._members.layout.group, "copying raw weights to host memory"):
            self._arrange()
            return set_aside(name, self._members.averaged)

    @torch.no_grad()
    def copy_to_model(self, name: str | None = None, *, undo: RawWeights | None = None) -> None:
        """Collective: all ranks must call. Make the averaged weights the model's own, masters included.

        For the end of training. With `undo`, what `raw_weights` returned just before, an error or an interruption
        leaves the raw weights. Raises `NotStartedError` before the first update.
        """
        self._refuse_while_swapped("copy_to_model()")
        name = self._started(name)
        try:
            with all_or_none(self._members.layout.group, "copying averages into the model"):
                self._arrange()
                self._members.layout.release()
                for shard in self._members.averaged:
                    for live in live_tensors(shard):
                        live.copy_(self._store.view(name, shard.name))
            self._publish_all()
        except BaseException:
            if undo is not None:
                bring_back(undo, self._members.averaged)
            raise

    @torch.no_grad()
    def restore_raw(self, raw: RawWeights) -> bool:
        """Collective: all ranks must call. Undo `copy_to_model`, bit for bit, masters included.

        Returns False, and changes nothing, if some rank's parameters are neither the average nor the raw ones: the
        model was given other weights since, and they are what it goes on from.
        """
        self._refuse_while_swapped("restore_raw()")
        group = self._members.layout.group
        with all_or_none(group, "comparing live weights with averages"):
            self._arrange()
            self._members.layout.release()
            known = [shard for shard in self._members.averaged if shard.name in raw.values]
            unchanged = all(holds_either(shard, self._average_of(raw.average, shard), raw) for shard in known)
        if not all(gather_objects(group, unchanged)):
            return False
        with all_or_none(group, "bringing raw weights back"):
            bring_back(raw, known)
        self._publish_all()
        return True

    def _publish_all(self) -> None:
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
