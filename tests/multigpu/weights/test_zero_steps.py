"""Which steps count under DeepSpeed: each that changed weights, once, whoever made it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_avg import EMA, ShardedAverage
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import engine_of, every_stage, loss_of, plain_model, settings, tokens, train


@every_stage
@on_ranks(2, kind="deepspeed")
def test_each_step_counts_once(name: str) -> None:
    """R05: `was_step_applied()` stays true until the next step, and a second `update()` took the same weights again."""
    with engine_of(settings(name)) as engine:
        average = ShardedAverage(engine, EMA(decay=0.5))
        assert not average.update()  # before any step
        train(engine, range(2))
        assert average.update()
        assert not average.update()
        late = ShardedAverage(engine, EMA(decay=0.5))
        assert late.update()  # the step before it, as with any other model
        assert not late.update()
        train(engine, range(2, 3))
        assert (average.update(), late.update()) == (True, True)
        assert (average.n_averaged, late.n_averaged, average.num_steps) == (2, 2, 2)


@every_stage
@on_ranks(2, kind="deepspeed")
def test_micro_batches_do_not_count(name: str) -> None:
    """R05: gradients that only accumulate change no weights."""
    with engine_of(settings(name, gradient_accumulation_steps=2)) as engine:
        average = ShardedAverage(engine, EMA(decay=0.5))
        counted = []
        for step in range(6):
            counted.append(average.update())  # before the step: what the one before has left
            train(engine, range(step, step + 1))
            counted.append(average.update())
        assert counted == [False, False, False, True] * 3
        assert average.num_steps == 3


@every_stage
@on_ranks(2, kind="deepspeed")
def test_steps_behind_the_engines_back_count(name: str) -> None:
    """R05: Lightning Fabric calls the optimizer itself; the engine knows of no step."""
    with engine_of(settings(name)) as engine:
        average = ShardedAverage(engine, EMA(decay=0.5))
        for step in range(2):
            engine.backward(loss_of(engine(tokens(step, dist.get_rank()))))
            assert not average.update()
            engine.optimizer.step()
            assert average.update()
            assert not average.update()
            engine.optimizer.zero_grad()
        assert engine.global_steps == 0
        assert average.n_averaged == 2


def hooks_of(engine: Any) -> int:
    return len(getattr(engine.optimizer, "optimizer", engine.optimizer)._optimizer_step_post_hooks)


@pytest.mark.parametrize("name", ["0-fp32", "2-bf16"])
@on_ranks(2, kind="deepspeed")
def test_an_average_that_is_gone_leaves_nothing_behind(name: str) -> None:
    with engine_of(settings(name)) as engine:
        before = hooks_of(engine)
        average = ShardedAverage(engine, EMA(decay=0.5))
        assert hooks_of(engine) == before + 1
        del average
        gc.collect()
        assert hooks_of(engine) == before
        train(engine, range(1))


@on_ranks(2, kind="deepspeed")
def test_an_engine_inside_a_wrapper() -> None:
    """R05: Fabric's is not the only thing that wraps an engine."""
    with engine_of(settings("2-bf16")) as engine:
        average = ShardedAverage(torch.compile(engine, backend="eager"), EMA(decay=0.5))
        train(engine, range(1))
        assert average.update()
        with average.summon_full_params(rank0_only=False) as full:
            assert list(full) == list(plain_model().state_dict())
