"""Several averages in one callback: each validated under its name, each in the checkpoint, one to end with.

The averages are formulas on the weights of a plain loop; losses are those of plain models that hold them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sharded_avg import (
    EMA,
    LAWA,
    CheckpointError,
    ConfigError,
    PowerAverage,
    ReplicaError,
    load_averaged_state_dict,
)
from sharded_avg.lightning import WeightAveraging

from .modules import NUM_BATCHES, Tiny
from .reference import Weights, assert_same, plain_average, plain_loss, raw_after, with_weights
from .runs import full_weights, module, run, trainer
from .saved_files import inspected
from .strategies import STRATEGIES, among
from .watching import At, Looks

SHORT, NUM_EPOCHS, LAST = 0.5, 3, 3
AT = [2, 4, 6, 8, 10, 12]  # steps that are followed by a validation
RULES = {"short": EMA(decay=SHORT), "long": EMA(decay=0.9), "latest": LAWA(last=LAST)}


def expected_after(step: int) -> dict[str, Weights]:
    """The averages after a step."""
    weights = {number: raw_after(number) for number in range(1, step + 1)}
    latest = [weights[number] for number in range(max(1, step - LAST + 1), step + 1)]
    total = {name: value.clone() for name, value in latest[0].items()}
    for live in latest[1:]:
        for name, value in live.items():
            total[name] = total[name] + value if value.is_floating_point() else value.clone()
    mean = {name: value / len(latest) if value.is_floating_point() else value for name, value in total.items()}
    return {"short": plain_average(weights, SHORT), "long": plain_average(weights, 0.9), "latest": mean}


def loss_of(weights: Weights, first: int = 100) -> float:
    return plain_loss(with_weights(weights), first=first)


def metrics_after(step: int, metric: str = "val_loss", first: int = 100) -> dict[str, float]:
    """What is logged with evaluate_with="all" and end_with="long"."""
    averages = expected_after(step)
    found = {f"{name}/{metric}": loss_of(average, first) for name, average in averages.items()}
    return {**found, f"raw/{metric}": loss_of(raw_after(step), first), metric: found[f"long/{metric}"]}


def several(**settings: Any) -> WeightAveraging:
    return WeightAveraging(rule=RULES, evaluate_with="all", end_with="long", **settings)


def all_averages(callback: Any) -> dict[str, Weights]:
    found = {}
    for name in callback.average.names:
        with callback.average.summon_full_params(name, rank0_only=False) as full:
            found[name] = {key: value.clone() for key, value in full.items()}
    return found


def fit_several(tmp_path: Path, name: str) -> dict[str, Any]:
    """One epoch; from its checkpoint, to the end; then evaluations, in memory and of checkpoints."""
    row, last = STRATEGIES[name], tmp_path / "last.ckpt"
    save = At("on_train_end", lambda t: t.save_checkpoint(last))
    trainer(tmp_path, name, [several(), save], max_epochs=1, num_sanity_val_steps=0).fit(module(name))
    halfway = {who: load_averaged_state_dict(last, who) for who in RULES}

    callback, looks = several(), Looks()
    savers = [ModelCheckpoint(tmp_path / who, "{step}", monitor=f"{who}/val_loss") for who in ("long", "latest")]
    stopping = EarlyStopping("short/val_loss", patience=99)
    ends: list[dict[str, Weights]] = []
    end = At("on_train_epoch_end", lambda t: ends.append(all_averages(callback)))
    callbacks = [stopping, callback, looks, *savers, end]
    settings = {"max_epochs": NUM_EPOCHS, "val_check_interval": 2, "num_sanity_val_steps": 2}
    fitted = trainer(tmp_path, name, callbacks, logger=CSVLogger(tmp_path, version=0), **settings)
    model = module(name)
    fitted.fit(model, ckpt_path=last)
    found: dict[str, Any] = {
        "halfway": halfway,
        "metrics": looks.metrics,
        "averages": ends[-1],
        "end": full_weights(fitted),
        "scores": [float(saver.best_model_score) for saver in savers],
        "best": [load_averaged_state_dict(saver.best_model_path, "long") for saver in savers],
        "waited": (stopping.wait_count, float(stopping.best_score)),
    }
    if row.runs_again:
        found["memory: test"] = fitted.test(model, verbose=False)[0]
        found["after"] = full_weights(fitted)
    evaluating = {"fresh: test": several(), "short: test": WeightAveraging(rule=RULES, end_with="short")}
    for what, callback in evaluating.items() if row.evaluates_checkpoints else ():
        fresh = trainer(tmp_path, name, [callback])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Be aware that when using")  # without the savers
            found[what] = fresh.test(module(name), ckpt_path=savers[0].best_model_path, verbose=False)[0]
    return found


@among("single", "fsdp2", further=["ddp", "fsdp_full", "fsdp_sharded", "fsdp_by_hand", "deepspeed_2", "deepspeed_3"])
def test_several_averages(name: str, tmp_path: Path) -> None:
    """Metrics, monitors, checkpoints, a resumed run, and the end: each average by its name, all equal to formulas."""
    steps = [step for step in AT if step > NUM_BATCHES]
    wanted = [metrics_after(step) for step in steps]
    best = {who: min(range(len(steps)), key=lambda at: wanted[at][f"{who}/val_loss"]) for who in ("long", "latest")}
    for found in run(name, fit_several, tmp_path, name=name):
        for who, average in expected_after(NUM_BATCHES).items():
            assert_same(found["halfway"][who], {key: average[key] for key in found["halfway"][who]})
            assert found["halfway"][who].keys() >= {key for key, _ in Tiny().named_parameters()}
        passes = 1 + len(RULES)
        for seen, expected in zip(found["metrics"][passes - 1 :: passes], wanted, strict=True):
            assert seen == pytest.approx(expected, rel=1e-6)
        for who, average in expected_after(steps[-1]).items():
            assert_same(found["averages"][who], average)
        assert_same(found["end"], expected_after(steps[-1])["long"])
        for who, score, weights in zip(best, found["scores"], found["best"], strict=True):
            assert score == pytest.approx(wanted[best[who]][f"{who}/val_loss"], rel=1e-6)
            assert_same(weights, {key: expected_after(steps[best[who]])["long"][key] for key in weights})
        assert found["waited"][1] == pytest.approx(min(each["short/val_loss"] for each in wanted), rel=1e-6)
        if "after" in found:
            assert found["memory: test"] == pytest.approx(metrics_after(steps[-1], "test_loss", 200), rel=1e-6)
            assert_same(found["after"], found["end"])
        if "fresh: test" in found:
            at = steps[best["long"]]
            assert found["fresh: test"] == pytest.approx(metrics_after(at, "test_loss", 200), rel=1e-6)
            assert found["short: test"] == {
                "test_loss": pytest.approx(loss_of(expected_after(at)["short"], 200), rel=1e-6)
            }
    if STRATEGIES[name].world_size == 1:  # a file
        assert load_averaged_state_dict(tmp_path / "last.ckpt").keys() == average.keys()
        told = inspected(tmp_path / "last.ckpt")["averages"]
        assert {who: record["decay"] for who, record in told.items()} == pytest.approx(
            {"short": SHORT, "long": 0.9, "latest": 1 - 1 / LAST}
        )
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(wanted[0]) <= set(logged)


# -- snapshots, and checks of replicas -----------------------------------------------------------------------------


def fit_with_snapshots(tmp_path: Path, name: str) -> dict[str, Any]:
    folder, rules = tmp_path / "snapshots", {"wide": PowerAverage(power=2), "narrow": PowerAverage(power=5)}
    snapshots = {"folder": str(folder), "every_steps": 2, "keep_last": 2, "keep_every": 4}
    callback, seen = WeightAveraging(rule=rules, snapshots=snapshots, check_replicas_every_n_updates=3), []
    look = At("on_train_end", lambda t: seen.append(sorted(path.name for path in folder.iterdir())))
    fitted = trainer(tmp_path, name, [callback, look], max_epochs=3)
    fitted.fit(module(name))
    mixed = {}
    for path in sorted(folder.iterdir()):
        mixed[path.name] = {who: load_averaged_state_dict(path, who) for who in rules}
    found = callback.average.load_posthoc(folder, sigma_rel=PowerAverage(power=3).sigma_rel, name="wide")
    return {"folders": seen[0], "saved": mixed, "error": found.error}


@among("single", further=["ddp", "fsdp2", "fsdp_sharded", "deepspeed_2", "deepspeed_3"])
def test_snapshots(name: str, tmp_path: Path) -> None:
    """Saved while training goes on, on their own schedule; those that are kept are the averages of their steps."""
    for found in run(name, fit_with_snapshots, tmp_path, name=name):
        kept = [4, 8, 10, 12]
        assert found["folders"] == [f"step-{step:09d}" for step in kept]
        for step in kept:
            for who, power in {"wide": 2, "narrow": 5}.items():
                expected = power_mean(step, power)
                saved = found["saved"][f"step-{step:09d}"][who]
                assert_same(saved, {key: expected[key] for key in saved})
        assert found["error"] < 0.5


def power_mean(step: int, power: int) -> Weights:
    average = {name: value.clone() for name, value in raw_after(1).items()}
    for number in range(1, step):
        for name, value in raw_after(number + 1).items():
            moved = value.is_floating_point()
            weight = 1 - (number / (number + 1)) ** power
            average[name] = average[name].lerp(value, weight) if moved else value.clone()
    return average


def fit_astray(tmp_path: Path, name: str) -> str:
    def stray(trainer: Any) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                next(iter(trainer.lightning_module.parameters())).view(-1)[0].add_(1.0)

    callback = WeightAveraging(check_replicas_every_n_updates=2)
    with pytest.raises(ReplicaError) as caught:
        trainer(tmp_path, name, [At("on_train_start", stray), callback], max_epochs=1).fit(module(name))
    return str(caught.value)


@among("ddp")
def test_replicas_that_drift(name: str, tmp_path: Path) -> None:
    """Found at the second update, on all ranks, with the name and the rank."""
    for said in run(name, fit_astray, tmp_path, name=name):
        assert "after 2 steps" in said
        assert "weights of 'wide.weight' on ranks (1,)" in said


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.own_processes
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"rule": {"raw": EMA(decay=0.5)}}, "'raw' is a word"),
        ({"rule": {"short": EMA(decay=0.5), "average": EMA(decay=0.9)}}, "'average' is a word"),
        ({"rule": {"a.b": EMA(decay=0.5)}}, "without dots"),
        ({"rule": RULES, "end_with": "longest"}, "must be one of 'average', 'raw', 'short', 'long', 'latest'"),
        ({"evaluate_with": "short"}, "'average', 'raw', 'both', 'all'"),
        ({"snapshots": {"folder": "here"}}, "give the arguments of sharded_avg.Snapshots"),
        ({"snapshots": {"folder": "here", "every_steps": 0}}, "every_steps"),
        ({"snapshots": 1000}, "give the arguments of sharded_avg.Snapshots"),
        ({"check_replicas_every_n_updates": -1}, "check_replicas_every_n_updates=-1"),
    ],
)
def test_arguments(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        WeightAveraging(**arguments)


@pytest.mark.own_processes
def test_other_names_in_the_checkpoint(tmp_path: Path) -> None:
    """An error that names them; with strict=False, what fits goes on, and the others begin."""
    path, save = tmp_path / "saved.ckpt", At("on_train_end", lambda t: t.save_checkpoint(tmp_path / "saved.ckpt"))
    trainer(tmp_path, "single", [several(), save], max_epochs=1).fit(module("single"))
    rules = {"short": EMA(decay=SHORT), "new": EMA(decay=0.75)}
    with pytest.raises(CheckpointError, match=r"averages missing from it: \['new'\]"):
        trainer(tmp_path, "single", [WeightAveraging(rule=rules)], max_epochs=2).fit(module("single"), ckpt_path=path)
    callback = WeightAveraging(rule=rules, strict=False, end_with="raw")
    trainer(tmp_path, "single", [callback], max_epochs=2).fit(module("single"), ckpt_path=path)
    found = all_averages(callback)
    assert_same(found["short"], expected_after(2 * NUM_BATCHES)["short"])
    weights = {step: raw_after(step) for step in range(NUM_BATCHES + 1, 2 * NUM_BATCHES + 1)}
    assert_same(found["new"], plain_average(weights, 0.75))
