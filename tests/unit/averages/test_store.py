"""The store: any dtype, stride and device, several averages, moves between updates; no allocation, no sync."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_avg import EMA, SWA, CustomRule, Moment, ShardedAverage
from sharded_avg.averages.store import Store
from sharded_avg.shard import Box, Shard

DECAY = 0.75
RULES = {"fast": EMA(decay=DECAY), "mean": SWA()}
WEIGHTS: dict[str, Callable[[int], float]] = {"fast": lambda n: 1 - DECAY, "mean": lambda n: 1 / (n + 1)}


class Reference:
    """Averages by plain calls on whole tensors: one `lerp` for each parameter."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.model, self.dtype = model, dtype
        self.averages: dict[str, dict[str, Tensor]] = {name: {} for name in RULES}
        self.counts: Counter[str] = Counter()

    def in_dtype(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype or tensor.dtype
        if tensor.is_complex() and not dtype.is_complex:
            dtype = torch.complex64 if dtype == torch.bfloat16 else dtype.to_complex()
        return tensor.detach().to(dtype)

    def update(self) -> None:
        for name, averages in self.averages.items():
            for key, parameter in self.model.named_parameters():
                live = self.in_dtype(parameter)
                if key in averages:
                    averages[key] = averages[key].lerp(live, WEIGHTS[name](self.counts[name]))
                else:
                    averages[key] = live.clone()
            self.counts[name] += 1

    def check(self, average: ShardedAverage) -> None:
        for name, expected in self.averages.items():
            with average.summon_full_params(name) as full:
                for key, value in expected.items():
                    assert full[key].shape == value.shape
                    if value.numel():  # what has no elements is not averaged: the live one is handed out
                        assert full[key].dtype == value.dtype, key
                        assert torch.equal(full[key], value), (name, key)


def plain() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in [(3, 5), (7,), (1,), (), (5, 0, 3), (2, 3)]])


def many_small() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(1 + number % 7)) for number in range(150)])


def mixed() -> nn.Module:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bfloat16, torch.float32]
    return nn.ParameterList([nn.Parameter(torch.randn(3, 5).to(dtype)) for dtype in dtypes])


def low() -> nn.Module:
    return plain().to(torch.bfloat16)


def channels_last() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7))
    return model.to(memory_format=torch.channels_last)


def complex_numbers() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(3, 5, dtype=torch.complex64)), nn.Parameter(torch.randn(7))])


def strided() -> nn.Module:
    whole = torch.randn(7, 5)
    return nn.ParameterList([nn.Parameter(whole[:, :3]), nn.Parameter(torch.randn(3, 5).t())])


def lying_together() -> nn.Module:
    flat = torch.randn(15)
    return nn.ParameterList([nn.Parameter(piece) for piece in flat.split([3, 5, 7])])


def large() -> nn.Module:
    """Longer than a chunk."""
    return nn.ParameterList([nn.Parameter(torch.randn(3, 100_003)), nn.Parameter(torch.randn(7))])


def large_low() -> nn.Module:
    return large().to(torch.bfloat16)


MODELS = [plain, many_small, mixed, low, channels_last, complex_numbers, strided, lying_together, large, large_low]
each_model = pytest.mark.parametrize("make", MODELS)


@torch.no_grad()
def step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("num_rules", [1, 2])
def test_equals_plain_arithmetic(make: Callable[[], nn.Module], dtype: torch.dtype | None, num_rules: int) -> None:
    model = make()
    rules = dict(list(RULES.items())[:num_rules])
    average, reference = ShardedAverage(model, rules, dtype=dtype), Reference(model, dtype)
    reference.averages = {name: {} for name in rules}
    for _ in range(4):
        step(model)
        average.update()
        reference.update()
    reference.check(average)


def _bfloat16(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def _double(model: nn.Module) -> None:
    model.to(torch.float64)


def _channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def _contiguous(model: nn.Module) -> None:
    model.to(memory_format=torch.contiguous_format)


def _new_memory(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)


def _strided_memory(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.stack([parameter.detach()] * 2, dim=-1)[..., 0]


def _new_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, key, nn.Parameter(torch.randn_like(parameter)))


def _one_flat_memory(model: nn.Module) -> None:
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


MOVES = [
    *(_bfloat16, _double, _channels_last, _contiguous, _new_memory, _strided_memory, _new_parameters),
    _one_flat_memory,
]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("make", [plain, channels_last, many_small])
def test_follows_a_model_that_moves(make: Callable[[], nn.Module], move: Callable[[nn.Module], None]) -> None:
    """`model.to(...)`, `param.data = ...` and new parameters between updates, and back again."""
    model = make()
    average, reference = ShardedAverage(model, RULES, dtype=torch.float32), Reference(model, torch.float32)
    for change in (None, move, None, _new_memory, move):
        step(model)
        if change is not None:
            change(model)
        average.update()
        reference.update()
        reference.check(average)


@pytest.mark.parametrize("make", [plain, low, many_small, mixed])
def test_custom_rules_see_every_element_once(make: Callable[[], nn.Module]) -> None:
    """Whatever the pieces are: `avg_fn` and `multi_avg_fn` with torch's signatures."""

    def avg_fn(averaged: Tensor, current: Tensor, n: Any) -> Tensor:
        assert averaged.dtype == current.dtype
        return averaged + (current - averaged) * 0.5

    def multi_avg_fn(averaged: list[Tensor], current: list[Tensor], n: Any) -> None:
        torch._foreach_mul_(averaged, n)
        torch._foreach_add_(averaged, current)

    model = make()
    rules = {"one": CustomRule(avg_fn=avg_fn), "many": CustomRule(multi_avg_fn=multi_avg_fn)}
    average = ShardedAverage(model, rules, dtype=torch.float32)
    average.update()
    ones = {key: value.detach().float() for key, value in copy.deepcopy(model).named_parameters()}
    manys = dict(ones)
    for n in (1, 2):
        step(model)
        average.update()
        for key, parameter in model.named_parameters():
            live = parameter.detach().float()
            ones[key], manys[key] = ones[key] + (live - ones[key]) * 0.5, manys[key] * n + live
    for name, expected in (("one", ones), ("many", manys)):
        with average.summon_full_params(name) as full:
            assert all(torch.equal(full[key], value) for key, value in expected.items())


# What an update may call: in-place arithmetic and copies into memory that is there already.
IN_PLACE = {"_foreach_lerp_", "_foreach_copy_", "lerp_", "copy_", "cat"}
# Views of memory that is there already.
VIEWS = {"detach", "alias", "view", "as_strided", "slice"}


class Recorder(TorchDispatchMode):
    """The operators that run, and storages that come into being."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.allocated: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.overloadpacket.__name__] += 1
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if any(tensor.untyped_storage().data_ptr() not in known for tensor in _tensors(result)):
            self.allocated.append(func.overloadpacket.__name__)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def recorded(call: Callable[[], object]) -> Recorder:
    with Recorder() as recorder:
        call()
    return recorder


@each_model
@pytest.mark.parametrize("num_rules", [1, 2])
def test_an_update_allocates_nothing_and_never_syncs(make: Callable[[], nn.Module], num_rules: int) -> None:
    """P42, after the first: in-place operators only, no storage of their own, and no value goes to Python."""
    model = make()
    average = ShardedAverage(model, dict(list(RULES.items())[:num_rules]))
    average.update()
    recorder = recorded(average.update)
    assert set(recorder.ops) <= IN_PLACE, recorder.ops
    assert not recorder.allocated
    assert "_local_scalar_dense" not in recorder.ops


def test_the_recorder_sees_allocations_and_syncs() -> None:
    """The test above would notice."""
    tensor = torch.ones(3)
    recorder = recorded(lambda: (tensor + 1).sum().item())
    assert "_local_scalar_dense" in recorder.ops
    assert "add" in recorder.allocated
    assert not recorded(lambda: tensor.view(3, 1).mul_(2)).allocated


@each_model
def test_an_update_leaves_memory_as_it_is(make: Callable[[], nn.Module]) -> None:
    """The profiler's view of the same: operators that allocate inside themselves would show."""
    model = make()
    average = ShardedAverage(model, RULES)
    for _ in range(2):
        average.update()
    # The first profile of a process may import and start more of torch; with a GPU, its runtime too.
    for _ in range(2):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
            average.update()
    taken = {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}
    assert sum(size for size in taken.values() if size > 0) == 0, taken


def test_nothing_moves_between_updates() -> None:
    model = mixed()
    average = ShardedAverage(model, RULES)
    average.update()
    before = addresses(average)
    for _ in range(3):
        step(model)
        average.update()
    assert addresses(average) == before


def addresses(average: ShardedAverage) -> list[int]:
    store = average._state.store
    return [store.view(name, shard.name).data_ptr() for name in RULES for shard in average._state.members.averaged]


def test_n_averaged_is_a_python_int() -> None:
    model = plain()
    average = ShardedAverage(model, RULES)
    assert average.n_averaged == 0
    average.update()
    average.update()
    assert type(average.n_averaged) is int
    assert average.n_averaged == 2


def shard(name: str, tensor: Tensor) -> Shard:
    return Shard(name, tensor.shape, Box.whole(tensor.shape), tensor)


def store_of(*names: str, dtype: torch.dtype | None = torch.float32) -> Store:
    return Store(names, dtype, None)


def test_nothing_is_held_before_arranging() -> None:
    store = store_of("average")
    assert not store.arranged
    assert store.nbytes == store.scratch_nbytes == 0
    assert "a" not in store


def test_a_rank_without_elements_is_arranged_too() -> None:
    store = store_of("average")
    store.arrange([shard("a", torch.ones(0))])
    assert store.arranged
    assert store.nbytes == 0
    store.update({"average": SWA()}, {"average": Moment(3)})
    assert store.view("average", "a").shape == (0,)


def test_bytes_are_four_for_each_element_of_each_average() -> None:
    """Beside them scratch, of at most one chunk for each dtype, and only where dtypes differ."""
    shards = [shard("a", torch.ones(300_000)), shard("b", torch.ones(500_000, dtype=torch.bfloat16))]
    store = store_of("x", "y")
    store.arrange(shards)
    assert store.nbytes == 2 * 800_000 * 4
    assert 0 < store.scratch_nbytes <= 2 << 20
    alone = store_of("x")
    alone.arrange(shards[:1])
    assert alone.scratch_nbytes == 0


def test_joiners_start_as_copies_and_leave_the_others_alone() -> None:
    live = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(1)}
    store = store_of("average")
    assert [s.name for s in store.arrange([shard("b", live["b"])])] == ["b"]
    held = store.view("average", "b").clone()
    live["b"].add_(1)
    new = store.arrange([shard(name, tensor) for name, tensor in live.items()])
    assert [s.name for s in new] == ["a", "c"]
    assert torch.equal(store.view("average", "b"), held)
    assert all(torch.equal(store.view("average", name), live[name]) for name in ("a", "c"))
    store.update({"average": EMA(decay=DECAY)}, {"average": Moment(1)})
    assert torch.equal(store.view("average", "b"), held.lerp(live["b"], 1 - DECAY))
    assert store.arrange([shard(name, tensor) for name, tensor in live.items()]) == []


def test_views_have_the_strides_of_dense_live_tensors() -> None:
    tensors = {
        "channels_last": torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "gaps": torch.randn(3, 5)[:, :3],
        "expanded": torch.randn(1, 5).expand(3, 5),
    }
    store = store_of("average")
    store.arrange([shard(name, tensor) for name, tensor in tensors.items()])
    for name, tensor in tensors.items():
        view = store.view("average", name)
        assert torch.equal(view, tensor)
        assert (view.stride() == tensor.stride()) is (name in ("channels_last", "transposed"))


def test_neighbours_are_one_call() -> None:
    """A flat parameter of many pieces: one `lerp_` over all of them, whatever their number."""
    flat = torch.randn(300)
    store = store_of("average")
    store.arrange([shard(str(number), piece) for number, piece in enumerate(flat.split(3))])
    calls: list[int] = []

    def count(averaged: list[Tensor], current: list[Tensor], n: Any) -> None:
        calls.append(len(averaged))

    store.update({"average": CustomRule(multi_avg_fn=count)}, {"average": Moment(1)})
    assert calls == [1]


def test_dtype_of_keeps_complex_complex() -> None:
    pairs = {torch.float32: torch.float32, torch.complex64: torch.complex64, torch.bfloat16: torch.float32}
    for own, expected in pairs.items():
        assert store_of("average").dtype_of(shard("a", torch.zeros(1, dtype=own))) == expected
    assert store_of("average", dtype=None).dtype_of(shard("a", torch.zeros(1).bfloat16())) == torch.bfloat16
    for asked, expected in {torch.bfloat16: torch.complex64, torch.float64: torch.complex128}.items():
        whole = shard("a", torch.zeros(1, dtype=torch.complex64))
        assert store_of("average", dtype=asked).dtype_of(whole) == expected
