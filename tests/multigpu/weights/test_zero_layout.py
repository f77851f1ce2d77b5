"""ZeroLayout on real DeepSpeed engines: against plain models with the gathered weights, and runs without swaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_avg import EMA, ShardedAverage
from sharded_avg.shard import Box, Interval, Shard
from sharded_avg.weights.layouts import zero
from sharded_avg.weights.layouts.zero import ZeroLayout, looks_like_zero
from tests.helpers.further import further
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import (
    Awkward,
    Config,
    assert_same,
    engine_of,
    evaluate,
    every_config,
    every_stage,
    gathered,
    loss_of,
    masters_after,
    plain_forward,
    plain_model,
    settings,
    tokens,
    train,
    trained,
    two_groups,
    two_stages,
    write,
)

# --- what a rank holds ---------------------------------------------------------------------------------------------


def check_shards(name: str) -> None:
    with engine_of(settings(name)) as engine:
        layout = ZeroLayout(engine)
        train(engine, range(2))
        evaluate(engine)
        layout.release()
        shards = layout.shards()
        assert [shard.name for shard in shards if shard.is_buffer] == ["count", "shift"]
        assert layout.aliases == {"head.weight": "table.weight"}
        assert sorted({*layout.aliases, *(shard.name for shard in shards)}) == sorted(plain_model().state_dict())
        for shard in shards:
            check_shard(shard, has_masters=name != "0-fp32")
        check_values(layout, engine, name)
        check_order(shards, name)


def check_shard(shard: Shard, has_masters: bool) -> None:
    assert shard.shape == plain_model().state_dict()[shard.name].shape
    assert shard.trainable == (not shard.is_buffer and "frozen" not in shard.name)
    assert isinstance(shard.region, Interval) or shard.region == Box.whole(shard.shape)
    if shard.region.numel == 0:
        assert shard.region == Interval(0, 0)
        assert shard.tensor.shape == (0,)
    if not shard.trainable or not has_masters:
        assert shard.working is None
        return
    assert shard.tensor.dtype == torch.float32
    assert shard.working is not None
    assert torch.equal(shard.working, shard.tensor.to(shard.working.dtype))
    assert not shard.region.numel or shard.working.data_ptr() != shard.tensor.data_ptr()


def check_values(layout: ZeroLayout, engine: Any, name: str) -> None:
    """Gathered by name, weights are what the model computes with, and masters what DeepSpeed says that they are."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    masters, weights = (gathered(layout, value) for value in (lambda s: s.tensor, lambda s: s.target))
    for key, param in engine.module.named_parameters():
        with GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            assert torch.equal(param.detach(), weights[key]), key
        if param.requires_grad and "roundrobin" not in name and not name.startswith("0"):
            assert torch.equal(safe_get_full_fp32_param(param), masters[key]), key


def check_order(shards: list[Shard], name: str) -> None:
    """Neighbours in memory follow each other: one stretch per parameter group, where nothing is padded in between."""
    held = [shard.tensor for shard in shards if shard.working is not None and shard.tensor.numel()]
    ends = [tensor.data_ptr() + 4 * tensor.numel() for tensor in held]
    breaks = sum(end != tensor.data_ptr() for end, tensor in zip(ends[:-1], held[1:], strict=True))
    if name[0] in "12" and "aligned" not in name:
        assert breaks <= 1


@every_config
@on_ranks(2, kind="deepspeed")
def test_shards_are_views_of_the_masters(name: str) -> None:
    """P82, P83: the fp32 master is averaged where it is; no shard of a partitioned parameter is silently empty."""
    check_shards(name)


@two_stages
@on_ranks(3, kind="deepspeed")
def test_shards_on_three_ranks(name: str) -> None:
    """P83: uneven stretches, and ranks that have nothing of a parameter."""
    check_shards(name)


@pytest.mark.parametrize("name", ["1-bf16-fp32grads", "2-bf16", "3-bf16", "0-bf16"])
@on_ranks(3, kind="deepspeed")
def test_each_rank_has_its_share(name: str) -> None:
    """P87: stages 0, 1 and 2 divide the average like stage 3 does, although their weights are replicated."""
    with engine_of(settings(name)) as engine:
        held = sum(shard.tensor.numel() for shard in ZeroLayout(engine).shards() if shard.trainable)
        total = torch.tensor(held)
        dist.all_reduce(total)
        assert total == sum(param.numel() for param in trained(plain_model()))
        assert held <= -(-total // 3) + len(trained(plain_model()))


# --- exchanging ----------------------------------------------------------------------------------------------------


def check_exchange(config: Config, build: Callable[[], nn.Module] = plain_model) -> None:
    with engine_of(config, build()) as engine:
        layout = ZeroLayout(engine)
        train(engine, range(2))
        raw, masters = evaluate(engine), gathered(layout, lambda shard: shard.tensor)
        restore = write(layout)
        other = evaluate(engine)
        assert not torch.equal(other, raw)
        assert torch.equal(other, plain_forward(layout))
        assert torch.equal(evaluate(engine), other)
        restore()
        assert torch.equal(evaluate(engine), raw)
        assert torch.equal(raw, plain_forward(layout))
        assert_same(gathered(layout, lambda shard: shard.tensor), masters)
        train(engine, range(2, 4))
        end = gathered(layout, lambda shard: shard.tensor)
    assert_same(end, masters_after(config, 4))


@every_config
@on_ranks(2, kind="deepspeed")
def test_exchange_changes_forward_and_training_goes_on(name: str) -> None:
    """P82, P84, P86: forward computes with what was written, and training goes on as if nothing had happened."""
    check_exchange(settings(name))


@every_stage
@on_ranks(3, kind="deepspeed")
def test_exchange_on_three_ranks(name: str) -> None:
    """P84 with uneven stretches."""
    check_exchange(settings(name))


@two_stages
@on_ranks(2, kind="deepspeed")
def test_exchange_in_small_buckets(name: str) -> None:
    with mock.patch.object(zero.run, "SCRATCH_BYTES", 16):
        check_exchange(settings(name))


@two_stages
@on_ranks(2, kind="deepspeed")
def test_exchange_inside_gradient_accumulation(name: str) -> None:
    config = settings(name, gradient_accumulation_steps=2)
    with engine_of(config) as engine:
        layout = ZeroLayout(engine)
        skipped = []
        for step in range(4):
            train(engine, range(step, step + 1))
            skipped.append(layout.step_was_skipped())
            layout.count_step()
            write(layout)()
        assert skipped == [True, False, True, False]
        end = gathered(layout, lambda shard: shard.tensor)
    assert_same(end, masters_after(config, 4))


@pytest.mark.parametrize("name", ["2-bf16", "3-bf16"])
@on_ranks(2, kind="deepspeed")
def test_restored_after_a_forward_that_raised(name: str) -> None:
    """P67 under ZeRO: a forward that fails half-way leaves gathers and prefetches behind."""
    with engine_of(settings(name)) as engine:
        layout = ZeroLayout(engine)
        train(engine, range(3))
        raw, restore = evaluate(engine), write(layout)
        broken = mock.patch.object(engine.module.wide, "forward", side_effect=ValueError("half-way"))
        with broken, pytest.raises(ValueError, match="half-way"):
            evaluate(engine)
        restore()
        layout.shards()
        assert torch.equal(evaluate(engine), raw)
        train(engine, range(3, 5))
        end = gathered(layout, lambda shard: shard.tensor)
    assert_same(end, masters_after(settings(name), 5))


@on_ranks(2, kind="deepspeed")
def test_model_built_under_zero_init() -> None:
    deepspeed = pytest.importorskip("deepspeed")

    def build() -> nn.Module:
        torch.manual_seed(5)
        with deepspeed.zero.Init(config_dict_or_path=settings("3-bf16")):
            model = Awkward()
        assert looks_like_zero(model)
        return model

    with engine_of(settings("3-bf16"), build()) as engine:
        layout = ZeroLayout(engine)
        train(engine, range(2))
        restore = write(layout)
        assert torch.equal(evaluate(engine), plain_forward(layout))
        restore()
        assert torch.equal(evaluate(engine), plain_forward(layout))


@two_stages
@on_ranks(2, kind="deepspeed")
def test_parameters_that_no_optimizer_has(name: str) -> None:
    """They require grad and have no master; an exchange reaches them all the same."""
    model = plain_model()
    some = torch.optim.AdamW([model.wide.weight, model.scale], lr=0.01)
    with engine_of(settings(name), model, some) as engine:
        layout = ZeroLayout(engine)
        train(engine, range(2))
        raw, restore = evaluate(engine), write(layout)
        assert torch.equal(evaluate(engine), plain_forward(layout))
        restore()
        assert torch.equal(evaluate(engine), raw)


# --- the trained values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [further("0-fp32"), further("1-fp32"), "2-fp32", "3-fp32"])
@on_ranks(2, kind="deepspeed")
def test_masters_equal_plain_training(name: str) -> None:
    """P82: a plain model, stepped by torch with the mean of both ranks' gradients, has the same bits."""
    model = plain_model()
    optimizer = two_groups(trained(model))
    for step in range(3):
        gradients = []
        for rank in range(2):
            optimizer.zero_grad()
            loss_of(model(tokens(step, rank))).backward()
            gradients.append([param.grad.clone() for param in trained(model)])  # type: ignore[union-attr]
        for param, first, second in zip(trained(model), *gradients, strict=True):
            param.grad = (first + second) / 2
        optimizer.step()
    masters = masters_after(settings(name), 3)
    for key, param in model.named_parameters():
        assert torch.equal(masters[key], param), key


@pytest.mark.parametrize("stage", [further("1"), "2"])
@on_ranks(2, kind="deepspeed")
def test_round_robin_changes_nothing_but_the_places(stage: str) -> None:
    """DeepSpeed's own safe_get_full_fp32_param pairs these wrongly (0.19.8)."""
    assert_same(masters_after(settings(f"{stage}-bf16-roundrobin"), 3), masters_after(settings(f"{stage}-bf16"), 3))


@pytest.mark.parametrize("name", [further("0-fp32"), "1-bf16-fp32grads", further("2-bf16"), "3-bf16"])
@on_ranks(2, kind="deepspeed")
def test_average_under_deepspeed(name: str) -> None:
    """P56, P84, P86, P89: fp32 averages beside bf16 weights move, equal a slow reference, and cost nothing before."""
    with engine_of(settings(name)) as engine:
        average, layout = ShardedAverage(engine, EMA(decay=0.5)), ZeroLayout(engine)
        averaged = [name for name, param in plain_model().named_parameters() if param.requires_grad]
        slow: dict[str, Tensor] = {}
        assert average.nbytes == 0
        for step in range(4):
            train(engine, range(step, step + 1))
            evaluate(engine)
            assert average.update()
            live = gathered(layout, lambda shard: shard.tensor)
            slow = {key: torch.lerp(slow.get(key, live[key]), live[key], 0.5) for key in averaged}
        raw = evaluate(engine)
        with average.swapped():
            assert not torch.equal(evaluate(engine), raw)
            assert torch.equal(evaluate(engine), plain_forward(layout))
        assert torch.equal(evaluate(engine), raw)
        with average.summon_full_params(rank0_only=False) as full:
            for key, value in slow.items():
                assert torch.equal(full[key], value), key
        train(engine, range(4, 6))
        end = gathered(layout, lambda shard: shard.tensor)
    assert_same(end, masters_after(settings(name), 6))


# --- steps that change nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, further(1), further(2), 3])
@on_ranks(2, kind="deepspeed")
def test_overflow_is_a_skipped_step(stage: int) -> None:
    """P100: dynamic loss scale, fp16. DeepSpeed says that CPUs have no fp16; torch's do."""
    deepspeed = pytest.importorskip("deepspeed")
    config = settings(f"{stage}-fp32", fp16={"enabled": True, "initial_scale_power": 8})
    with mock.patch.object(type(deepspeed.get_accelerator()), "is_fp16_supported", return_value=True):
        with engine_of(config) as engine:
            layout = ZeroLayout(engine)
            assert layout.step_was_skipped()
            train(engine, range(1))
            assert not layout.step_was_skipped()
            layout.count_step()
            masters = gathered(layout, lambda shard: shard.tensor)
            engine.backward(engine(tokens(1, 0)).float().sum() * 1e30)
            engine.step()
            assert layout.step_was_skipped()
            assert_same(gathered(layout, lambda shard: shard.tensor), masters)
            train(engine, range(1, 2))
            assert not layout.step_was_skipped()
        check_exchange(config)
