"""Lightning's own callbacks and ours, on one device, train the same module: what they share is the same, bit for bit.

Their EMAWeightAveraging computes `decay * average + (1 - decay) * weights`, which rounds otherwise than `lerp`; given
as `avg_fn` to ours it is the same again. What ours does otherwise on purpose is in the tests of those field reports.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import weight_averaging as theirs
from torch import Tensor
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

import sharded_avg.lightning as ours
from sharded_avg import EMA

from .modules import NUM_BATCHES, Tiny
from .reference import DECAY, NUM_STEPS, assert_same
from .runs import module, trainer
from .watching import At

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
NAMES = ("WeightAveraging", "EMAWeightAveraging")
SIDES = {"theirs": theirs, "ours": ours}


class Plain(Tiny):
    """Tiny without a `configure_model` of its own, about which their callback warns. Nor has it an integer buffer."""

    configure_model = lightning.LightningModule.configure_model

    def _make_layers(self) -> None:
        super()._make_layers()
        self.register_buffer("calls", torch.tensor(0.0))


def their_class(package: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{package}.callbacks.weight_averaging"), name)


# --- what a user types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", NAMES)
class TestSurface:
    def test_their_arguments_come_first_with_their_defaults(self, name: str, package: str) -> None:
        their, our = (inspect.signature(cls).parameters for cls in (their_class(package, name), getattr(ours, name)))
        named = [parameter for parameter in their.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        for parameter, mine in zip(named, list(our.values())[: len(named)], strict=True):
            assert (mine.name, mine.default, mine.kind) == (parameter.name, parameter.default, parameter.kind)
        if name == "WeightAveraging":  # what else they take is for torch's AveragedModel
            assert set(inspect.signature(AveragedModel).parameters) - {"model"} <= our.keys()

    def test_should_update_is_overridden_alike(self, name: str, package: str) -> None:
        their, our = (
            inspect.signature(cls.should_update).parameters.values()
            for cls in (their_class(package, name), getattr(ours, name))
        )
        assert [(p.name, p.kind, p.default) for p in our] == [(p.name, p.kind, p.default) for p in their]

    def test_state_has_their_key(self, name: str, package: str) -> None:
        their, our = their_class(package, name)(), getattr(ours, name)()
        assert our.state_key == their.state_key == name
        assert their.state_dict().items() <= our.state_dict().items()
        assert isinstance(our, importlib.import_module(package).Callback)


# --- what a run does ------------------------------------------------------------------------------------------------


def averaged(callback: Any) -> dict[str, Tensor]:
    if isinstance(callback, theirs.WeightAveraging):
        return {name: value.clone() for name, value in callback._average_model.module.state_dict().items()}
    with callback.average.summon_full_params() as full:
        return {name: value.clone() for name, value in full.items()}


def count(callback: Any) -> int:
    if isinstance(callback, theirs.WeightAveraging):
        return int(callback._average_model.n_averaged)
    return int(callback.average.n_averaged)


def trained(tmp_path: Path, callback: Any, *, ckpt_path: Path | None = None, **settings: Any) -> dict[str, Any]:
    """All that can be seen of a run: between epochs, at its end, and of evaluations after it."""
    model, losses, between, path = module("single", Plain), [], [], tmp_path / "now.ckpt"
    looks = [
        At("on_validation_end", lambda t: losses.append(float(t.callback_metrics["val_loss"]))),
        At("on_train_epoch_end", lambda t: between.append(averaged(callback))),
        At("on_train_epoch_end", lambda t: t.save_checkpoint(path)),
    ]
    fitted = trainer(tmp_path, "single", [callback, *looks], **settings)
    fitted.fit(model, ckpt_path=ckpt_path)
    seen = {
        "losses": losses,
        "between": between,
        "count": count(callback),
        "checkpoint": torch.load(path, weights_only=True),
        "loaded": Plain.load_from_checkpoint(path).state_dict(),
        "end": {name: value.clone() for name, value in model.state_dict().items()},
    }
    seen["after"] = [fitted.validate(model, verbose=False), fitted.test(model, verbose=False)]
    seen["predictions"] = torch.cat(fitted.predict(model))
    return seen


def assert_alike(our: dict[str, Any], their: dict[str, Any], *, exact: bool = True) -> None:
    tolerance = {} if exact else {"rel": 1e-5}
    for left, right in zip(our["between"], their["between"], strict=True):
        assert_same(left, right, exact=exact)
    for key in ("end", "loaded"):
        assert_same(our[key], their[key], exact=exact)
    assert our["count"] == their["count"]
    if exact:
        assert (our["losses"], our["after"]) == (their["losses"], their["after"])
    assert our["losses"] == pytest.approx(their["losses"], **tolerance)
    torch.testing.assert_close(our["predictions"], their["predictions"], **({"rtol": 0, "atol": 0} if exact else {}))
    assert_same_files(our["checkpoint"], their["checkpoint"], exact=exact)


def assert_same_files(our: dict[str, Any], their: dict[str, Any], *, exact: bool) -> None:
    assert our.keys() == their.keys() | {"sharded_avg"}
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert_same(our[key], their[key], exact=exact)
    for key, value in their["callbacks"].items():
        assert value.items() <= our["callbacks"][key].items()
    for key in their.keys() - {"state_dict", "current_model_state", "averaging_state", "callbacks"}:
        assert str(our[key]) == str(their[key]), key  # tensors of optimizers are printed


MULTI = get_ema_multi_avg_fn(DECAY)
EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # their arguments, ours
    "mean": ({"multi_avg_fn": get_swa_multi_avg_fn()}, {}),  # what theirs is by default on a GPU
    "mean of weights": ({"use_buffers": False}, {"use_buffers": False, "avg_fn": get_swa_avg_fn()}),  # and on a CPU
    "multi_avg_fn": ({"multi_avg_fn": MULTI, "use_buffers": False}, {"multi_avg_fn": MULTI, "use_buffers": False}),
    "rule": ({"multi_avg_fn": MULTI}, {"rule": EMA(decay=DECAY)}),
    "avg_fn": ({"avg_fn": get_ema_avg_fn(DECAY), "device": "cpu"}, {"avg_fn": get_ema_avg_fn(DECAY), "device": "cpu"}),
}


@pytest.mark.parametrize("case", EQUAL)
def test_same_bits(case: str, tmp_path: Path) -> None:
    """Averages after each epoch, counts, metrics, the model at the end, evaluations after it, and checkpoints."""
    for_them, for_us = EQUAL[case]
    their = trained(tmp_path, theirs.WeightAveraging(**for_them))
    assert their["count"] == NUM_STEPS
    assert_alike(trained(tmp_path, ours.WeightAveraging(**for_us)), their)


@pytest.mark.parametrize(("name", "count"), [("WeightAveraging", NUM_STEPS), ("EMAWeightAveraging", 4)])
def test_by_default_as_close_as_rounding_lets_them(name: str, count: int, tmp_path: Path) -> None:
    """With buffers averaged; the EMA with a stride, given by position."""
    arguments = (None, True, DECAY, 2) if name == "EMAWeightAveraging" else ()
    their = trained(tmp_path, getattr(theirs, name)(*arguments))
    assert their["count"] == count
    assert_alike(trained(tmp_path, getattr(ours, name)(*arguments)), their, exact=False)


def asking(base: Any) -> Any:
    """Their example of an override, with every question written down."""

    class Asking(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.asked: list[tuple[int | None, int | None]] = []

        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            self.asked.append((step_idx, epoch_idx))
            return epoch_idx == 0 or (step_idx is not None and step_idx % 3 == 1)

    return Asking


@pytest.mark.parametrize("accumulate", [1, 2])
def test_should_update_is_asked_alike(accumulate: int, tmp_path: Path) -> None:
    """An override sees the same numbers in the same order, of accumulated batches too, and averages the same."""
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 3, "limit_val_batches": 0}
    seen = {}
    for side, namespace in SIDES.items():
        callback = asking(namespace.WeightAveraging)(avg_fn=get_swa_avg_fn())
        model = module("single", Plain)
        trainer(tmp_path, "single", [callback], **settings).fit(model)
        seen[side] = (callback.asked, count(callback), averaged(callback))
    asked, number, average = seen["theirs"]
    asked = list(dict.fromkeys(asked))  # theirs asks again after each accumulated batch until it has updated
    assert [step for step, _ in asked if step is not None] == list(range(3 * NUM_BATCHES // accumulate))
    assert [epoch for _, epoch in asked if epoch is not None] == [0, 1, 2]
    assert seen["ours"][:2] == (asked, number)
    assert_same(seen["ours"][2], average)


# --- files and resumed runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", SIDES)
@pytest.mark.parametrize("resumed_by", SIDES)
def test_files_travel(saved_by: str, resumed_by: str, tmp_path: Path, straight: dict[str, Any]) -> None:
    """L18: whoever wrote a file and whoever reads it, the resumed run is the second half of their one long run."""
    path = tmp_path / "half.ckpt"
    saver = At("on_train_epoch_end", lambda t: t.save_checkpoint(path))
    trainer(tmp_path, "single", [new(saved_by), saver], max_epochs=1).fit(module("single", Plain))
    resumed = trained(tmp_path, new(resumed_by), ckpt_path=path)
    half = {**straight, "losses": straight["losses"][1:], "between": straight["between"][1:]}
    if resumed_by == "ours":
        assert_alike(resumed, half)
    else:
        for key in ("losses", "count", "after"):
            assert resumed[key] == half[key]
        assert_same(resumed["end"], half["end"])
    assert resumed["count"] == NUM_STEPS


def new(side: str) -> Any:
    """The equal-weight mean, whose next value depends on the count, by the formula that torch has for CPUs."""
    return SIDES[side].WeightAveraging(**({"avg_fn": get_swa_avg_fn()} if side == "ours" else {}))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Their one long run."""
    return trained(tmp_path_factory.mktemp("straight"), new("theirs"))


def test_a_difference_would_be_seen(tmp_path: Path, straight: dict[str, Any]) -> None:
    """Even that of a mean which is rounded otherwise."""
    another = trained(tmp_path, ours.WeightAveraging())
    assert_alike(another, straight, exact=False)
    with pytest.raises(AssertionError, match=r"wide\.weight: Tensor-likes are not equal"):
        assert_alike(another, straight)
