"""The arguments of the callbacks: which updates there are, and of what; and training that has no end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sharded_avg import EMA
from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging

from .modules import Tiny, batches
from .reference import DECAY, NUM_STEPS, assert_same, mean_of
from .steps import EachEpoch, fit_and_look, taken_in

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


class EverySecond(WeightAveraging):
    """The schedule is the callback's, and the horizon the rule's."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % 2 == 1


@pytest.mark.own_processes
def test_a_half_life_is_in_steps_under_any_stride(tmp_path: Path) -> None:
    """Two steps lie between updates, so that each leaves 2^(-2/3) of the average."""
    seen = fit_and_look(tmp_path, "single", callback=EverySecond(rule=EMA.from_half_life(3)))
    assert seen["counts"] == (NUM_STEPS // 2, NUM_STEPS)
    assert_same(seen["average"], taken_in([2, 4, 6, 8], seen["weights"], decay=(2 ** (-1 / 3)) ** 2))


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
