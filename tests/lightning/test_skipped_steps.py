"""Steps that were none: what an optimizer left out is no update, and weights that are not finite are not averaged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from .modules import Tiny
from .reference import DECAY, assert_same
from .runs import module, run, trainer
from .steps import Asked, Steps, fit_and_look, taken_in
from .strategies import among
from .watching import full_average


class Overflowing(Tiny):
    """The second batch of each epoch has infinite gradients."""

    def __init__(self, fused: type[torch.optim.Optimizer] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.fused = fused

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x.to(self.head.weight.dtype)).float() - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)

    def configure_optimizers(self) -> Any:
        if self.fused is None:
            return super().configure_optimizers()
        return self.fused(self.parameters(), lr=0.05, fused=True)


APPLIED = [1, 3, 4, 5, 7, 8]  # batches with a step


@pytest.mark.own_processes
@pytest.mark.parametrize("fused", [None, torch.optim.SGD, torch.optim.Adam])
def test_steps_that_a_gradient_scaler_leaves_out(fused: Any, tmp_path: Path) -> None:
    """P100: neither an update nor a step to the schedule; also where the optimizer itself is told to do nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    mixed = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    seen = fit_and_look(tmp_path, "single", Overflowing, None, {"fused": fused}, plugins=[mixed])
    assert scaler.get_scale() == 4.0
    assert seen["batches"] == APPLIED
    assert seen["asked"] == list(range(6))
    assert seen["counts"] == (6, 6)
    assert_same(seen["average"], taken_in(range(1, 7), seen["weights"]))


def fit_in_fp16(tmp_path: Path) -> dict[str, Any]:
    deepspeed = pytest.importorskip("deepspeed")
    scale = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    callback, steps = Asked(decay=DECAY), Steps()
    with mock.patch.object(type(deepspeed.get_accelerator()), "is_fp16_supported", return_value=True):
        options = {"fp16": scale}
        fitted = trainer(tmp_path, "deepspeed_2", [steps, callback], options=options, precision="16-true")
        fitted.fit(module("deepspeed_2", Overflowing))
    return {"batches": steps.batches, "asked": callback.asked, "counts": callback.average.n_averaged}


def test_steps_that_deepspeed_leaves_out(tmp_path: Path) -> None:
    """P100: DeepSpeed says that CPUs have no fp16; torch's do."""
    for seen in run("deepspeed_2", fit_in_fp16, tmp_path):
        assert seen["batches"] == APPLIED
        assert seen["asked"] == list(range(6))
        assert seen["counts"] == 6


class Poison(lightning.Callback):
    """From the end of the second batch of each epoch to its `Antidote`, the last rank has a NaN in one weight."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and trainer.global_rank == trainer.world_size - 1:
            weight = self.weight(pl_module)
            self.kept = weight.clone()
            weight[0, 0] = float("nan")

    @staticmethod
    def weight(pl_module: Any) -> Tensor:
        weight = pl_module.head.weight.detach()
        return weight.to_local() if hasattr(weight, "to_local") else weight


class Antidote(lightning.Callback):
    def __init__(self, poison: Poison) -> None:
        self.poison = poison

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.poison.kept is not None:
            self.poison.weight(pl_module).copy_(self.poison.kept)
            self.poison.kept = None


def fit_poisoned(tmp_path: Path, name: str, skip: bool) -> tuple[dict[str, Any], list[str]]:
    callback, steps, poison = Asked(decay=DECAY, skip_nonfinite=skip), Steps(), Poison()
    fitted = trainer(tmp_path, name, [steps, poison, callback, Antidote(poison)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*NaN")
        fitted.fit(module(name))
    seen = {"asked": callback.asked, "average": full_average(callback), "weights": steps.weights}
    return seen, [str(warning.message) for warning in caught]


@among("single", "fsdp2")
def test_weights_that_are_not_finite(name: str, tmp_path: Path) -> None:
    """P100: with `skip_nonfinite` all ranks leave out what is a NaN on one of them; without, the average keeps it."""
    for rank, (seen, said) in enumerate(run(name, fit_poisoned, tmp_path, name=name, skip=True)):
        assert seen["asked"] == list(range(6))
        assert_same(seen["average"], taken_in(APPLIED, seen["weights"]))
        assert said == (
            ["sharded_avg: the weights have a NaN or an infinity: this update of the average is left out"] * 2
            if rank == 0
            else []
        )
    for seen, _ in run(name, fit_poisoned, tmp_path, name=name, skip=False):
        assert seen["average"]["head.weight"].isnan().any()
