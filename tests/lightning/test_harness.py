"""What the tests of the callbacks stand on: each strategy trains, stops, resumes and evaluates, without any average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .modules import NUM_BATCHES, TwoOptimizers
from .reference import NUM_STEPS, assert_same, plain_loss, plain_training, plain_training_by_hand
from .runs import Recorder, full_weights, module, run, trainer
from .strategies import COVER, STRATEGIES, among, over
from .watching import SaveAtEnd

VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "frozen": {"frozen": True},
    "late": {"late": True},
    "norm": {"norm": True},
    "own_batches": {"own_batches": True},
    "tied": {"tied": True},
}


def fit(tmp_path: Path, name: str, **options: Any) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Weights after each step, and after the run."""
    recorder = Recorder()
    fitted = trainer(tmp_path, name, [recorder])
    fitted.fit(module(name, **options))
    return recorder.weights, full_weights(fitted)


@over(lambda row: row.where != "fresh")
def test_training_is_that_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    _, expected = plain_training(NUM_STEPS)
    for recorded, last in run(name, fit, tmp_path, name=name):
        assert recorded.keys() == expected.keys()
        for step, weights in recorded.items():
            assert_same(weights, expected[step], exact=STRATEGIES[name].exact)
        assert_same(last, recorded[NUM_STEPS])


def fit_variants(tmp_path: Path, name: str) -> dict[str, dict[str, Tensor]]:
    return {variant: fit(tmp_path, name, **options)[1] for variant, options in VARIANTS.items() if _has(name, variant)}


def _has(name: str, variant: str) -> bool:
    return not (name == "fsdp2_tp" and variant == "tied")  # parallelize_module unties them


@over(lambda row: row.where != "fresh", cover=COVER)
def test_variants_train_like_plain_loops(name: str, tmp_path: Path) -> None:
    for finals in run(name, fit_variants, tmp_path, name=name):
        for variant, final in finals.items():
            replicas = STRATEGIES[name].num_replicas
            _, expected = plain_training(NUM_STEPS, num_replicas=replicas, **VARIANTS[variant])
            assert_same(final, expected[NUM_STEPS], exact=STRATEGIES[name].exact)


def fit_in_two_runs(tmp_path: Path, name: str) -> dict[str, Tensor]:
    path = tmp_path / "end.ckpt"
    trainer(tmp_path, name, [SaveAtEnd(path)], max_epochs=1).fit(module(name))
    resumed = trainer(tmp_path, name)
    resumed.fit(module(name), ckpt_path=path)
    assert path.is_dir() == STRATEGIES[name].writes_folder
    return full_weights(resumed)


@over(lambda row: True, cover=COVER)
def test_resuming_equals_one_long_run(name: str, tmp_path: Path) -> None:
    _, plain = plain_training(NUM_STEPS)
    straight = plain[NUM_STEPS] if STRATEGIES[name].exact else run(name, fit, tmp_path, name=name)[0][1]
    for resumed in run(name, fit_in_two_runs, tmp_path, name=name):
        assert_same(resumed, straight)


def evaluate(tmp_path: Path, name: str) -> tuple[float, float, dict[str, Tensor]]:
    """Losses of `validate` and `test` of Trainers that have trained nothing, and weights after one of them."""
    path = tmp_path / "end.ckpt"
    trainer(tmp_path, name, [SaveAtEnd(path)]).fit(module(name))
    validating = trainer(tmp_path, name)
    (validated,) = validating.validate(module(name), ckpt_path=path, verbose=False)
    (tested,) = trainer(tmp_path, name).test(module(name), ckpt_path=path, verbose=False)
    return validated["val_loss"], tested["test_loss"], full_weights(validating)


@over(lambda row: row.where != "fresh" and row.evaluates_checkpoints, cover=COVER)
def test_evaluating_a_checkpoint_by_itself(name: str, tmp_path: Path) -> None:
    model, expected = plain_training(NUM_STEPS)
    for validated, tested, weights in run(name, evaluate, tmp_path, name=name):
        assert validated == pytest.approx(plain_loss(model, first=100), rel=1e-6)
        assert tested == pytest.approx(plain_loss(model, first=200), rel=1e-6)
        assert_same(weights, expected[NUM_STEPS], exact=STRATEGIES[name].exact)


def evaluate_and_fail(tmp_path: Path, name: str) -> None:
    with pytest.raises(AttributeError, match="_restore_from_bit16_weights"):
        evaluate(tmp_path, name)


@over(lambda row: not row.evaluates_checkpoints)
def test_zero_3_cannot_evaluate_a_checkpoint_by_itself(name: str, tmp_path: Path) -> None:
    """DeepSpeed #7272, with or without this package. Once this fails, the row in STRATEGIES has changed."""
    run(name, evaluate_and_fail, tmp_path, name=name)


def fit_again(tmp_path: Path, name: str) -> tuple[float, float, dict[str, Tensor], dict[str, Tensor], int]:
    """One Trainer and one module: trained, validated, trained on."""
    recorder = Recorder()
    fitted, model = trainer(tmp_path, name, [recorder], max_epochs=1), module(name)
    fitted.fit(model)
    in_fit = float(fitted.callback_metrics["val_loss"])
    (alone,) = fitted.validate(model, verbose=False)
    between = full_weights(fitted)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(model)
    return in_fit, alone["val_loss"], recorder.weights[NUM_BATCHES], between, fitted.global_step


@over(lambda row: row.where != "fresh" and row.runs_again, cover=COVER)
def test_one_module_can_be_trained_validated_and_trained_on(name: str, tmp_path: Path) -> None:
    for in_fit, alone, trained, between, global_step in run(name, fit_again, tmp_path, name=name):
        assert in_fit == alone
        assert_same(trained, between)
        assert global_step == NUM_STEPS


def validate_in_bf16(tmp_path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fitted, model = trainer(tmp_path, name, precision="bf16-true"), module(name)
    fitted.fit(model)
    masters = full_weights(fitted)
    fitted.validate(model, verbose=False)
    return masters, full_weights(fitted)


@over(lambda row: row.where == "deepspeed", cover=COVER)
def test_an_engine_that_only_evaluates_has_no_masters(name: str, tmp_path: Path) -> None:
    for masters, weights in run(name, validate_in_bf16, tmp_path, name=name):
        assert masters["head.weight"].dtype == torch.float32
        assert torch.equal(weights["head.weight"], masters["head.weight"].bfloat16())
        assert weights["head.weight"].dtype == torch.bfloat16


def fit_by_hand(tmp_path: Path, name: str) -> dict[str, Tensor]:
    fitted = trainer(tmp_path, name)
    fitted.fit(module(name, TwoOptimizers))
    return full_weights(fitted)


@over(lambda row: row.two_optimizers, cover=COVER)
def test_two_optimizers_stepped_by_hand(name: str, tmp_path: Path) -> None:
    expected = plain_training_by_hand(NUM_STEPS)
    for weights in run(name, fit_by_hand, tmp_path, name=name):
        assert_same(weights, expected, exact=STRATEGIES[name].exact)


def fit_in_the_other_package(tmp_path: Path, name: str) -> dict[str, Tensor]:
    other = "pytorch_lightning"
    fitted = trainer(tmp_path, name, package=other)
    fitted.fit(module(name, package=other))
    assert type(fitted).__module__.startswith(other)
    return full_weights(fitted)


@among("ddp", "fsdp2", further=["fsdp_full", "deepspeed_3"])
def test_pytorch_lightning_trains_alike(name: str, tmp_path: Path) -> None:
    _, expected = plain_training(NUM_STEPS)
    for weights in run(name, fit_in_the_other_package, tmp_path, name=name):
        assert_same(weights, expected[NUM_STEPS])
