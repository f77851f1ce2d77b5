"""Averages saved on their own schedule, and another horizon made of them after training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_avg import (
    EMA,
    CheckpointError,
    ConfigError,
    PowerAverage,
    Schedule,
    ShardedAverage,
    Snapshots,
    load_averaged_state_dict,
)

RULES = {"wide": PowerAverage.from_sigma_rel(0.2), "narrow": PowerAverage.from_sigma_rel(0.1)}


def train(average: ShardedAverage, model: nn.Module, steps: range, after: Any = lambda: None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        average.update()
        after()


def made(rules: Any = None) -> tuple[nn.Module, ShardedAverage]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    return model, ShardedAverage(model, rules or RULES)


def saved_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def full(average: ShardedAverage, name: str) -> dict[str, Tensor]:
    with average.summon_full_params(name) as state:
        return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({}, [4, 8, 12, 16, 20, 24]),
        ({"keep_last": 2}, [20, 24]),
        ({"keep_last": 1, "keep_every": 8}, [8, 16, 24]),
        ({"keep_every": 12}, [12, 24]),
    ],
)
def test_retention(tmp_path: Path, keep, expected):
    model, average = made()
    with Snapshots(average, tmp_path, 4, **keep) as snapshots:
        train(average, model, range(1, 26), snapshots.update)
    assert saved_in(tmp_path) == expected


def test_values_are_those_of_the_moment(tmp_path: Path):
    """Each is what the average was when its save began, in the dtype that was asked for."""
    for dtype in (None, torch.bfloat16):
        model, average = made()
        expected = {}
        folder = tmp_path / str(dtype)
        snapshots = Snapshots(average, folder, 3, dtype=dtype)

        def after(snapshots=snapshots, average=average, expected=expected):
            if snapshots.update():
                expected[average.num_steps] = full(average, "wide")

        train(average, model, range(1, 11), after)
        snapshots.close()
        assert saved_in(folder) == list(expected) == [3, 6, 9]
        for step, state in expected.items():
            found = load_averaged_state_dict(folder / f"step-{step:09d}", name="wide")
            assert all(torch.equal(found[key], value.to(dtype or value.dtype)) for key, value in state.items())
        _, loaded = made()
        loaded.load(folder / "step-000000009")
        assert loaded.num_steps == 9


def test_never_two_in_flight_and_once_a_step(tmp_path: Path):
    model, average = made()
    snapshots, pending = Snapshots(average, tmp_path, 1), []
    for step in range(1, 5):
        train(average, model, range(step, step + 1))
        assert snapshots.update()
        assert not snapshots.update(), "twice after one step"
        pending.append(snapshots._pending)
        assert all(earlier.done() for earlier in pending[:-1])
    snapshots.close()
    snapshots.close()
    assert saved_in(tmp_path) == [1, 2, 3, 4]


def test_nothing_before_the_first_update(tmp_path: Path):
    model = nn.Linear(3, 1)
    average = ShardedAverage(model, RULES, schedule=Schedule(start_step=5))
    with Snapshots(average, tmp_path / "snapshots", 2) as snapshots:
        train(average, model, range(1, 7), snapshots.update)
    assert saved_in(tmp_path / "snapshots") == [6]


def test_posthoc(tmp_path: Path):
    """The mixture by hand, of full tensors, in float64; and near the average that was never kept."""
    model, average = made({**RULES, "wanted": PowerAverage.from_sigma_rel(0.15)})
    with Snapshots(average, tmp_path, 10) as snapshots:
        train(average, model, range(1, 101), snapshots.update)
    wanted = full(average, "wanted")
    _, other = made({"average": EMA(decay=0.9), "kept": EMA(decay=0.5)})
    train(other, other._state.layout.model, range(3))
    kept = full(other, "kept")
    mixed = other.load_posthoc(tmp_path, sigma_rel=0.15, name="average")
    assert (mixed.step, other.num_steps) == (100, 100)
    assert mixed.error < 1e-6  # it is among the saves
    sums = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in wanted.items()}
    for path, name, weight in mixed.parts:
        for key, value in load_averaged_state_dict(path, name=name).items():
            sums[key] += weight * value.double()
    found = full(other, "average")
    assert all(torch.equal(found[key], value.float()) for key, value in sums.items())
    assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in wanted.items())
    assert all(torch.equal(kept[key], value) for key, value in full(other, "kept").items())
    with other.swapped("average"):
        pass
    early = other.load_posthoc(tmp_path, sigma_rel=0.12, name="average", step=57)
    assert early.step == 50


def test_torn_snapshots_are_passed_over_with_a_word(tmp_path: Path):
    model, average = made()
    with Snapshots(average, tmp_path, 10) as snapshots:
        train(average, model, range(1, 51), snapshots.update)
    torn = (tmp_path / "step-000000050").rename(tmp_path / "step-000000050.incoming")  # as a killed save leaves it
    for name in ("manifest.json", ".metadata"):
        (torn / name).unlink()
    with pytest.warns(UserWarning, match=r"step-000000050.*passed over"):
        assert average.load_posthoc(tmp_path, sigma_rel=0.15, name="wide").step == 40
    shutil.rmtree(tmp_path / "step-000000050.incoming")
    before = full(average, "wide")
    with pytest.raises(CheckpointError):
        average.load_posthoc(tmp_path / "elsewhere", sigma_rel=0.15, name="wide")
    with pytest.raises(ConfigError):
        average.load_posthoc(tmp_path, sigma_rel=0.5, name="wide")
    assert all(torch.equal(before[key], value) for key, value in full(average, "wide").items())


def test_another_model_is_refused(tmp_path: Path):
    model, average = made()
    with Snapshots(average, tmp_path, 10) as snapshots:
        train(average, model, range(1, 21), snapshots.update)
    other = ShardedAverage(nn.Linear(3, 2), EMA(decay=0.9))
    with pytest.raises(CheckpointError, match="does not fit"):
        other.load_posthoc(tmp_path, sigma_rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every_steps": 0}, "every_steps=0"),
        ({"every_steps": 1, "keep_last": 0}, "keep_last=0"),
        ({"every_steps": 1, "keep_every": -1}, "keep_every=-1"),
        ({"every_steps": 1, "dtype": torch.int8}, "dtype=torch.int8"),
    ],
)
def test_what_cannot_be(tmp_path: Path, arguments, says):
    _, average = made()
    with pytest.raises(ConfigError, match=says):
        Snapshots(average, tmp_path, **arguments)
    with pytest.raises(ConfigError, match="disk"):
        Snapshots(average, "memory://x", 1)
