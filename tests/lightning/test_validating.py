"""What an evaluation sees: the average, the raw weights or both, by the metrics of plain models that hold them.

And what it leaves behind: nothing. The raw weights are back bit for bit, and training goes on as without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torchmetrics import MeanMetric

from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny, batches, loader
from .reference import (
    DECAY,
    NUM_STEPS,
    Weights,
    assert_same,
    averages_after,
    losses,
    plain_average,
    plain_loss,
    plain_training,
    with_weights,
)
from .runs import Recorder, module, run, trainer
from .strategies import among
from .watching import At, Looks

CHOICES = ("average", "raw", "both")


def fit_validating(
    tmp_path: Path, name: str, arguments: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """One fit for each of these arguments: what was seen after each validation, and the raw weights of each step."""
    seen = []
    for some in arguments:
        callback, looks, recorder = EMAWeightAveraging(decay=DECAY, **some), Looks(), Recorder()
        fitted = trainer(tmp_path, name, [callback, looks, recorder], **settings)
        fitted.fit(module(name))
        seen.append({"metrics": looks.metrics, "weights": looks.weights, "steps": recorder.weights})
    return seen


@among("single", "ddp", "fsdp_sharded", "fsdp2", "deepspeed_2")
def test_validation_during_fit(name: str, tmp_path: Path) -> None:
    """P03, P10, P90, P91: metrics of the average, of raw weights or of both; raw until the average begins.

    After a validation the raw weights are those of a plain loop, and so are those of each later step.
    """
    _, weights = plain_training(NUM_STEPS)
    late = {step: plain_average({s: weights[s] for s in range(4, step + 1)}) for step in weights if step > 3}
    averages, at = averages_after(weights), (2, 4, 6, 8)
    arguments = [*({"evaluate_with": choice} for choice in CHOICES), {"update_starting_at_step": 3}]
    expected = [[losses("val_loss", choice, averages[step], weights[step]) for step in at] for choice in CHOICES]
    expected.append([losses("val_loss", "average", late.get(step, weights[step]), {}) for step in at])
    for fits in run(name, fit_validating, tmp_path, name=name, arguments=arguments, settings={"val_check_interval": 2}):
        for number, (seen, metrics) in enumerate(zip(fits, expected, strict=True)):
            passes = 2 if CHOICES[number : number + 1] == ("both",) else 1
            for found, wanted in zip(seen["metrics"][passes - 1 :: passes], metrics, strict=True):
                assert found == pytest.approx(wanted, rel=1e-6)
            for found, step in zip(seen["weights"][passes - 1 :: passes], at, strict=True):
                assert_same(found, weights[step])
            assert {step: found for step, found in seen["steps"].items() if step}.keys() == weights.keys()
            for step, found in weights.items():
                assert_same(seen["steps"][step], found)
        averaged, _, both, _ = fits
        assert [each["val_loss"] for each in both["metrics"][1::2]] == [
            each["val_loss"] for each in averaged["metrics"]
        ]


class WithMetrics(Tiny):
    """A metric object, two loaders of validation, and a hook that logs; calls are counted in the sanity check, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mean = MeanMetric()
        self.num_calls = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.num_calls += 1
        loss = self._loss(batch)
        self.mean.update(loss)
        self.log("val_loss", loss, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("mean", self.mean.compute(), sync_dist=True)
        self.log_dict({"twice": 2 * self.mean.compute()}, sync_dist=True)
        self.mean.reset()

    def val_dataloader(self) -> Any:
        return [loader(batches(2, first=100)), loader(batches(2, first=200))]


class MetricLogged(Tiny):
    """A metric object that Lightning computes and resets."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mean = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean(self._loss(batch))
        self.log("val_loss", self.mean)


def fit_both(tmp_path: Path, name: str) -> dict[str, Any]:
    """Two loaders and two checkpoint callbacks that monitor either; a metric object."""
    monitors = {"averaged": "val_loss/dataloader_idx_0", "raw": "raw/val_loss/dataloader_idx_0"}
    savers = [ModelCheckpoint(tmp_path / who, "{epoch}", monitor=monitor) for who, monitor in monitors.items()]
    counts: list[int] = []
    begins = At("on_train_start", lambda t: counts.append(t.lightning_module.num_calls))
    both = EMAWeightAveraging(decay=DECAY, evaluate_with="both")
    fitted = trainer(tmp_path, name, [both, begins, *savers])
    fitted.fit(module(name, WithMetrics))
    metrics = {key: float(value) for key, value in fitted.callback_metrics.items()}
    scores = [float(saver.best_model_score) for saver in savers]
    saved = [sorted(path.name for path in (tmp_path / who).iterdir()) for who in monitors]
    counts.append(fitted.lightning_module.num_calls)

    stopping = EarlyStopping("raw/val_loss", patience=1, mode="min")
    again = trainer(tmp_path, name, [stopping, EMAWeightAveraging(decay=DECAY, evaluate_with="both")], max_epochs=9)
    again.fit(module(name, MetricLogged))
    logged = {key: float(value) for key, value in again.callback_metrics.items()}
    return {
        "metrics": metrics,
        "scores": scores,
        "saved": saved,
        "counts": counts,
        "stopped": (again.current_epoch, again.global_step, stopping.wait_count, float(stopping.best_score)),
        "logged": logged,
    }


@among("single", "fsdp2")
def test_both_in_one_validation(name: str, tmp_path: Path) -> None:
    """Metrics of each loader and of hooks; checkpoints and early stopping look at either, once for each validation.

    P22: the sanity check is of one pass, and nothing of it counts.
    """
    _, weights = plain_training(3 * NUM_BATCHES)
    averages = averages_after(weights)

    def plain(found: Weights, first: int) -> float:
        return plain_loss(with_weights(found), first=first)

    expected, ends = {}, {"": averages[NUM_STEPS], "raw/": weights[NUM_STEPS]}
    for prefix, end in ends.items():
        of_loaders = [plain(end, 100), plain(end, 200)]
        expected |= {f"{prefix}val_loss/dataloader_idx_{index}": loss for index, loss in enumerate(of_loaders)}
        mean = sum(of_loaders) / 2
        expected |= {f"{prefix}mean": mean, f"{prefix}twice": 2 * mean}
    epochs = [NUM_BATCHES, NUM_STEPS]
    raw = [plain(weights[step], 100) for step in (*epochs, 12)]
    for seen in run(name, fit_both, tmp_path, name=name):
        assert seen["metrics"] == pytest.approx(expected, rel=1e-6)
        assert seen["scores"] == pytest.approx([min(plain(averages[step], 100) for step in epochs), min(raw[:2])])
        assert seen["counts"] == [4, 4 + 2 * 2 * 4]  # the sanity check; two passes after each epoch
        assert raw[0] < raw[1]  # so it stops after two epochs
        assert seen["saved"] == [["epoch=0.ckpt"], ["epoch=0.ckpt"]]
        assert seen["stopped"] == (2, NUM_STEPS, 1, pytest.approx(raw[0]))
        ends = {"val_loss": plain(averages[NUM_STEPS], 100), "raw/val_loss": raw[1]}
        assert seen["logged"] == pytest.approx(ends, rel=1e-6)
