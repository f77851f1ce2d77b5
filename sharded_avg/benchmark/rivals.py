"""What a user would pick instead; each function gives a call that does one update with decay 0.999."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from .weights import flat_pair

DECAY = 0.999
Update = Callable[[], object]


def flat_lerp(numel: int) -> Update:
    """The base: one `lerp_` over flat fp32 tensors, which no engine's weights are."""
    average, weights = flat_pair(numel)
    return lambda: average.lerp_(weights, 1 - DECAY)


def lerp_each(model: nn.Module) -> Update:
    """A loop of `lerp_` over the parameters."""
    weights = [parameter.detach() for parameter in model.parameters()]
    averages = [tensor.clone() for tensor in weights]

    def update() -> None:
        for average, live in zip(averages, weights, strict=True):
            average.lerp_(live, 1 - DECAY)

    return update


def averaged_model(model: nn.Module, **function: Any) -> Update:
    """`torch.optim.swa_utils.AveragedModel`."""
    averaged = swa_utils.AveragedModel(model, **function)
    return lambda: averaged.update_parameters(model)


def ema_pytorch(model: nn.Module) -> Update:
    """The ema-pytorch package; raises `ImportError` without it."""
    from ema_pytorch import EMA

    ema = EMA(model, beta=DECAY, update_every=1, update_after_step=-1)
    update: Update = ema.update
    return update


def lightning_callback(model: nn.Module) -> Update:
    """What Lightning's `EMAWeightAveraging` does after a training batch; raises `ImportError` without Lightning."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = LightningModule()
    module.net = model
    trainer: Any = SimpleNamespace(global_step=0, current_epoch=0)
    callback = EMAWeightAveraging(decay=DECAY)
    callback.setup(trainer, module, "fit")

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return update


def gather_then_average(model: nn.Module) -> Update:
    """Collective: all ranks must call, and so for the update. Full DTensors are gathered, then averaged."""
    parameters: list[Any] = list(model.parameters())
    averages = [parameter.full_tensor().detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update() -> None:
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.full_tensor(), 1 - DECAY)

    return update


def installed(model: nn.Module) -> Iterator[tuple[str, Update]]:
    """Every rival that works on plain modules and is installed, by name."""
    torch_functions: Any = swa_utils  # untyped
    yield (
        "torch AveragedModel, multi_avg_fn",
        averaged_model(model, multi_avg_fn=torch_functions.get_ema_multi_avg_fn(DECAY)),
    )
    yield "torch AveragedModel, avg_fn", averaged_model(model, avg_fn=torch_functions.get_ema_avg_fn(DECAY))
    for name, make in (("ema-pytorch", ema_pytorch), ("Lightning EMAWeightAveraging", lightning_callback)):
        try:
            update = make(model)
        except ImportError:
            continue
        yield name, update
