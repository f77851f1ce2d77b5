"""What users of weight averaging ran into elsewhere, on several ranks, where no other file of tests has it.

docs/field_reports.md lists all reports, by ID, with the tests that answer them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_avg import EMA, LayoutChangedError, ShardedAverage
from sharded_avg.weights.layouts.zero import ZeroLayout
from tests.helpers.engines import Row, mesh, run_row
from tests.helpers.models import batch
from tests.helpers.pool import on_ranks
from tests.helpers.watch import CountBytes, forward, trained_with
from tests.helpers.zero_engines import Awkward as ZeroModel
from tests.helpers.zero_engines import engine_of, evaluate, every_stage, settings, train
from tests.helpers.zero_engines import gathered as gathered_by_hand

DECAY = 0.5
Full = dict[str, Tensor]


def full_of(average: ShardedAverage) -> Full:
    """Collective. The average, whole, on all ranks."""
    with average.summon_full_params(rank0_only=False) as full:
        return dict(full)


def of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Another change at each call, the same for a parameter whichever way it is cut."""
    for parameter in model.parameters():
        parameter.add_(torch.full_like(parameter, float(torch.rand(()))))


# --- the average moves ---------------------------------------------------------------------------------------------


def unchanged(before: Full, after: Full) -> list[str]:
    return [name for name, value in before.items() if torch.equal(value.to(after[name].dtype), after[name])]


def check_moves(row: Row) -> None:
    engine = row.start()
    start, average = engine.full(), ShardedAverage(engine.model, EMA(decay=DECAY))
    seen = [start]
    for step in range(3):
        engine.learn(batch(step, engine.part))
        average.update()
        full = full_of(average)
        seen.append({name: full[name] for name in start})
    assert of_all_ranks(average.n_averaged) == [3] * dist.get_world_size()
    assert [unchanged(before, seen[-1]) for before in seen[:-1]] == [[]] * 3
    for other in of_all_ranks(seen[-1]):
        assert unchanged(other, seen[-1]) == list(start), "the same on all ranks"


@pytest.mark.parametrize(
    ("row", "world_size"), [("ddp", 3), ("fsdp1-full-flat", 3), ("fsdp2", 3), ("zero2", 2), ("zero3", 2)]
)
def test_ranks_count_alike_and_every_parameter_moves(row: str, world_size: int) -> None:
    """P09, P101: after three steps all ranks say three, and no averaged parameter is what it was at the start."""
    run_row(row, world_size, check_moves)


# --- nothing but shards --------------------------------------------------------------------------------------------


def check_no_second_model(row: Row) -> None:
    engine = row.start()
    engine.learn(batch(0, engine.part))
    modules = [id(module) for module in engine.model.modules()]
    wrapped = mock.patch.object(nn.Module, "__init__", side_effect=AssertionError("a module was made"))
    with CountBytes() as count, wrapped:
        average = ShardedAverage(engine.model, EMA(decay=DECAY))
        average.update()
    assert [id(module) for module in engine.model.modules()] == modules
    assert average.nbytes == 4 * engine.local_numel()
    beside = count.nbytes - average.nbytes - average._state.store.scratch_nbytes
    assert 0 <= beside <= 32  # FSDP1 drops its full copies with a tensor of 20 bytes


@pytest.mark.parametrize(
    ("row", "world_size"), [("ddp", 2), ("fsdp1-full-flat", 3), ("fsdp1-full-views", 2), ("fsdp2", 3), ("zero3", 2)]
)
def test_no_second_model_is_needed(row: str, world_size: int) -> None:
    """P36, P37, P68, P70: no module is made, copied or wrapped; what is allocated is four bytes a local element."""
    run_row(row, world_size, check_no_second_model)


class Recorder(TorchDispatchMode):
    """The operators that write, and whether any of them got a DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.on_dtensors: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.ops[name] += name.endswith("_")
        if any(isinstance(leaf, DTensor) for leaf in torch.utils._pytree.tree_leaves((args, kwargs))):
            self.on_dtensors.append(name)
        return func(*args, **(kwargs or {}))


@on_ranks(2)
def test_one_call_updates_all_local_shards() -> None:
    """P43: forty DTensors, and an update is one foreach call on their local tensors, never on the DTensors."""
    model = fully_shard(nn.Sequential(*[nn.Linear(3, 5) for _ in range(20)]), mesh=mesh((2,)))
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    with Recorder() as recorder:
        average.update()
    assert recorder.on_dtensors == []
    assert +recorder.ops == {"_foreach_lerp_": 1}


def check_offloaded(row: Row) -> None:
    engine, average = trained_with(row)
    shards = average._state.members.averaged
    for shard in shards:
        held = (shard.tensor, shard.target, average._state.store.view("average", shard.name))
        assert not any(isinstance(tensor, DTensor) for tensor in held)
        assert {tensor.device.type for tensor in held} == {"cpu"}
    raw = forward(engine)
    with average.swapped():
        assert not torch.equal(forward(engine), raw)
    assert torch.equal(forward(engine), raw)


def test_offloaded_dtensors() -> None:
    """P77: under CPU offload only local tensors are held (DTensors cannot be pinned), and validating is one block."""
    run_row("fsdp2-offload", 2, check_offloaded)


# --- pairing -------------------------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Layers of one shape, registered in an order of choice: by position, each could be taken for another."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(5, 5))


def units(model: Twins) -> nn.Module:
    for name in ("a", "c"):
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), device_id=torch.device("cpu")))
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def one_unit(model: Twins) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@on_ranks(2, 3)
def test_shards_that_were_flattened_otherwise_are_paired_by_name(tmp_path: Path) -> None:
    """P69: one flat parameter here, three there, in another order: each value finds its name, or is refused."""
    model = units(Twins("abc"))
    saved = ShardedAverage(model, EMA(decay=DECAY))
    for _ in range(3):
        shake(model)
        saved.update()
    expected = full_of(saved)
    saved.save(tmp_path / "average")
    for wrap in (one_unit, units, lambda model: fully_shard(model, mesh=mesh((dist.get_world_size(),)))):
        average = ShardedAverage(wrap(Twins("cab")), EMA(decay=DECAY))
        average.load(tmp_path / "average")
        assert all(torch.equal(full_of(average)[name], value) for name, value in expected.items())


WRAPPED_LATER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "fsdp2": lambda model: fully_shard(model, mesh=mesh((2,))),
    "ddp, then fsdp2 inside": lambda model: fully_shard(model.module, mesh=mesh((2,))),
}


@pytest.mark.parametrize("how", WRAPPED_LATER)
@on_ranks(2)
def test_a_model_that_was_cut_later_is_refused(how: str) -> None:
    """P69: what the average was built for and what the model is now are never paired by luck."""
    model: nn.Module = Twins("ab")
    model = DistributedDataParallel(model) if how.startswith("ddp") else model
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    before = average.n_averaged
    WRAPPED_LATER[how](model)
    with pytest.raises(LayoutChangedError, match="Build a new ShardedAverage"):
        average.update()
    assert average.n_averaged == before


# --- DeepSpeed -----------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen model with an adapter of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ZeroModel().requires_grad_(False)
        self.down, self.up = nn.Linear(7, 2, bias=False), nn.Linear(2, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x)
        return logits + self.up(self.down(logits.to(self.down.weight.dtype)))


def adapted() -> nn.Module:
    torch.manual_seed(5)
    return Adapted()


@every_stage
@on_ranks(2, kind="deepspeed")
def test_adapters(name: str) -> None:
    """P85, P103: adapters only are averaged, from whole shards, without a module more; frozen ones are filled in."""
    model = adapted()
    adapters = {key for key, param in model.named_parameters() if param.requires_grad}
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    with engine_of(settings(name), model, optimizer) as engine:
        modules = [id(module) for module in engine.modules()]
        average, layout, slow = ShardedAverage(engine, EMA(decay=DECAY)), ZeroLayout(engine), {}
        for step in range(3):
            train(engine, range(step, step + 1))
            average.update()
            live = gathered_by_hand(layout, lambda shard: shard.tensor)
            slow = {key: torch.lerp(slow.get(key, live[key]), live[key], DECAY) for key in adapters}
        assert [id(module) for module in engine.modules()] == modules
        assert sum(of_all_ranks(average.nbytes)) == 4 * 2 * 7 * 2
        full, frozen = full_of(average), adapted().state_dict()
        assert list(full) == list(frozen)
        for key, value in slow.items():
            assert value.shape == frozen[key].shape
            assert torch.equal(full[key], value), key
        assert all(
            torch.equal(full[key], value.to(full[key].dtype)) for key, value in frozen.items() if key not in slow
        )
        raw = evaluate(engine)
        with average.swapped():
            assert not torch.equal(evaluate(engine), raw)


@every_stage
@on_ranks(2, kind="deepspeed")
def test_updates_are_counted_by_optimizer_steps(name: str) -> None:
    """P99: called after each of three micro-batches to a step, `update()` takes in weights after real steps only."""
    with engine_of(settings(name, gradient_accumulation_steps=3)) as engine:
        average, layout = ShardedAverage(engine, EMA(decay=DECAY)), ZeroLayout(engine)
        trained = [shard.name for shard in layout.shards() if shard.trainable]
        slow: Full = {}
        done = []
        for micro_batch in range(9):
            train(engine, range(micro_batch, micro_batch + 1))
            done.append(average.update())
            if micro_batch % 3 == 2:
                live = gathered_by_hand(layout, lambda shard: shard.tensor)
                slow = {key: torch.lerp(slow.get(key, live[key]), live[key], DECAY) for key in trained}
        assert done == [False, False, True] * 3
        assert (average.n_averaged, average.num_steps) == (3, 3)
        full = full_of(average)
        assert [key for key in trained if not torch.equal(full[key], slow[key])] == []


# --- torch.compile -------------------------------------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.tanh(self.wide(x)))


@on_ranks(2)
def test_compiled_parts_under_fsdp2() -> None:
    """P106: sharded and compiled, the model computes with the average inside, and swaps cause no compilation."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model, plain = nn.Sequential(Part(), Part()), nn.Sequential(Part(), Part())
    for part in model:
        part.compile(backend=counter)
        fully_shard(part, mesh=mesh((2,)))
    fully_shard(model, mesh=mesh((2,)))
    average, x, compilations = ShardedAverage(model, EMA(decay=DECAY)), torch.ones(2, 3), []
    for _ in range(3):
        shake(model)
        average.update()
        with torch.no_grad():
            raw = model(x)
            with average.swapped():
                inside = model(x)
            assert torch.equal(model(x), raw)
        compilations.append(counter.frame_count)
    plain.load_state_dict(full_of(average))
    assert torch.equal(inside, plain(x))
    assert not torch.equal(inside, raw)
    assert len(set(compilations)) == 1
    assert compilations[0] > 0
