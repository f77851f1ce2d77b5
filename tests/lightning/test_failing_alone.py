"""What fails on one rank is an error on all of them, within seconds: in building, saving and resuming an average."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sharded_avg import CustomRule, PeerError, ShardedAverage
from sharded_avg.lightning import WeightAveraging
from sharded_avg.ranks import bounds

from .modules import NUM_BATCHES
from .runs import module, run, trainer
from .watching import At

GRACE_S = 1.0
LIMIT_S = 20.0  # of a fit that fails, on a busy machine; to hang is minutes
STRATEGIES = ["ddp", "fsdp2"]


class OneRankError(ValueError):
    """What the last rank's own code raises."""


def is_last() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def include(name: str, tensor: Tensor) -> bool:
    if is_last():
        raise OneRankError(name)
    return True


class FailsLater:
    """A formula that fails on the last rank, at one update."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Any) -> Tensor:
        if int(num_averaged) == self.at and is_last():
            raise OneRankError(str(num_averaged))
        return averaged + (current - averaged) * 0.25


def failed(fitted: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """What a fit raised, and when."""
    raised, start = None, time.monotonic()
    with mock.patch.object(bounds, "LEAVING_GRACE_S", GRACE_S):
        try:
            fitted.fit(*arguments, **options)
        except Exception as error:
            raised = type(error)
    return {"raised": raised, "took_s": time.monotonic() - start, "step": fitted.global_step}


def build(tmp_path: Path, name: str) -> dict[str, Any]:
    found = failed(trainer(tmp_path, name, [WeightAveraging(include=include)], max_epochs=1), module(name))
    again = WeightAveraging()
    trainer(tmp_path, name, [again], max_epochs=1).fit(module(name))
    return found | {"again": again.average.n_averaged}


def save(tmp_path: Path, name: str) -> dict[str, Any]:
    """A save between a step and our hook, which takes the step in: a callback before ours."""
    saver = At("on_train_batch_end", lambda t: t.save_checkpoint(tmp_path / f"{t.global_step}.ckpt"))
    ours = WeightAveraging(rule=CustomRule(avg_fn=FailsLater(2)))
    return failed(trainer(tmp_path, name, [saver, ours], max_epochs=1), module(name))


def resume(tmp_path: Path, name: str) -> dict[str, Any]:
    path = tmp_path / "end.ckpt"
    fitted = trainer(tmp_path, name, [WeightAveraging()], max_epochs=1)
    fitted.fit(module(name))
    fitted.save_checkpoint(path)
    method, original = ("load_full", ShardedAverage.load_full) if path.is_file() else ("load", ShardedAverage.load)

    def fails_afterwards(average: ShardedAverage, *arguments: Any, **options: Any) -> Any:
        result = original(average, *arguments, **options)
        if is_last():
            raise OneRankError("out of memory, say")
        return result

    with mock.patch.object(ShardedAverage, method, fails_afterwards):
        found = failed(trainer(tmp_path, name, [WeightAveraging()]), module(name), ckpt_path=path)
    again = WeightAveraging()
    trainer(tmp_path, name, [again]).fit(module(name), ckpt_path=path)
    return found | {"again": again.average.n_averaged}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("body", "step"), [(build, 0), (save, 3), (resume, NUM_BATCHES)], ids=lambda v: getattr(v, "__name__", "")
)
def test_all_ranks_raise(name: str, body: Any, step: int, tmp_path: Path) -> None:
    """The rank's own error there, `PeerError` elsewhere; and the same without the fault goes well."""
    first, last = run(name, body, tmp_path, name=name)
    assert (first["raised"], last["raised"]) == (PeerError, OneRankError)
    for found in (first, last):
        assert found["took_s"] < LIMIT_S
        assert found["step"] == step
        assert found.get("again") in {None, NUM_BATCHES, 2 * NUM_BATCHES}
