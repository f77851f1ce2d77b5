"""A rank that runs out of memory anywhere in one of our hooks: the fit ends on all ranks, within seconds.

At the first tensor operation after each communication that the hook has, on one rank, with nothing replaced; the fit
after it, on the same ranks, goes well.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sharded_avg import ShardedAvgError
from sharded_avg.lightning import WeightAveraging
from tests.helpers.further import covered_by
from tests.helpers.trap import Trap

from .runs import module, run, trainer
from .watching import At

LIMIT_S = 20.0  # of the rest of a fit that fails, on a busy machine
HOOKS = ("on_train_start", "on_validation_start", "on_validation_end", "on_train_end", "save_checkpoint")
COVER = {("on_validation_end", "ddp"), ("on_validation_start", "fsdp2"), ("on_train_end", "ddp")}


class Trapped:
    """A hook of one rank, with a trap in it the first time that it is called."""

    def __init__(self, hook: Any, stretch: int) -> None:
        def no_memory() -> None:
            self.is_over = True
            raise MemoryError("of the test")

        self.hook, self.trap, self.is_over = hook, Trap(stretch, no_memory), False

    def __call__(self, *arguments: Any) -> Any:
        if self.is_over:
            return self.hook(*arguments)
        with self.trap.listening():
            return self.hook(*arguments)


def fit(folder: Path, name: str, hook: str, stretch: int, fails: int) -> tuple[str, str, float]:
    """Collective. The class that a fit raised, where the trap was sprung, and how long after that it ended."""
    ours, fitted, error = WeightAveraging(), None, ""
    save = At("on_train_batch_end", lambda t: t.save_checkpoint(folder / "a.ckpt") if t.global_step == 2 else None)
    fitted = trainer(folder, name, [save, ours], max_epochs=1, num_sanity_val_steps=0)
    trapped = None
    if dist.get_rank() == fails:
        trapped = Trapped(getattr(fitted if hook == "save_checkpoint" else ours, hook), stretch)
        setattr(fitted if hook == "save_checkpoint" else ours, hook, trapped)
    try:
        fitted.fit(module(name))
    except MemoryError:
        error = "MemoryError"
    except ShardedAvgError:
        error = "ShardedAvgError"
    ended = time.monotonic()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (trapped and trapped.trap.where, trapped and trapped.trap.sprung_at))
    where, began = told[fails]
    return error, where or "", 0.0 if began is None else ended - began


def sweep(tmp_path: Path, name: str, hook: str) -> float:
    longest_s, fails = 0.0, dist.get_world_size() - 1
    for stretch in count():
        error, where, took_s = fit(tmp_path, name, hook, stretch, fails)
        if not where:
            assert not error
            assert stretch, "nothing was tried"
            return longest_s
        assert error == ("MemoryError" if dist.get_rank() == fails else "ShardedAvgError"), where
        assert took_s < LIMIT_S, where
        longest_s = max(longest_s, took_s)
    raise AssertionError


@pytest.mark.parametrize(
    ("hook", "name"), covered_by(COVER, [(hook, name) for hook in HOOKS for name in ("ddp", "fsdp2")])
)
def test_a_failure_anywhere_in_a_hook(hook: str, name: str, tmp_path: Path) -> None:
    """The rank's own error there, one of ours elsewhere."""
    run(name, sweep, tmp_path, name=name, hook=hook)
