"""What holds under every strategy: the average is that of the formula, bit for bit, and so is that of a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES
from .reference import DECAY, NUM_STEPS, assert_same, plain_average, plain_loss, plain_training, with_weights
from .runs import full_weights, module, run, trainer
from .strategies import COVER, STRATEGIES, over
from .watching import At, full_average

# After the step and before its update, by a callback before ours; while swapped; after it; between epochs; when the
# model holds the average for good.
MOMENTS = ("on_train_batch_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end", "on_train_end")
SOME_MOMENTS = ("on_validation_epoch_end", "on_train_end")


def fit_averaged(tmp_path: Path, name: str) -> dict[str, Any]:
    callback, raw, evaluated = EMAWeightAveraging(decay=DECAY), [], []
    looks = At("on_train_epoch_end", lambda t: raw.append(full_weights(t)))
    fitted = trainer(tmp_path, name, [callback, looks])
    assert callback.average is None
    fitted.fit(module(name))
    evaluated.append(float(fitted.callback_metrics["val_loss"]))
    seen = {
        "raw": raw,
        "average": full_average(callback),
        "end": full_weights(fitted),
        "val_loss": evaluated[0],
        "n_averaged": callback.average.n_averaged,
        "element_bytes": callback.average.nbytes / 4,
    }
    return seen


@over(lambda row: row.where != "fresh")
def test_average(name: str, tmp_path: Path) -> None:
    """P01, P02, P34, P72, P101, L17: raw weights after validation, average, metric, end of training, by value."""
    _, weights = plain_training(NUM_STEPS)
    exact, expected = STRATEGIES[name].exact, plain_average(weights)
    ranks = run(name, fit_averaged, tmp_path, name=name)
    for seen in ranks:
        assert seen["n_averaged"] == NUM_STEPS
        assert_same(seen["raw"][0], weights[NUM_BATCHES], exact=exact)
        assert_same(seen["raw"][1], weights[NUM_STEPS], exact=exact)
        assert_same(seen["average"], expected, exact=exact)
        assert_same(seen["end"], expected, exact=exact)
        assert seen["val_loss"] == pytest.approx(plain_loss(with_weights(expected), first=100), rel=1e-6)
    averaged = [value for value in expected.values() if value.is_floating_point()]
    replicas = len(ranks) - 1  # of the buffer; and tensor parallelism replicates some layers
    elements = sum(value.numel() for value in averaged) + replicas * expected["shift"].numel()
    held = sum(seen["element_bytes"] for seen in ranks)
    assert held == elements or (name == "fsdp2_tp" and elements < held < 2 * elements)


def fit_in_two(tmp_path: Path, name: str, moments: tuple[str, ...]) -> list[dict[str, Any]]:
    """A checkpoint at each moment of a first run, by callbacks before and after ours; and a second run from each."""
    paths = {moment: tmp_path / f"{moment}.ckpt" for moment in moments}
    savers = [At(moment, lambda t, path=path: t.save_checkpoint(path)) for moment, path in paths.items()]
    ours, half = EMAWeightAveraging(decay=DECAY), len(savers) // 2
    trainer(tmp_path, name, [*savers[:half], ours, *savers[half:]], max_epochs=1).fit(module(name))
    ends = []
    for path in paths.values():
        callback = EMAWeightAveraging(decay=DECAY)
        resumed = trainer(tmp_path, name, [callback])
        resumed.fit(module(name), ckpt_path=path)
        average = callback.average
        ends.append({"full": full_average(callback), "counts": (average.n_averaged, average.num_steps)})
        assert path.is_dir() == STRATEGIES[name].writes_folder
        assert (path / "average" / "manifest.json").is_file() == STRATEGIES[name].writes_folder
    return ends


@over(lambda row: row.where != "fresh", cover=COVER)
def test_resumed_run_equals_one_long_run(name: str, tmp_path: Path) -> None:
    """P04, P18, P92, P93: whenever the checkpoint was written, the resumed average is that of one long run."""
    _, weights = plain_training(NUM_STEPS)
    expected = plain_average(weights)
    moments = MOMENTS if name in ("single", "ddp", "fsdp2", "deepspeed_2") else SOME_MOMENTS
    for ends in run(name, fit_in_two, tmp_path, name=name, moments=moments):
        for end in ends:
            assert end["counts"] == (NUM_STEPS, NUM_STEPS)
            assert_same(end["full"], expected, exact=STRATEGIES[name].exact)


def evaluate_alone(tmp_path: Path, name: str) -> dict[str, float]:
    """Metrics of Trainers that have trained nothing, from a checkpoint."""
    path = tmp_path / "end.ckpt"
    saver = At("on_train_end", lambda t: t.save_checkpoint(path))
    trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY), saver]).fit(module(name))
    losses = {}
    for choice in ("average", "raw", "both"):
        fresh = trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY, evaluate_with=choice)])
        (metrics,) = fresh.test(module(name), ckpt_path=path, verbose=False)
        losses |= {f"{choice}: {key}": value for key, value in metrics.items()}
    return losses


@over(lambda row: row.where != "fresh" and row.evaluates_checkpoints, cover=COVER)
def test_checkpoint_evaluated_alone(name: str, tmp_path: Path) -> None:
    """P07, P17: a Trainer that has not trained evaluates the average of a checkpoint, the raw weights, or both."""
    _, weights = plain_training(NUM_STEPS)
    average = plain_loss(with_weights(plain_average(weights)), first=200)
    raw = plain_loss(with_weights(weights[NUM_STEPS]), first=200)
    assert raw != pytest.approx(average, rel=1e-4)
    expected = {
        "average: test_loss": average,
        "raw: test_loss": raw,
        "both: test_loss": average,
        "both: raw/test_loss": raw,
    }
    for losses in run(name, evaluate_alone, tmp_path, name=name):
        assert losses == pytest.approx(expected, rel=1e-6)


def test_reference_is_not_trivial() -> None:
    """The average differs from the first and the last weights, in every tensor."""
    _, weights = plain_training(NUM_STEPS)
    for name, value in plain_average(weights).items():
        if value.is_floating_point():
            assert not torch.equal(value, weights[1][name])
            assert not torch.equal(value, weights[NUM_STEPS][name])
