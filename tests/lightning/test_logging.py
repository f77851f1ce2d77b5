"""What is told of the updates, and the schedulers that are left alone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging

from .modules import Tiny, make_optimizer
from .reference import DECAY, NUM_STEPS, Weights, assert_same, mean_of
from .runs import full_weights, module, run, trainer
from .steps import fit_and_look, taken_in
from .strategies import among
from .watching import At


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


@among("single", "fsdp2")
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
