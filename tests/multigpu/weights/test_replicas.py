"""Replicas: models that several ranks hold whole, whether or not a wrapper says so, and what a swap does to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import EMA, ConfigError, PeerError, ReplicaError, ShardedAverage, load_averaged_state_dict
from sharded_avg.averages.state import State
from tests.helpers.engines import mesh
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import engine_of, settings, train


def model_of(value: float) -> nn.ModuleDict:
    """Equal on all ranks for equal values; odd sizes."""
    model = nn.ModuleDict({"first": nn.Linear(3, 5), "second": nn.Linear(5, 1, bias=False)})
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(float(parameter.numel())).view_as(parameter) / 8 + value + number)
    return model


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# --- process_group= ------------------------------------------------------------------------------------------------


@on_ranks(2, 3)
def test_replicas_that_no_wrapper_knows_of(world_size: int, tmp_path: Path) -> None:
    """R02: with `process_group=`, a plain module is divided, swapped and saved as one under DDP."""
    plain = model_of(1.0)
    average = ShardedAverage(plain, EMA(decay=0.5), process_group=dist.group.WORLD)
    other = ShardedAverage(DistributedDataParallel(model_of(1.0)), EMA(decay=0.5))
    average.update()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(2)
    average.update()
    other.update()
    assert average.nbytes == other.nbytes
    assert average.process_group is dist.group.WORLD
    raw, expected = values_of(plain), values_of(model_of(2.0))
    with average.swapped():
        assert_equal(values_of(plain), expected)
    assert_equal(values_of(plain), raw)
    average.save(tmp_path / "one")
    assert_equal(load_averaged_state_dict(tmp_path / "one"), expected)
    other.load(tmp_path / "one")
    with other.summon_full_params(rank0_only=False) as full:
        assert_equal(full, expected)


@on_ranks(3)
def test_replicas_on_a_part_of_the_job() -> None:
    pair = dist.new_group([0, 1])
    model = model_of(dist.get_rank() // 2)
    if dist.get_rank() == 2:
        with pytest.raises(ConfigError, match="rank 2 is not one of its ranks"):
            ShardedAverage(model, EMA(decay=0.5), process_group=pair)
        average = ShardedAverage(model, EMA(decay=0.5))
    else:
        average = ShardedAverage(model, EMA(decay=0.5), process_group=pair)
    average.update()
    raw = values_of(model)
    with average.swapped():
        assert_equal(values_of(model), raw)
    assert_equal(values_of(model), raw)
    assert average.nbytes == 4 * (25 if dist.get_rank() == 2 else (13, 12)[dist.get_rank()])


@on_ranks(2)
def test_a_group_that_contradicts_the_engine() -> None:
    wrapped, alone = DistributedDataParallel(model_of(1.0)), [dist.new_group([rank]) for rank in range(2)]
    with pytest.raises(ConfigError, match=r"has the ranks \[\d\].*DistributedDataParallel.*on \[0, 1\]: leave"):
        ShardedAverage(wrapped, EMA(decay=0.5), process_group=alone[dist.get_rank()])
    ShardedAverage(wrapped, EMA(decay=0.5), process_group=dist.group.WORLD)  # no contradiction
    with pytest.raises(ConfigError, match=r"process_group=2: must be a torch\.distributed\.ProcessGroup"):
        ShardedAverage(model_of(1.0), EMA(decay=0.5), process_group=2)  # type: ignore[arg-type]


# --- replicas that differ on purpose -------------------------------------------------------------------------------


def check_each_keeps_its_own(model: nn.ModuleDict, average: ShardedAverage, own: str) -> None:
    """`own` differs from rank to rank: its raw values and its average are this rank's; the rest is as ever."""
    average.update()
    before = values_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dist.get_rank() + 1.0 if parameter is model.get_parameter(own) else 2.0)
    average.update()
    raw = values_of(model)
    assert raw[own].mean() - before[own].mean() == dist.get_rank() + 1
    expected = {name: torch.lerp(before[name], raw[name], 0.5) for name in raw}
    for _ in range(2):
        with average.swapped():
            assert_equal(values_of(model), expected)
        assert_equal(values_of(model), raw)
    kept = average.raw_weights()
    average.copy_to_model()
    assert_equal(values_of(model), expected)
    assert average.restore_raw(kept)
    assert_equal(values_of(model), raw)


@pytest.mark.parametrize("own", ["first.weight", "first.bias", "second.weight"])
@on_ranks(2, 3)
def test_what_ddp_ignores_is_each_ranks_own(own: str) -> None:
    """R01: a parameter that DDP leaves alone is averaged whole on its rank, and no other rank's values replace it."""
    model = model_of(1.0)
    with torch.no_grad():
        model.get_parameter(own).mul_(dist.get_rank() + 1)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [own])
    average = ShardedAverage(DistributedDataParallel(model), EMA(decay=0.5))
    check_each_keeps_its_own(model, average, own)
    divided = 25 - model.get_parameter(own).numel()
    share = -(-divided // dist.get_world_size())
    assert average.nbytes <= 4 * (share + model.get_parameter(own).numel())


@on_ranks(2)
def test_what_ddp_has_never_seen_is_each_ranks_own() -> None:
    """R01: an adapter that was added, or a weight that was replaced, after DDP took the model: DDP leaves it alone."""
    model = model_of(1.0)
    wrapped = DistributedDataParallel(model)
    model["first"].register_parameter("late", nn.Parameter(torch.full((3,), float(dist.get_rank()))))
    check_each_keeps_its_own(model, ShardedAverage(wrapped, EMA(decay=0.5)), "first.late")
    model = model_of(1.0)
    wrapped = DistributedDataParallel(model)
    model["second"].weight = nn.Parameter(torch.full((1, 5), float(dist.get_rank())))
    check_each_keeps_its_own(model, ShardedAverage(wrapped, EMA(decay=0.5)), "second.weight")


@on_ranks(2)
def test_the_module_inside_a_wrapper_is_each_ranks_own() -> None:
    """R01: what the error advises to whoever trains models of their own behind one wrapper."""
    model = model_of(1.0)
    DistributedDataParallel(model)
    with torch.no_grad():
        model["second"].weight.fill_(dist.get_rank())
    check_each_keeps_its_own(model, ShardedAverage(model, EMA(decay=0.5)), "second.weight")


# --- replicas that differ by accident ------------------------------------------------------------------------------


def no_sync(wrapped: DistributedDataParallel, model: nn.ModuleDict) -> None:
    """A step on gradients that were not reduced."""
    with wrapped.no_sync():
        x = torch.full((2, 3), dist.get_rank() + 1.0)
        (model["second"](model["first"](x))).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def one_bit(wrapped: DistributedDataParallel, model: nn.ModuleDict) -> None:
    if dist.get_rank() == 1:
        model["second"].weight.data.view(-1).view(torch.int32)[3] ^= 1


def changed_places(wrapped: DistributedDataParallel, model: nn.ModuleDict) -> None:
    """The same numbers, elsewhere: no plain sum tells them apart."""
    if dist.get_rank() == 0:
        model["first"].weight.data = model["first"].weight.data.flip(0).contiguous()


def unfrozen_later(wrapped: DistributedDataParallel, model: nn.ModuleDict) -> None:
    """DDP reduces no gradient of what was frozen when it was wrapped."""
    model["first"].bias.data.add_(dist.get_rank())


ACCIDENTS = {
    no_sync: r"'first.weight', 'first.bias', 'second.weight'\)",
    one_bit: r"1 parameter\(s\).*\('second.weight'\)",
    changed_places: r"1 parameter\(s\).*\('first.weight'\)",
    unfrozen_later: r"1 parameter\(s\).*\('first.bias'\)",
}


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda accident: accident.__name__)
@on_ranks(2, 3)
def test_what_differs_by_accident_is_noticed(accident: Callable[..., None]) -> None:
    """R01: all ranks raise, each still has what it had, and the same calls succeed when the ranks agree again."""
    model = model_of(1.0)
    wrapped = DistributedDataParallel(model)
    average = ShardedAverage(wrapped, EMA(decay=0.5))
    average.update()
    with average.swapped():
        pass
    kept = average.raw_weights()
    accident(wrapped, model)
    raw = values_of(model)
    with pytest.raises(ReplicaError, match=ACCIDENTS[accident]), average.swapped():
        pytest.fail("the body must not run")
    with pytest.raises(ReplicaError, match=ACCIDENTS[accident]):
        average.copy_to_model()
    assert not average.restore_raw(kept)  # someone gave the model other weights
    assert_equal(values_of(model), raw)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    raw = values_of(model)
    with average.swapped():
        assert_equal(values_of(model), values_of(model_of(1.0)))
    assert_equal(values_of(model), raw)


@on_ranks(2)
def test_a_module_that_was_never_wrapped() -> None:
    """R01: ranks that train apart although `process_group=` says that they do not."""
    model = model_of(dist.get_rank())
    average = ShardedAverage(model, EMA(decay=0.5), process_group=dist.group.WORLD)
    average.update()
    raw = values_of(model)
    with pytest.raises(ReplicaError, match="3 parameter"), average.swapped():
        pytest.fail("the body must not run")
    assert_equal(values_of(model), raw)


@on_ranks(2)
def test_ranks_that_train_other_parameters() -> None:
    """R01: the ranks would not understand each other's messages; gloo would end the processes."""
    model = model_of(1.0)
    wrapped = DistributedDataParallel(model)
    model["second"].weight.requires_grad_(dist.get_rank() == 0)
    average = ShardedAverage(wrapped, EMA(decay=0.5))
    average.update()
    with pytest.raises(ReplicaError, match="average other parameters"), average.swapped():
        pytest.fail("the body must not run")


@on_ranks(2)
def test_a_rank_that_cannot_prepare_its_swap() -> None:
    """Nobody compares replicas with a rank that has failed, and nobody waits for it."""
    average = ShardedAverage(DistributedDataParallel(model_of(1.0)), EMA(decay=0.5))
    average.update()
    failing = mock.patch.object(State, "arrange", side_effect=MemoryError) if dist.get_rank() == 1 else nullcontext()
    with failing, pytest.raises((PeerError, MemoryError)), average.swapped():
        pytest.fail("the body must not run")
    with average.swapped():
        pass


# --- engines whose replicas are never published --------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["NO_SHARD", "HYBRID_SHARD", "HSDP"])
@on_ranks(4)
def test_other_engines_write_their_own_replica_only(engine: str) -> None:
    """R01: values that one replica has by itself stay its own."""
    model: nn.Module = nn.Sequential(*model_of(1.0).values())
    if engine == "HSDP":
        fully_shard(model, mesh=mesh((2, 2)))
    else:
        groups = mesh((2, 2)).get_group("shard"), mesh((2, 2)).get_group("replicate")
        model = FullyShardedDataParallel(
            model,
            process_group=groups if engine == "HYBRID_SHARD" else None,
            sharding_strategy=ShardingStrategy[engine],
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update()
    pieces = [parameter.detach().to_local() if engine == "HSDP" else parameter.data for parameter in model.parameters()]
    before = [piece.clone() for piece in pieces]
    with torch.no_grad():
        for piece in pieces:
            piece.add_(dist.get_rank() + 1)
    raw = [piece.clone() for piece in pieces]
    with average.swapped():
        assert all(map(torch.equal, pieces, before))
    assert all(map(torch.equal, pieces, raw))


def check_zero(name: str) -> None:
    with engine_of(settings(name)) as engine:
        average = ShardedAverage(engine, EMA(decay=0.5))
        train(engine, range(2))
        average.update()
        with average.swapped():
            pass
        changed, parameter = next(
            (key, parameter)
            for key, parameter in engine.module.named_parameters()
            if parameter.requires_grad and parameter.numel()  # stage 3: that is whole on every rank
        )
        before = parameter.detach().clone()
        if dist.get_rank() == 1:
            parameter.data.view(-1)[0] += 1
        raw = parameter.detach().clone()
        with pytest.raises(ReplicaError, match=rf"1 parameter\(s\).*\('{changed}'\)"), average.swapped():
            pytest.fail("the body must not run")
        with pytest.raises(ReplicaError, match=changed):
            average.copy_to_model()
        assert torch.equal(parameter, raw)
        parameter.data.copy_(before)
        with average.swapped():
            pass
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", ["0-fp32", "0-bf16", "1-bf16-fp32grads", "2-bf16-roundrobin", "2-fp32", "3-bf16"])
@on_ranks(2, kind="deepspeed")
def test_zero_notices_replicas_that_differ(name: str) -> None:
    """R01: low-precision weights of stages 0 to 2, and what stage 3 keeps whole, are published, too."""
    check_zero(name)


@on_ranks(2, kind="deepspeed")
def test_stage_0_notices_masters_that_differ() -> None:
    """R01: `copy_to_model` and `restore_raw` spread masters; stage 0 has whole ones on every rank."""
    with engine_of(settings("0-bf16")) as engine:
        if not hasattr(engine.optimizer, "fp32_groups"):
            pytest.skip("DeepSpeed 0.16 cuts the masters of stage 0: none is there twice")
        average = ShardedAverage(engine, EMA(decay=0.5))
        train(engine, range(1))
        average.update()
        if dist.get_rank() == 1:
            [group, *_] = engine.optimizer.fp32_groups
            group[0].data.view(-1)[0] += 2.0**-20  # no bf16 weight shows it
        with pytest.raises(ReplicaError, match="1 parameter"):
            average.copy_to_model()
