"""When the average takes in the weights: once for each batch with a real optimizer step that the schedule wants.

Which steps were taken in is seen from values: a Steps callback keeps the weights after each batch that changed them,
whatever Lightning counts, and `taken_in` computes their average by the formula.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging

from .modules import NUM_BATCHES, Tiny, TwoOptimizers, batches, make_optimizer
from .runs import full_weights, module, run, trainer
from .strategies import STRATEGIES
from .test_every_strategy import DECAY, At, full_average, plain_average, with_weights
from .test_harness import NUM_STEPS, assert_same, over, plain_loss

ENGINES = ("single", "ddp", "fsdp2", "deepspeed_2")  # one of each way to keep an average
BUFFERS = ("shift", "calls")
Weights = dict[str, Tensor]


class Steps(lightning.Callback):
    """The full raw weights before training, and after each batch that changed some of them."""

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self.batches: list[int] = []  # which batches these were, from 1 in the first epoch
        self._num_batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(full_weights(trainer))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._num_batches += 1
        before, now = self.weights[-1], full_weights(trainer)
        if any(not torch.equal(before[name], value) for name, value in now.items() if name not in BUFFERS):
            self.weights.append(now)
            self.batches.append(self._num_batches)


class Asked(EMAWeightAveraging):
    """Keeps the step indices that it was asked about."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.asked: list[int] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            self.asked.append(step_idx)
        return super().should_update(step_idx, epoch_idx)


class EachEpoch(WeightAveraging):
    """The override that Lightning's documentation shows."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def taken_in(steps: Sequence[int], weights: Sequence[Weights], *, decay: float = DECAY) -> Weights:
    """The average of the weights after these steps, from 1; what is never averaged is that of the last."""
    average = plain_average({index: weights[step] for index, step in enumerate(steps)}, decay)
    return average | {"calls": weights[-1]["calls"]}


def mean_of(weights: Sequence[Weights]) -> Weights:
    """The plain mean, one after the other; what is never averaged is that of the last."""
    mean = {name: value.clone() for name, value in weights[0].items()}
    for number, live in enumerate(weights[1:], start=1):
        for name, value in live.items():
            mean[name] = mean[name].lerp(value, 1 / (number + 1)) if value.is_floating_point() else value.clone()
    return mean


def fit_and_look(
    tmp_path: Path,
    name: str,
    kind_of_module: type[Tiny] = Tiny,
    callback: Any = None,
    module_options: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """One fit, seen from outside."""
    callback, steps = callback or Asked(decay=DECAY), Steps()
    fitted = trainer(tmp_path, name, [steps, callback], **settings)
    fitted.fit(module(name, kind_of_module, **(module_options or {})))
    return {
        "counts": (callback.average.n_averaged, callback.average.num_steps),
        "asked": getattr(callback, "asked", None),
        "average": full_average(callback),
        "weights": steps.weights,
        "batches": steps.batches,
    }


# -- once for each step ------------------------------------------------------------------------------------------------


@over(lambda row: row in [STRATEGIES[name] for name in ENGINES])
def test_accumulated_gradients(name: str, tmp_path: Path) -> None:
    """P09, P99: one update for each optimizer step, not for each batch; an epoch has 3 batches and 1 more.

    DeepSpeed goes on accumulating where the epoch ends; the other strategies step there.
    """
    stepped = [3, 6] if name == "deepspeed_2" else [3, 4, 7, 8]
    own = {"own_batches": True}
    ranks = run(name, fit_and_look, tmp_path, name=name, module_options=own, accumulate_grad_batches=3)
    for seen in ranks:
        assert seen["batches"] == stepped
        assert seen["counts"] == (len(stepped), len(stepped))
        assert seen["asked"] == list(range(len(stepped)))
        assert_same(seen["average"], taken_in(range(1, len(stepped) + 1), seen["weights"]) | live_calls(seen))
        assert not torch.equal(seen["average"]["head.weight"], seen["weights"][0]["head.weight"])
        assert_same(seen["average"], ranks[0]["average"])


def live_calls(seen: dict[str, Any]) -> Weights:
    """Buffers that count batches are live, and batches may come after the last step."""
    assert seen["average"]["calls"] == NUM_STEPS
    return {"calls": seen["average"]["calls"]}


class WithoutWrappers(TwoOptimizers):
    """Lightning does not see these steps, and its count of them stays 0."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return super().optimizers(use_pl_optimizer=False)


class Irregular(TwoOptimizers):
    """No step with some batches, several with others."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            super().training_step(batch, 1)
            super().training_step(batch, 1)


def fit_by_hand(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    kinds = (TwoOptimizers, WithoutWrappers, Irregular)
    return [
        fit_and_look(tmp_path, name, kind, Asked(decay=DECAY, update_every_n_steps=2), limit_val_batches=0)
        for kind in kinds
    ]


@over(lambda row: row.two_optimizers and row in [STRATEGIES[name] for name in ENGINES])
def test_two_optimizers_stepped_by_hand(name: str, tmp_path: Path) -> None:
    """P11, L3: every second batch that stepped, however many optimizers did, and whether or not Lightning saw it."""
    stepped = {"TwoOptimizers": 8, "WithoutWrappers": 8, "Irregular": 4}
    for runs in run(name, fit_by_hand, tmp_path, name=name):
        for seen, number in zip(runs, stepped.values(), strict=True):
            assert len(seen["batches"]) == number
            assert seen["asked"] == list(range(number))
            assert seen["counts"] == (number // 2, number)
            assert_same(seen["average"], taken_in(range(1, number + 1, 2), seen["weights"]))


# -- steps that were none ----------------------------------------------------------------------------------------------


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


@over(lambda row: row in (STRATEGIES["single"], STRATEGIES["fsdp2"]))
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


# -- at the end of epochs ----------------------------------------------------------------------------------------------


@pytest.mark.own_processes
@pytest.mark.parametrize("often", [{}, {"val_check_interval": 0.5}], ids=["once", "twice"])
def test_updates_of_epochs_come_before_their_validation(often: dict[str, Any], tmp_path: Path) -> None:
    """P31: the metric at the end of an epoch is that of the average with this epoch in it."""
    losses: list[float] = []
    look = At("on_validation_end", lambda t: losses.append(float(t.callback_metrics["val_loss"])))
    steps, callback = Steps(), EachEpoch()
    trainer(tmp_path, "single", [steps, look, callback], **often, max_epochs=3).fit(module("single"))
    ends = steps.weights[NUM_BATCHES::NUM_BATCHES]
    at_ends = losses[len(often) :: 1 + len(often)]
    assert at_ends == pytest.approx(
        [plain_loss(with_weights(mean_of(ends[:epochs])), first=100) for epochs in (1, 2, 3)], rel=1e-6
    )
    assert len(losses) == 3 * (1 + len(often))
    assert_same(full_average(callback), mean_of(ends))
    assert (callback.average.n_averaged, callback.average.num_steps) == (3, 3 * NUM_BATCHES)


SAVING = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")


def fit_epochs_in_two(tmp_path: Path, name: str) -> tuple[list[Weights], list[Any], list[Weights]]:
    """Weights of one long run; counts and averages of runs resumed from checkpoints around the end of an epoch."""

    def save(moment: str) -> Any:
        return lambda t: t.save_checkpoint(tmp_path / moment) if t.is_last_batch and t.current_epoch == 0 else None

    steps, counts, averages = Steps(), [], []
    savers = [At(moment, save(moment)) for moment in SAVING]
    trainer(tmp_path, name, [steps, EachEpoch(), *savers]).fit(module(name))
    for moment in SAVING:
        callback = EachEpoch()
        trainer(tmp_path, name, [callback]).fit(module(name), ckpt_path=tmp_path / moment)
        counts.append(callback.average.n_averaged)
        averages.append(full_average(callback))
    return steps.weights, counts, averages


@over(lambda row: row in [STRATEGIES[name] for name in ("single", "fsdp2")])
def test_an_epoch_is_not_averaged_again_by_a_resumed_run(name: str, tmp_path: Path) -> None:
    """P31: its end comes again for a run that was saved between the update and the end of the epoch."""
    for weights, counts, averages in run(name, fit_epochs_in_two, tmp_path, name=name):
        assert counts == [2, 2, 2]
        for average in averages:
            assert_same(average, mean_of(weights[NUM_BATCHES::NUM_BATCHES]))


class ThirdsAndEpochs(WeightAveraging):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int | None] = []  # about epochs

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None:
            self.asked.append(epoch_idx)
        return epoch_idx == 1 if step_idx is None else step_idx % 3 == 2


@pytest.mark.own_processes
def test_steps_and_epochs(tmp_path: Path) -> None:
    """An override may choose some of both, and is asked once about each; the step comes before the epoch's end."""
    seen = fit_and_look(tmp_path, "single", callback=ThirdsAndEpochs())
    assert_same(seen["average"], mean_of([seen["weights"][step] for step in (3, 6, 8)]))
    assert seen["counts"] == (3, NUM_STEPS)
    assert seen["asked"] == [0, 1]


# -- arguments ---------------------------------------------------------------------------------------------------------


SCHEDULES: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ({"update_every_n_steps": 3}, [1, 4, 7]),
    ({"update_starting_at_step": 5}, [6, 7, 8]),
    ({"update_every_n_steps": 2, "update_starting_at_step": 3}, [5, 7]),
    ({"update_starting_at_epoch": 0}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ({"update_starting_at_epoch": 1}, [5, 6, 7, 8]),
    ({"update_starting_at_epoch": 1, "update_every_n_steps": 3}, [7]),
    ({"update_starting_at_epoch": 1, "update_starting_at_step": 6}, [7, 8]),
    ({"update_every_n_steps": 0}, [4, 8]),
    ({"update_every_n_steps": 0, "update_starting_at_epoch": 1}, [8]),
]


@pytest.mark.own_processes
@pytest.mark.parametrize(("arguments", "expected"), SCHEDULES, ids=lambda value: str(value).replace(" ", ""))
def test_arguments_of_the_schedule(arguments: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    """P14, L9: each says which updates there are, alone and with others."""
    seen = fit_and_look(tmp_path, "single", callback=EMAWeightAveraging(decay=DECAY, **arguments))
    assert seen["counts"] == (len(expected), NUM_STEPS)
    assert_same(seen["average"], taken_in(expected, seen["weights"]))


@pytest.mark.own_processes
def test_other_arguments(tmp_path: Path) -> None:
    """P14: decay, buffers, which parameters, where they are kept; a function instead of a rule."""
    seen = fit_and_look(tmp_path, "single", callback=EMAWeightAveraging("cpu", False, 0.25))
    everything, last = taken_in(range(1, 9), seen["weights"], decay=0.25), seen["weights"][-1]
    assert_same(seen["average"], everything | {"shift": last["shift"]})
    only = WeightAveraging(avg_fn=_halved, include=_is_head)
    seen = fit_and_look(tmp_path, "single", callback=only)
    halved = taken_in(range(1, 9), seen["weights"], decay=0.5)
    kept = {name for name in halved if name.startswith("head") or name == "shift"}
    assert_same(seen["average"], seen["weights"][-1] | {name: halved[name] for name in kept})
    seen = fit_and_look(tmp_path, "single", callback=WeightAveraging())
    assert_same(seen["average"], mean_of(seen["weights"][1:]))


def _halved(averaged: Tensor, current: Tensor, num_averaged: int) -> Tensor:
    return averaged.lerp(current, 0.5)


def _is_head(name: str, tensor: Tensor) -> bool:
    return name.startswith("head")


class Stream(IterableDataset[Any]):
    """Batches for ever: nobody knows how long an epoch is."""

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            yield from batches(1, first=number)
            number += 1


class Streaming(Tiny):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=None)


ENDLESS: list[tuple[dict[str, Any], list[int]]] = [
    ({"max_epochs": -1, "max_steps": 6}, [6]),
    ({"max_epochs": -1, "max_steps": 6, "limit_train_batches": 4}, [4, 6]),
    ({"max_epochs": 2, "limit_train_batches": 3}, [3, 6]),
]


@pytest.mark.own_processes
@pytest.mark.parametrize(("settings", "ends"), ENDLESS, ids=["endless", "endless in parts", "in parts"])
def test_endless_training(settings: dict[str, Any], ends: list[int], tmp_path: Path) -> None:
    """P33: no end of the run needs to be known, nor any of its epochs."""
    seen = fit_and_look(tmp_path, "single", Streaming, **settings)
    assert_same(seen["average"], taken_in(range(1, 7), seen["weights"]))
    seen = fit_and_look(tmp_path, "single", Streaming, EachEpoch(), **settings)
    assert_same(seen["average"], mean_of([seen["weights"][end] for end in ends]))


# -- what is left alone, and what is told ------------------------------------------------------------------------------


class Scheduled(Tiny):
    """Another learning rate at every step; with `plateau`, another once the metric no longer falls."""

    def __init__(self, plateau: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.plateau = plateau

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.plateau:
            scheduler = ReduceLROnPlateau(optimizer, patience=0)  # the loss on unseen noise rises
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        return [optimizer], [{"scheduler": LambdaLR(optimizer, _falling), "interval": "step"}]


def _falling(step: int) -> float:
    return 1 / (1 + step)


@pytest.mark.own_processes
def test_schedulers_are_left_alone(tmp_path: Path) -> None:
    """P28: trained, saved and resumed as without the callback; the plateau's metric is the average's."""
    weights, states = {}, {}
    for who, callbacks in {"alone": [], "averaged": [EMAWeightAveraging(decay=DECAY, end_with="raw")]}.items():
        path = tmp_path / f"{who}.ckpt"
        saver = At("on_train_end", lambda t, path=path: t.save_checkpoint(path))
        trainer(tmp_path, "single", [*callbacks, saver], max_epochs=1).fit(module("single", Scheduled))
        resumed = trainer(tmp_path, "single", callbacks)
        resumed.fit(module("single", Scheduled), ckpt_path=path)
        weights[who] = full_weights(resumed)
        states[who] = resumed.lr_scheduler_configs[0].scheduler.state_dict()
    assert_same(weights["averaged"], weights["alone"])
    assert states["averaged"] == states["alone"]
    assert states["averaged"]["last_epoch"] == NUM_STEPS

    losses: list[float] = []
    look = At("on_validation_end", lambda t: losses.append(float(t.callback_metrics["val_loss"])))
    fitted = trainer(tmp_path, "single", [EMAWeightAveraging(decay=DECAY), look], max_epochs=3)
    fitted.fit(module("single", Scheduled, plateau=True))
    scheduler = fitted.lr_scheduler_configs[0].scheduler
    plain = ReduceLROnPlateau(make_optimizer("sgd", list(Tiny().parameters())), patience=0)
    for loss in losses:
        plain.step(loss)
    assert (float(scheduler.best), scheduler.get_last_lr()) == (float(plain.best), plain.get_last_lr())
    assert plain.get_last_lr()[0] < 0.1


def distance(weights: Weights, average: Weights) -> float:
    """Of everything averaged, in one vector."""
    names = [name for name, value in weights.items() if value.is_floating_point()]
    live, averaged = (torch.cat([full[name].double().flatten() for name in names]) for full in (weights, average))
    return float((live - averaged).norm() / live.norm())


@over(lambda row: row in (STRATEGIES["single"], STRATEGIES["fsdp2"]))
@pytest.mark.parametrize("mean", [False, True])
def test_logged(name: str, mean: bool, tmp_path: Path) -> None:
    """Every third update: its decay, and how far the average then is from the weights."""
    for seen in run(name, fit_logged, tmp_path, name=name, mean=mean):
        weights = seen["weights"]
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["average/distance"]]
    assert [int(row["step"]) for row in rows] == [2, 5]
    for row, step in zip(rows, (3, 6), strict=True):
        average = mean_of(weights[1 : step + 1]) if mean else taken_in(range(1, step + 1), weights)
        assert float(row["average/distance"]) == pytest.approx(distance(weights[step], average), rel=1e-6)
        assert float(row["average/decay"]) == pytest.approx(1 - 1 / step if mean else DECAY)


def fit_logged(tmp_path: Path, name: str, mean: bool) -> dict[str, Any]:
    options = {"log_every_n_updates": 3}
    callback = WeightAveraging(**options) if mean else EMAWeightAveraging(decay=DECAY, **options)
    return fit_and_look(tmp_path, name, callback=callback, logger=CSVLogger(tmp_path))
