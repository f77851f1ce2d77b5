"""BatchNorm statistics while a block lasts: those of the weights that are in the model now, from batches run forward.

    with average.swapped(), refreshed_batch_norm(model, batches), averaged_buffers(model):
        evaluate(model)    # averaged weights, statistics recomputed for them, the same on all ranks

Leaving is local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError
from ..ranks import accelerator, all_or_none, decided, everyone, interruptible, uninterrupted
from ..weights.layouts.detect import waits_in_forward
from .kept import Kept, require_module

_BatchNorm = nn.modules.batchnorm._BatchNorm  # private, but the one class of all kinds, as in torch's own update_bn

_DOING = "recomputing BatchNorm statistics"
_NONE = object()  # no batch

Forward = Callable[[nn.Module, Any], object]


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
    training mode, without gradients. Each rank uses its own batches. On leaving, also by an exception, the live
    statistics, modes and momenta are back bit for bit, and training goes on as if there had been no block: torch's
    random numbers and every other buffer that the batches changed are back as soon as the batches have run.

    Where ranks wait for each other in forward (FSDP, TP, ZeRO 3, SyncBatchNorm), they meet before each batch: one whose
    batches fail, or end before the others', is told to all, which raise. What fails in the middle of a forward is
    raised there; the others are in that forward until the engine's process group gives up, and are told why then.

    Args:
        model: what forward is called on: a plain module, one that DDP or FSDP wraps, or a DeepSpeedEngine.
        batches: on the model's device. A model without BatchNorm reads none of them.
        forward: `forward(model, batch)` runs one batch; by default the batch, or the first element of a tuple or
            list, is the input.
        group: the ranks that do this together; by default all ranks of the job.

    Raises `ConfigError` if there is no batch, and `PeerError` if another rank failed; everything is as before then.
    """
    group, kept, run = everyone(group), Kept(), forward or _first_is_input
    layers: list[Any] = []
    with uninterrupted():
        try:
            with ExitStack() as passing:
                waits = False

                def prepare() -> bool:
                    nonlocal waits
                    require_module(model)
                    layers.extend(module for module in model.modules() if isinstance(module, _BatchNorm))
                    kept.buffers(layers)
                    kept.attribute(model.modules(), "training")
                    kept.attribute(layers, "momentum")
                    kept.no_sync(model)
                    if layers:
                        passing.enter_context(_reset(model, layers))
                    is_synced = any(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
                    waits = bool(layers) and (is_synced or waits_in_forward(model))
                    return waits

                is_in_step, num_batches = decided(group, prepare, any, _DOING), 0
                if is_in_step:
                    num_batches = _in_step(group, model, batches if layers else (), run, waits=waits)
                with all_or_none(group, _DOING):
                    if layers and not is_in_step:
                        for batch in batches:
                            run(model, batch)
                            num_batches += 1
                    if layers and not num_batches:
                        raise ConfigError(
                            "batches gave no batch, so there is nothing to compute BatchNorm statistics from. An "
                            "iterator can be read once only: pass a list or a loader, or a new iterator each time"
                        )
                    passing.close()
            with interruptible():
                yield
        finally:
            kept.put_back()


def _first_is_input(model: nn.Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _in_step(
    group: dist.ProcessGroup | None, model: nn.Module, batches: Iterable[Any], run: Forward, *, waits: bool
) -> int:
    """Collective: all ranks must call. How many batches this rank has run; before each, and at the end, all meet.

    `waits`: whether others wait for this rank in forward. Those ranks must have equally many batches.
    """
    iterator, held, num_batches = None, [_NONE], 0
    failure: BaseException | None = None

    def read() -> tuple[bool, bool]:
        nonlocal iterator
        if failure is not None:
            raise failure
        iterator = iter(batches) if iterator is None else iterator
        held[0] = next(iterator, _NONE)
        return waits, held[0] is not _NONE

    def goes_on(ranks: list[tuple[bool, bool]]) -> bool:
        lacking = [rank for rank, (is_waited_for, has_one) in enumerate(ranks) if is_waited_for and not has_one]
        if 0 < len(lacking) < sum(is_waited_for for is_waited_for, _ in ranks):
            raise ConfigError(
                f"batches: ranks {lacking} of the group have no batch after {num_batches}, and others have more, which "
                "would wait for them in forward for ever. Give all ranks equally many"
            )
        return any(has_one for _, has_one in ranks)

    while decided(group, read, goes_on, _DOING):
        try:
            with interruptible():
                if held[0] is not _NONE:
                    run(model, held[0])
                    num_batches += 1
        except BaseException as error:
            failure = error  # told to the others where all meet next
    return num_batches


@contextmanager
def _reset(model: nn.Module, layers: Sequence[Any]) -> Iterator[None]:
    """Inside, batches are taken into new statistics; what else they change is put back."""
    passing = Kept()
    passing.buffers(module for module in model.modules() if not isinstance(module, _BatchNorm))
    passing.attribute(model.modules(), "training")
    passing.attribute(layers, "momentum")
    try:
        with torch.no_grad(), _random_numbers_kept(model):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain mean over all batches
            model.train()
            yield
    finally:
        passing.put_back()


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Dropout and loaders draw random numbers that training would have drawn."""
    current = accelerator()
    if current is None:
        devices, kind = [], "cpu"
    else:  # the current one, too: offloaded weights are computed with there
        used = [current, *(tensor.device for tensor in (*model.parameters(), *model.buffers()))]
        devices, kind = sorted({device.index for device in used if device.type == current.type}), current.type
    with torch.random.fork_rng(devices, device_type=kind):
        yield
