"""Buffers while a block lasts: BatchNorm statistics recomputed, or buffers averaged over the ranks.

    refreshed_batch_norm   statistics of the weights that are in the model now, from batches run forward
    averaged_buffers       the mean over the ranks of what each rank has of its own

    with average.swapped(), refreshed_batch_norm(model, batches), averaged_buffers(model):
        evaluate(model)    # averaged weights, statistics recomputed for them, the same on all ranks

Both keep what they change before they change it and put it back on leaving: values are copied into the tensors that
are live then, so optimizers, DDP and compiled graphs go on seeing the tensors they know. Leaving is local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, PeerError, UnsupportedModelError
from ..exchange import swap
from ..ranks import agree, all_or_none, comm_device, gather_objects, rendezvous, size_of
from ..weights import names

_BUCKET_NUMEL = 8 << 20  # 64 MiB of float64
_ATTEMPTS = 3  # at putting one value back
_BatchNorm = nn.modules.batchnorm._BatchNorm  # private, but the one class of all kinds, as in torch's own update_bn

Forward = Callable[[nn.Module, Any], object]


# -- what is kept ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """A buffer's values before the block, and the dictionary slot that it lives in."""

    slot: dict[str, Any]
    key: str
    values: Tensor

    def put_back(self) -> None:
        live = self.slot.get(self.key)
        if live is None or live.is_inference():
            with torch.inference_mode(False):  # training could not write to a tensor that was made under it
                self.slot[self.key] = self.values.clone()
        elif live.shape == self.values.shape:  # else a cache that was built anew for another size: leave it
            live.copy_(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class _Attribute:
    owner: nn.Module
    name: str
    value: Any

    def put_back(self) -> None:
        setattr(self.owner, self.name, self.value)


_Kept = _Buffer | _Attribute


@torch.no_grad()
def _kept_buffers(modules: Iterable[nn.Module]) -> list[_Kept]:
    return [
        _Buffer(module._buffers, key, buffer.detach().clone())
        for module in modules
        for key, buffer in module._buffers.items()
        if buffer is not None and _is_writable(buffer)
    ]


def _kept_attribute(modules: Iterable[nn.Module], name: str) -> list[_Kept]:
    return [_Attribute(module, name, getattr(module, name)) for module in modules]


def _is_writable(buffer: Tensor) -> bool:
    """Whether there is memory, and no two elements share it (`expand`): what cannot be written, nobody changes."""
    if is_lazy(buffer) or buffer.is_meta or buffer.layout != torch.strided:
        return False
    return all(step or size <= 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True))


@torch.no_grad()
def _put_back(kept: Sequence[_Kept]) -> None:
    """Put everything back. An error or interruption (Ctrl-C) is raised when all that can be back are. Local."""
    failure: BaseException | None = None
    for thing in kept:
        for _ in range(_ATTEMPTS):
            try:
                thing.put_back()
                break
            except BaseException as error:
                failure = failure or error
    if failure is not None:
        raise failure


def _kept_ddp(model: nn.Module) -> list[_Kept]:
    """DDP's switch for sending rank 0's buffers to all ranks at the next forward, which a forward without grad clears.

    Off inside the block, lest rank 0's statistics replace what other ranks have recomputed; as it was afterwards, so
    that training goes on as if there had been no block.
    """
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return _kept_attribute(wrappers, "require_forward_param_sync")


def _switch_off(switches: Sequence[_Kept]) -> None:
    for switch in switches:
        if isinstance(switch, _Attribute):
            setattr(switch.owner, switch.name, False)


# -- BatchNorm statistics, recomputed ----------------------------------------------------------------------------------


@contextmanager
def refreshed_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[None]:
    """Collective: all ranks must call. Inside, BatchNorm statistics are those of the weights that are in the model.

    For `with average.swapped(), refreshed_batch_norm(model, batches): ...`. The statistics of every BatchNorm layer are
    reset and computed anew, as `torch.optim.swa_utils.update_bn` does: the plain mean over `batches` run forward in
    training mode, without gradients. Each rank uses its own batches; where forward communicates (FSDP, ZeRO 3,
    SyncBatchNorm) all ranks need equally many. On leaving, also by an exception, the live statistics, modes and momenta
    are back bit for bit, and training goes on as if there had been no block: torch's random numbers and every other
    buffer that the batches changed are back as soon as the batches have run.

    Args:
        model: what forward is called on: a plain module, one that DDP or FSDP wraps, or a DeepSpeedEngine.
        batches: on the model's device. A model without BatchNorm reads none of them.
        forward: `forward(model, batch)` runs one batch; by default the batch, or the first element of a tuple or
            list, is the input.
        group: the ranks that do this together; by default all ranks of the job.

    Raises `ConfigError` if there is no batch, and `PeerError` if another rank failed; everything is as before then.
    """
    _require_module(model)
    group = _everyone(group)
    kept: list[_Kept] = []
    try:
        with _meeting(group, "recomputing BatchNorm statistics"):
            layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
            switches = _kept_ddp(model)
            modes = [*_kept_attribute(model.modules(), "training"), *_kept_attribute(layers, "momentum")]
            kept = [*_kept_buffers(layers), *modes, *switches]
            _switch_off(switches)
            if layers:
                _recompute(model, layers, batches, forward or _first_is_input, modes)
        yield
    finally:
        _put_back(kept)


def _first_is_input(model: nn.Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _recompute(
    model: nn.Module, layers: Sequence[nn.Module], batches: Iterable[Any], forward: Forward, modes: Sequence[_Kept]
) -> None:
    """Leave nothing changed but the statistics."""
    passing = _kept_buffers(module for module in model.modules() if not isinstance(module, _BatchNorm))
    num_batches = 0
    try:
        with torch.no_grad(), _random_numbers_kept(model):
            _start_anew(model, layers)
            for batch in batches:
                forward(model, batch)
                num_batches += 1
    finally:
        _put_back([*passing, *modes])
    if not num_batches:
        raise ConfigError(
            "batches gave no batch, so there is nothing to compute BatchNorm statistics from. An iterator can be read "
            "once only: pass a list or a loader, or a new iterator each time"
        )


def _start_anew(model: nn.Module, layers: Iterable[Any]) -> None:
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over all batches
    model.train()


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Dropout and loaders draw random numbers that training would have drawn."""
    accelerator, indices = torch.accelerator.current_accelerator(), set()
    if accelerator is not None:
        devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
        indices = {device.index for device in devices if device.type == accelerator.type}
        indices.add(torch.accelerator.current_device_index())  # offloaded weights are computed with there
    with torch.random.fork_rng(sorted(indices)):
        yield


@contextmanager
def _meeting(group: dist.ProcessGroup | None, doing: str) -> Iterator[None]:
    """Collective: all ranks must call. What the body does may fail on one rank: then all ranks raise.

    Unlike `all_or_none`, for a body that may communicate: the others may be stuck in it because this rank failed, so a
    rank with an error waits for them for a while only, and then lets its error be seen.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:
        error = failure
    if rendezvous(group, grace_s=swap.PATIENCE_S if error is None else swap.RENDEZVOUS_GRACE_S):
        agree(group, error, doing)
    elif error is not None:
        raise error
    else:
        raise PeerError(
            f"another rank failed while {doing}, or did not come; this rank undid its part. The cause is in the "
            "traceback of that rank"
        )


# -- the mean over the ranks -------------------------------------------------------------------------------------------


@contextmanager
def averaged_buffers(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Collective: all ranks must call. Inside, floating-point buffers are their mean over the ranks of `group`.

    For buffers that each rank has of its own, such as BatchNorm statistics. Persistent buffers are summed in float64
    and rounded once to their own dtype; integers, non-persistent buffers and DTensors stay as they are. Each rank's own
    values are back bit for bit on leaving, which is local: a rank that leaves by an exception waits for no other.

    Args:
        model: a plain module, one that DDP or FSDP wraps, or a DeepSpeedEngine.
        group: the ranks to average over; by default all ranks of the job.

    Raises `UnsupportedModelError` if ranks have different buffers, and `PeerError` if another rank failed; everything
    is as before then. While it is entered it needs 8 bytes an element, beside the values that it keeps.
    """
    _require_module(model)
    group, doing = _everyone(group), "averaging buffers over the ranks"
    with all_or_none(group, doing):
        entries = _averageable(model)
        kept: list[_Kept] = [_Buffer(e.slot, e.key, e.tensor.detach().clone()) for e in entries]
        live = [entry.tensor.detach() for entry in entries]
        sums = _laid_end_to_end(live, group)
        switches = _kept_ddp(model)
    _refuse_differences(gather_objects(group, [(e.name, tuple(e.tensor.shape), e.tensor.dtype) for e in entries]))
    _add_up(sums, group)
    try:
        with all_or_none(group, doing):
            _write_means(live, sums, group)
        del sums
        _switch_off(switches)
        yield
    finally:
        _put_back([*kept, *switches])


def _averageable(model: nn.Module) -> list[names.Entry]:
    unique, _ = names.split_ties([entry for entry in names.entries(model) if entry.is_buffer])
    return [
        entry
        for entry in unique
        if entry.tensor.is_floating_point() and not isinstance(entry.tensor, DTensor) and _is_writable(entry.tensor)
    ]


@torch.no_grad()
def _laid_end_to_end(live: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """A copy of all elements in row-major order, where they can travel (1-D, float64)."""
    device = comm_device(group, live[0].device if live else None)
    flat = torch.empty(sum(map(Tensor.numel, live)), dtype=torch.float64, device=device)
    for tensor, window in _windows(live, flat):
        window.copy_(tensor)
    return flat


def _windows(live: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for tensor in live:
        yield tensor, flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()


def _add_up(sums: Tensor, group: dist.ProcessGroup | None) -> None:
    if size_of(group) > 1:
        for start in range(0, sums.numel(), _BUCKET_NUMEL):
            dist.all_reduce(sums[start : start + _BUCKET_NUMEL], group=group)


@torch.no_grad()
def _write_means(live: Sequence[Tensor], sums: Tensor, group: dist.ProcessGroup | None) -> None:
    sums.div_(size_of(group))
    for tensor, window in _windows(live, sums):
        tensor.copy_(window)


def _refuse_differences(ranks: Sequence[list[tuple[object, ...]]]) -> None:
    """All ranks see the same tables, so all raise or none does."""
    for rank, rows in enumerate(ranks):
        if rows != ranks[0]:
            mine, theirs = set(ranks[0]), set(rows)
            raise UnsupportedModelError(
                f"buffers cannot be averaged over ranks that have different ones: rank {rank} of the group has "
                f"{sorted(map(str, theirs - mine)) or 'another order'} where rank 0 has "
                f"{sorted(map(str, mine - theirs)) or 'none of these'}. Pass as `group` the ranks that hold the same "
                "part of the model"
            )


# -- both --------------------------------------------------------------------------------------------------------------


def _everyone(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return dist.group.WORLD if group is None and dist.is_initialized() else group


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module or a DeepSpeedEngine, not {type(model).__name__}")
