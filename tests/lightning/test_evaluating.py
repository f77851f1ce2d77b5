"""What an evaluation sees once `fit` is over, and where there is no average yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sharded_avg import SwapError
from sharded_avg.lightning import EMAWeightAveraging
from tests.helpers.further import further

from .modules import NUM_BATCHES, batches
from .reference import (
    DECAY,
    NUM_STEPS,
    Weights,
    assert_same,
    averages_after,
    losses,
    plain_loss,
    plain_training,
    with_weights,
)
from .runs import full_weights, module, run, trainer
from .strategies import STRATEGIES, among
from .watching import At, full_average

# -- alone -------------------------------------------------------------------------------------------------------------

OPTIONS = [("average", "average"), ("raw", "average"), ("both", "average"), ("average", "raw"), ("both", "raw")]
COMBINATIONS = [
    *(("single", *options) for options in OPTIONS),
    *((name, "average", "raw") for name in ("ddp", "fsdp_sharded", "deepspeed_2")),
    ("fsdp2", "both", "average"),
    further("fsdp2", "average", "raw"),
    further("ddp", "both", "average"),
]


def evaluate_after(tmp_path: Path, name: str, evaluate_with: str, end_with: str) -> dict[str, Any]:
    """Everything that can be evaluated once `fit` is over."""
    row, folder = STRATEGIES[name], tmp_path / f"{evaluate_with}-{end_with}"

    def new() -> Any:
        ours = EMAWeightAveraging(decay=DECAY, evaluate_with=evaluate_with, end_with=end_with)  # type: ignore[arg-type]
        saver = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, save_last=True)
        return trainer(tmp_path, name, [ours, saver])

    fitted, model = new(), module(name)
    fitted.fit(model)
    saver = fitted.checkpoint_callback
    found: dict[str, Any] = {"end": full_weights(fitted)}
    paths = {"best": saver.best_model_path, "last": saver.last_model_path}

    def evaluate(which: str, runner: Any, model: Any, path: str | None) -> None:
        found[f"{which}: test"] = runner.test(model, ckpt_path=path, verbose=False)[0]
        found[f"{which}: validate"] = runner.validate(model, ckpt_path=path, verbose=False)[0]
        found[f"{which}: predict"] = torch.cat(runner.predict(model, ckpt_path=path))

    if row.runs_again:
        evaluate("memory", fitted, model, None)
        found["memory: weights"] = full_weights(fitted)
        for which, path in {"best": "best", "last": "last", "path": paths["best"]}.items():
            evaluate(which, fitted, model, path)
    for which, path in paths.items():
        found[f"fresh {which}: test"] = new().test(module(name), ckpt_path=path, verbose=False)[0]
        found[f"fresh {which}: validate"] = new().validate(module(name), ckpt_path=path, verbose=False)[0]
        found[f"fresh {which}: predict"] = torch.cat(new().predict(module(name), ckpt_path=path))
    return found


def predictions(weights: Weights) -> Tensor:
    model = with_weights(weights).eval()
    with torch.no_grad():
        return torch.cat([model(batch[0]) for batch in batches(2, first=300)])


def expected_after(evaluate_with: str, end_with: str, which: str, average: Weights, raw: Weights) -> dict[str, Any]:
    """With the weights in memory, "raw" leaves alone what the end of training has put there."""
    choice = end_with if which == "memory" and evaluate_with == "raw" else evaluate_with
    return {
        "test": losses("test_loss", choice, average, raw),
        "validate": losses("val_loss", choice, average, raw),
        "predict": predictions(raw if choice == "raw" else average),
    }


@pytest.mark.own_processes
@pytest.mark.parametrize(("name", "evaluate_with", "end_with"), COMBINATIONS)
def test_evaluations_after_fit(name: str, evaluate_with: str, end_with: str, tmp_path: Path) -> None:
    """P07, P17, L4: validate, test and predict use one copy: of memory, of "best", "last" and a path, anywhere."""
    _, weights = plain_training(NUM_STEPS)
    averages = averages_after(weights)
    copies = {step: (averages[step], weights[step]) for step in (NUM_BATCHES, NUM_STEPS)}
    val_losses = [[plain_loss(with_weights(copy), first=100) for copy in pair] for pair in copies.values()]
    assert val_losses[0][0] < val_losses[1][0]
    assert val_losses[0][1] < val_losses[1][1]
    for found in run(name, evaluate_after, tmp_path, name=name, evaluate_with=evaluate_with, end_with=end_with):
        end = copies[NUM_STEPS][0 if end_with == "average" else 1]
        for key in ("end", "memory: weights"):
            if weights_then := found.pop(key, None):
                assert_same(weights_then, end)
        for key, value in found.items():
            which, what = key.split(": ")
            pair = copies[NUM_BATCHES if "best" in which or which == "path" else NUM_STEPS]
            expected = expected_after(evaluate_with, end_with, which, *pair)[what]
            if what == "predict":
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: key + text)
            else:
                assert value == pytest.approx(expected, rel=1e-6), key


# -- before there is an average ----------------------------------------------------------------------------------------


def fit_too_short(tmp_path: Path, name: str) -> dict[str, Any]:
    """An average that would begin later than training ends."""
    row, path = STRATEGIES[name], tmp_path / "end.ckpt"
    late = EMAWeightAveraging(decay=DECAY, update_starting_at_step=100)
    saver = At("on_train_end", lambda t: t.save_checkpoint(path))
    fitted = trainer(tmp_path, name, [late, saver])
    fitted.fit(module(name))
    found = {"end": full_weights(fitted), "nbytes": late.average.nbytes, "val_loss": _val_loss(fitted)}
    fresh = trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY)])
    found["test_loss"] = fresh.test(module(name), ckpt_path=path, verbose=False)[0]["test_loss"]
    if not row.writes_folder:
        found["file"] = torch.load(path, weights_only=True)["state_dict"]
    return found


def _val_loss(fitted: Any) -> float:
    return float(fitted.callback_metrics["val_loss"])


@among("single", "ddp", "fsdp2", "deepspeed_2")
def test_no_average_yet(name: str, tmp_path: Path) -> None:
    """P03, P10, L1, L2: the model, its metrics and its checkpoints have the raw weights; nothing is allocated."""
    _, weights = plain_training(NUM_STEPS)
    raw = with_weights(weights[NUM_STEPS])
    for found in run(name, fit_too_short, tmp_path, name=name):
        assert_same(found["end"], weights[NUM_STEPS])
        assert_same(found.get("file", weights[NUM_STEPS]), weights[NUM_STEPS])
        assert found["nbytes"] == 0
        assert found["val_loss"] == pytest.approx(plain_loss(raw, first=100), rel=1e-6)
        assert found["test_loss"] == pytest.approx(plain_loss(raw, first=200), rel=1e-6)


# -- a validation that edits weights -----------------------------------------------------------------------------------

EDITS = {
    "step": lambda module: [parameter.data.add_(1) for parameter in module.parameters()],
    "load": lambda module: module.load_state_dict({k: torch.zeros_like(v) for k, v in module.state_dict().items()}),
    "half": lambda module: module.half().float(),
    "other memory": lambda module: [setattr(p, "data", torch.zeros_like(p)) for p in module.parameters()],
}


@pytest.mark.parametrize("edit", EDITS)
def test_r04_a_validation_that_edits_weights(edit: str, tmp_path: Path) -> None:
    """R04: raises and says so where the edit lies in the average's memory; else the average is what it was."""
    averages: list[Weights] = []

    def look(_: Any) -> None:
        averages.append(full_average(ours))

    ours, edits = (
        EMAWeightAveraging(decay=DECAY),
        At("on_validation_epoch_end", lambda t: EDITS[edit](t.lightning_module)),
    )
    fitted = trainer(tmp_path, "single", [At("on_validation_start", look), ours, edits, At("on_validation_end", look)])
    if edit in ("step", "load"):
        with pytest.raises(SwapError, match="weights were written to inside"):
            fitted.fit(module("single"))
        return
    fitted.fit(module("single"))
    assert len(averages) >= 2
    for before, after in zip(averages[::2], averages[1::2], strict=True):
        assert_same(before, after)
