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
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .averages import profile
from .averages.arguments import as_buffers, as_device, as_dtype, as_rules, as_schedule, check_storage, rings_of
from .averages.profile import Stretch
from .averages.state import Cost, State
from .averages.store import AverageDtype, Store
from .errors import ConfigError
from .evaluation.distance import distance, distances
from .evaluation.finite import live_is_finite
from .evaluation.replicas import Differing, check_replicas
from .exchange.handover import copy_to_model, raw_weights, republish, restore_raw
from .exchange.summon import gather_full, summoned
from .exchange.swap import swapped
from .rules.base import AbstractRule
from .rules.schedule import WhenFn
from .saved.checkpoints import Checkpoints
from .saved.fit import LoadResult
from .saved.folder.saving import PendingSave
from .saved.manifest import Manifest
from .saved.posthoc import Mixed, load_posthoc
from .weights.aside import RawWeights
from .weights.buffers import BufferPolicy
from .weights.layouts.detect import detect
from .weights.members import Include, Members


class ShardedAverage:
    """One or several averages of a model's weights, kept in pieces beside the pieces of the model.

    Each rank stores the average of what it owns of the model, and `update()` touches local memory only.

    Args:
        model: a plain module, or one wrapped by DistributedDataParallel, FullyShardedDataParallel, fully_shard or
            tensor parallelism, or a DeepSpeedEngine. Build the average after the last wrapping.
        rule: a rule, or a mapping of names to rules; a single rule is the average named "average".
        dtype: storage of the average. By default, "auto", fp32, because a bf16 average of small steps stands still,
            or a parameter's own dtype where that is wider (float64, complex128). `None` is each parameter's own. A
            dtype that is narrower than the weights' is taken at its word: the average is rounded to it.
        device: `None` is where each shard lives; "cpu" is host memory, pinned if shards live on a GPU.
        buffers: "copy" uses the live buffers; "average" averages floating-point persistent buffers, each rank its own.
            A mapping of patterns (`fnmatch`) of names to one of these says it for some, `{"*.running_*": "average"}`,
            "copy" for the rest, and the first pattern that fits for those that several fit; so does a predicate
            `buffers(name, tensor) -> bool`, called as `include` is. State of torch's own modules whose mean means
            nothing stays the live one in any case; docs/guide.md lists it.
        include: `include(name, tensor) -> bool` chooses parameters; by default those that require grad. It is called
            with a meta tensor of the full shape, the parameter's dtype and `requires_grad`, so that all ranks decide
            alike. Parameters left out cost nothing; full states take them from the live model. A parameter that comes
            to be included later, because it was unfrozen, joins at the next update.
        schedule: which steps update; every one by default.
        process_group: the ranks that hold equal copies of the model, where no engine says so: a plain module is then
            divided among them as under DistributedDataParallel, and they save and load together. Without it, a model
            that no engine connects belongs to its process alone. Refused where an engine names other ranks.

    On a device mesh smaller than the job, construction may make a process group of its ranks: all of them must call.

    Raises `ConfigError` for an argument that cannot be, and `UnsupportedModelError` for a model that no layout can
    average, each before anything has been changed.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: AbstractRule | Mapping[str, AbstractRule],
        *,
        dtype: AverageDtype = "auto",
        device: torch.device | str | None = None,
        buffers: str | Mapping[str, str] | BufferPolicy = "copy",
        include: Include | None = None,
        schedule: WhenFn | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        layout = detect(model, process_group)  # first: all ranks make a group here, whatever one is given besides
        rules, when = as_rules(rule), as_schedule(schedule)
        store = Store(tuple(rules), as_dtype(dtype), as_device(device), rings_of(rules))
        members = Members(model, layout, include, buffers=as_buffers(buffers))
        for shard in members.averaged:
            check_storage(shard.name, store.dtype_of(shard))
        self._state = State(members, rules, when, store)
        self._checkpoints = Checkpoints(self._state)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages; ("average",) for a single rule."""
        return tuple(self._state.rules)

    @property
    def n_averaged(self) -> int:
        """Updates applied so far, as a Python int."""
        return max(history.n_averaged for history in self._state.histories.values())

    @property
    def num_steps(self) -> int:
        """Optimizer steps seen so far: calls of `update()` that followed a real one."""
        return self._state.step

    @property
    def nbytes(self) -> int:
        """Bytes of averages that this rank stores, without scratch; 0 before the first update."""
        return self._state.store.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that `update()` needs beside the averages: for another dtype or device than the weights'."""
        return self._state.store.scratch_nbytes

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the model together; `None` where each process holds all of it."""
        return self._state.group

    def update(self, *, unscheduled: bool = False) -> bool:
        """Take the live weights into every average if it is time, and say whether it was. Local: no communication.

        Call it after every optimizer step. A step that the engine skipped does not count. With `unscheduled`, the
        weights are taken in whatever the schedule says, and no step is counted: for the end of an epoch, say.

        Raises `SwapError` inside `swapped()`, and `LayoutChangedError` if the model was wrapped or re-cut since the
        average was built. Should a rule of your own raise, or an interruption come in the middle, some parameters have
        taken this step in and others not; the count has not changed.
        """
        return self._state.update(unscheduled=unscheduled)

    def attach(self, *optimizers: Any) -> None:
        """Let these optimizers tell `update()` which steps were real: it counts none that did not happen. Local.

        From now on an `update()` that follows no step of any of them, counted from the last update, changes nothing
        and returns False: inside gradient accumulation, after a step that a GradScaler skipped, or called twice.
        Several steps between two updates count as one. A `torch.optim.Optimizer`, also inside Accelerate's or Fabric's
        wrapper; more can be attached later. A DeepSpeedEngine tells by itself, and this changes nothing there.

        The optimizers keep no average alive. A fused optimizer under a GradScaler is asked for its `found_inf` after
        each step, which waits for the device. Raises `ConfigError` for what is no optimizer.
        """
        self._state.attach(optimizers)

    # -- evaluating ------------------------------------------------------------------------------------------------

    def swapped(self, name: str | None = None) -> AbstractContextManager[bool]:
        """Collective: all ranks must call. Inside, the model computes with averaged weights.

        Live and averaged values are exchanged in place: data pointers stay, and the raw weights are back bit for bit
        afterwards, also after an exception. Yields whether there was an average to bring in: before the first update
        the live weights stay. Raises `SwapError` when nested, and `ReplicaError` where ranks that hold equal copies of
        a parameter (DistributedDataParallel, ZeRO 0 to 2, `process_group=`) hold others: nothing has changed then.
        """
        return swapped(self._state, name)

    @property
    def has_stale_replicas(self) -> bool:
        """Whether a swap ended without other ranks, so that their parts of this rank's weights still are averages."""
        return self._state.layout.has_stale_replicas

    def republish(self) -> None:
        """Collective: all ranks must call. Make up for a swap that ended without some ranks, if they are back."""
        republish(self._state)

    def decay(self, name: str | None = None) -> float:
        """The share of the average that stayed at the latest update: the decay in force, 0 at the first one. Local.

        Raises `NotStartedError` before the first update, and `ConfigError` for a rule that does not know (CustomRule),
        as do `horizon` and `profile`.
        """
        return profile.decay(*self._state.about(name))

    def horizon(self, name: str | None = None) -> float:
        """The effective number of updates in the average, 1 / sum of the squares of their shares. Local.

        n for the plain mean of n; (1 + d) / (1 - d) for a long EMA of decay d. Computed from the rule and the history,
        in time that grows with the number of updates that count.
        """
        return profile.horizon(*self._state.about(name))

    def profile(self, name: str | None = None, *, stretches: int = 10) -> list[Stretch]:
        """Which share of the average each stretch of past optimizer steps has: (first step, last step, share). Local.

        The steps from the first update to the latest are cut into so many equal stretches, earliest first.
        """
        return profile.profile(*self._state.about(name), stretches)

    @property
    def last_update(self) -> Cost | None:
        """What the latest update took on this rank: seconds, as the host saw it, and bytes read and written.

        `None` before the first one of this process.
        """
        return self._state.last_update

    def check_replicas(self, *, schedule: WhenFn | None = None) -> list[Differing]:
        """Collective: all ranks must call. What is not equal on ranks that should hold the same: weights and averages.

        Each entry says what ("weights", or the average's name), which parameter, and which ranks have other values
        than most; none if all is well. Compares checksums of what several ranks hold (DDP, HSDP, ZeRO's weights, what
        tensor parallelism leaves whole): a pass over that, and one small exchange. Now and then is enough: with a
        `schedule`, this is done after the steps that it chooses of `num_steps`, and at the others costs nothing,
        communicates nothing, and finds nothing: `check_replicas(schedule=Schedule(every_steps=1000))` in every step.
        """
        return check_replicas(self._state, schedule)

    def distances(self, name: str | None = None) -> dict[str, float]:
        """Collective: all ranks must call. As `distance`, for each module that has averaged tensors of its own."""
        return distances(self._state, name)

    def distance(self, name: str | None = None) -> float:
        """Collective: all ranks must call. How far the average is from the live weights, relative to those.

        ||live - average|| / ||live||, Euclidean over all averaged elements; one small reduction. Raises
        `NotStartedError` before the first update.
        """
        return distance(self._state, name)

    def live_is_finite(self) -> bool:
        """Collective: all ranks must call. Whether no averaged parameter has a NaN or an infinity on any rank.

        A NaN that an average has taken in stays: `if average.live_is_finite(): average.update()` keeps it out, at
        the price of a pass over the weights, a host sync and one small reduction.
        """
        return live_is_finite(self._state)

    # -- handing out -----------------------------------------------------------------------------------------------

    def raw_weights(self, name: str | None = None) -> RawWeights:
        """Collective: all ranks must call. Copies, in host memory, of what `copy_to_model(name)` will replace."""
        return raw_weights(self._state, name)

    def copy_to_model(
        self,
        name: str | None = None,
        *,
        factor: float = 1.0,
        schedule: WhenFn | None = None,
        undo: RawWeights | None = None,
    ) -> bool:
        """Collective: all ranks must call. Make the averaged weights the model's own, masters included.

        At the end of training; or in the course of it, after `update()`, where methods write averages back (Lookahead,
        Zhang 2019; Switch EMA, arXiv 2402.09240, 2024; Hare and Tortoise, 2406.02596): weights become
        (1 - factor) * weights + factor * average, the optimizer's state stays as it is, and with a `schedule` this is
        done at the steps that it chooses of `num_steps`, so that a resumed run goes on where it was. The other steps
        cost nothing and communicate nothing. Returns whether it was done.

        With `undo`, what `raw_weights` returned just before, an error or an interruption leaves the raw weights. Raises
        `NotStartedError` before the first update, and `ConfigError` unless 0 < factor <= 1.
        """
        return copy_to_model(self._state, name, undo, factor, schedule)

    def restore_raw(self, raw: RawWeights) -> bool:
        """Collective: all ranks must call. Undo `copy_to_model`, bit for bit, masters included.

        Returns False, and changes nothing, if some rank's parameters are neither the average nor the raw ones: the
        model was given other weights since, and they are what it goes on from.
        """
        return restore_raw(self._state, raw)

    def summon_full_params(
        self,
        name: str | None = None,
        *,
        offload_to_cpu: bool = True,
        rank0_only: bool = True,
        writeback: bool = False,
    ) -> AbstractContextManager[dict[str, Any]]:
        """Collective: all ranks must call. Full averaged tensors under the unwrapped model's `state_dict()` keys.

        Yields averages where averaged, in the average's dtype, and live values elsewhere; tied names are all there.
        With `rank0_only`, rank 0 of the model's process group gets them and every other rank gets {}. Gathering takes
        64 MiB at a time beside the result; `offload_to_cpu=False` leaves full tensors on each shard's device.
        `writeback=True` puts edits of averaged tensors back into the shards on exit, from rank 0 or else from each
        rank's own tensors, unless the body raised on some rank; edits of other entries are dropped.

        Raises `NotStartedError` before the first update.
        """
        return summoned(self._state, name, offload_to_cpu=offload_to_cpu, rank0_only=rank0_only, writeback=writeback)

    def gather_full(self, names: Collection[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """Collective: all ranks must call. What `load_full` takes back, on rank 0 in host memory; {} elsewhere.

        `full[average][parameter]` of the averages `names`, or of all, that have had an update, and of the snapshots
        that their rules keep, newest first: `full["NAME/0"]`, `full["NAME/1"]`, ... For a file of one's own, with
        `manifest()` beside it.
        """
        return gather_full(self._state, names)

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, with_buffers: bool = False) -> None:
        """Collective: all ranks must call. Write a torch.distributed.checkpoint folder that any engine can load.

        Each rank writes its own pieces. The folder has its final name only when it is whole; an earlier one at `path`
        is kept until then. A path with `://` goes through fsspec. Before the first update only counters are saved, so
        that a resumed run starts on time. With `with_buffers`, buffers and frozen parameters are in the folder, too:
        `load` has no use for them, and with what `load_averaged_state_dict` then hands out, a load is strict.

        What ranks hold is compared before anything is written. Other names on other ranks (stages of a pipeline) are
        all saved; a piece that several hold must be equal on them. Ranks of a plain module, which nothing connects,
        may name other paths: then each saves what it has. Raises `CheckpointError` if it cannot be written, or if
        something of a rank's would be lost.
        """
        self._checkpoints.save(path, with_buffers=with_buffers)

    def async_save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> PendingSave:
        """Collective: all ranks must call. As `save`, but returns once the values are copied to host memory.

        Training, updates and swaps may go on; call `result()` of what is returned, on all ranks, to wait for the
        bytes and give the folder its name. The next save waits for this one. Nothing is
        communicated meanwhile. With `dtype`, what is real is saved rounded to it.
        """
        return self._checkpoints.async_save(path, dtype)

    def load(self, path: str | os.PathLike[str], *, strict: bool = True) -> LoadResult:
        """Collective: all ranks must call. Read what `save` wrote, on any engine and any number of ranks.

        Raises `CheckpointError`, and changes nothing, if averages, names, shapes or dtypes do not fit, or if the
        folder is torn. With `strict=False`, loads what fits and says in the result what it left out: an average that
        is missing stays as it is, a parameter that is missing starts again from its live value. What the folder has
        more than all ranks together is unexpected; where this model is on a part of the job only, others may have it.
        """
        return self._checkpoints.load(path, strict=strict)

    def load_posthoc(
        self, path: str | os.PathLike[str], *, sigma_rel: float, name: str | None = None, step: int | None = None
    ) -> Mixed:
        """Collective: all ranks must call. Choose the horizon after training: a power average that nobody has kept.

        Out of the power averages that a run has saved in `path` (`Snapshots`), up to `step`, a sum is made whose
        profile is nearest to the one of width `sigma_rel` (EDM2, algorithm 3), and it takes the place of the average
        `name`: then evaluate in `swapped()`. Each rank reads its own pieces, one tensor at a time. Folders that are
        torn are passed over with a warning; `error` of what is returned says how nearly the profile is met.

        Raises `CheckpointError`, and changes nothing, if nothing fits, and `ConfigError` for a width that there is not.
        """
        return load_posthoc(self._state, path, sigma_rel, name, step)

    def load_full(
        self, full: Mapping[str, Mapping[str, Tensor]], manifest: Manifest, *, strict: bool = True
    ) -> LoadResult:
        """Take over full averaged tensors, `full[average][name]`; `manifest` says how they came about. Local.

        Each rank copies its own pieces out of them, so they may lie in a memory-mapped file. Snapshots that a rule
        keeps are there as `gather_full` names them; where they are not, the average stands for each. Raises as `load`.
        """
        return self._checkpoints.load_full(full, manifest, strict=strict)

    def take_from(self, other: ShardedAverage) -> None:
        """Collective: all ranks must call. Go on where `other` is: the same averages of a model that is cut alike.

        For a model that was wrapped anew. Raises `LayoutChangedError`, and changes nothing, if on some rank the cut
        is another one; then save and load instead.
        """
        self._checkpoints.take_from(lambda: other._state)

    def state_dict(self) -> dict[str, Any]:
        """A `Stateful`'s part of `torch.distributed.checkpoint.save({"average": average, ...})`. Local.

        One nested dict for each average, under the parameters' own names, and the manifest. The values are items that
        write and read this rank's pieces; they are not tensors and cannot be pickled.
        """
        return self._checkpoints.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what torch.distributed.checkpoint has read into the items of the last `state_dict()`.

        Raises `CheckpointError`, and changes nothing, if averages, names, shapes or dtypes do not fit, or if the
        values were not read.
        """
        self._checkpoints.load_state_dict(state_dict)

    def manifest(self) -> Manifest:
        """What a save at this moment would say about itself. Local."""
        return self._checkpoints.manifest()

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a ShardedAverage cannot be copied or pickled: it belongs to its model and process group. Build another "
            "one for another model, and carry the averages over with save() and load()"
        )
