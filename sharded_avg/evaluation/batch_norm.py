"""BatchNorm statistics while a block lasts: those of the weights that are in the model now, from batches run forward.

    with average.swapped(), refreshed_batch_norm(model, batches), averaged_buffers(model):
        evaluate(model)    # averaged weights, statistics recomputed for them, the same on all ranks

Leaving is local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError
from ..ranks import accelerator, all_or_none, everyone, interruptible, uninterrupted
from .kept import Kept, require_module

_BatchNorm = nn.modules.batchnorm._BatchNorm  # private, but the one class of all kinds, as in torch's own update_bn

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
    kept = Kept()
    with uninterrupted():
        try:
            with all_or_none(everyone(group), "recomputing BatchNorm statistics"):
                require_module(model)
                layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
                kept.buffers(layers)
                kept.attribute(model.modules(), "training")
                kept.attribute(layers, "momentum")
                kept.no_sync(model)
                if layers:
                    _recompute(model, layers, batches, forward or _first_is_input)
            with interruptible():
                yield
        finally:
            kept.put_back()


def _first_is_input(model: nn.Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _recompute(model: nn.Module, layers: Sequence[Any], batches: Iterable[Any], forward: Forward) -> None:
    """Leave nothing changed but the statistics."""
    passing = Kept()
    passing.buffers(module for module in model.modules() if not isinstance(module, _BatchNorm))
    passing.attribute(model.modules(), "training")
    passing.attribute(layers, "momentum")
    num_batches = 0
    try:
        with torch.no_grad(), _random_numbers_kept(model):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain mean over all batches
            model.train()
            for batch in batches:
                forward(model, batch)
                num_batches += 1
    finally:
        passing.put_back()
    if not num_batches:
        raise ConfigError(
            "batches gave no batch, so there is nothing to compute BatchNorm statistics from. An iterator can be read "
            "once only: pass a list or a loader, or a new iterator each time"
        )


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
