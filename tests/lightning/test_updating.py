"""When the average takes in the weights: once for each optimizer step, or for each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg.lightning import WeightAveraging

from .modules import NUM_BATCHES, TwoOptimizers
from .reference import DECAY, NUM_STEPS, Weights, assert_same, mean_of, plain_loss, with_weights
from .runs import module, run, trainer
from .steps import ENGINES, Asked, EachEpoch, Steps, fit_and_look, live_calls, taken_in
from .strategies import STRATEGIES, among, over
from .watching import At, full_average

# -- once for each step ------------------------------------------------------------------------------------------------


@among(*ENGINES)
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


@among("single", "fsdp2")
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
