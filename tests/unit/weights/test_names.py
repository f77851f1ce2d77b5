"""Names are those of the unwrapped model's state_dict(), whatever wraps it, and entries read the live tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sharded_avg.weights.names import Tree, entries, extra_state, split_ties, unwrap, walk


class Awkward(nn.Module):
    """Tied weights, buffers of every kind, a shared module, a child that is called "module", an unset child."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.module = nn.Linear(3, 5)  # the user's own "module": not a wrapper
        self.norm = nn.BatchNorm1d(5)
        self.shared = nn.ModuleList([nn.Linear(5, 5)] * 2)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.nothing = None
        self.scale = nn.Parameter(torch.ones(()))
        self.register_parameter("unset", None)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("absent", None)


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        del state


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of one, for wrappers that want one."""
    with group_of_one(tmp_path):
        yield


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def names_of(model: nn.Module) -> list[str]:
    return [entry.name for entry in entries(model)]


def assert_matches(wrapped: nn.Module, plain_state: dict[str, Any]) -> None:
    assert names_of(wrapped) == list(plain_state)
    for entry in entries(wrapped):
        assert torch.equal(entry.tensor, plain_state[entry.name]), entry.name


def test_plain_model_in_state_dict_order() -> None:
    model = Awkward()
    assert_matches(model, model.state_dict())
    assert "cache" not in names_of(model)


def test_buffers_are_told_from_parameters() -> None:
    model = Awkward()
    buffers = {entry.name for entry in entries(model) if entry.is_buffer}
    assert buffers == {"mask", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "compile": torch.compile,
    "activation checkpointing": checkpoint_wrapper,
    "offload": offload_wrapper,
    "compile in DDP": lambda model: DistributedDataParallel(torch.compile(model)),
    "DDP in compile": lambda model: torch.compile(DistributedDataParallel(model)),
    "checkpointing in compile in DDP": lambda model: DistributedDataParallel(torch.compile(checkpoint_wrapper(model))),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_leave_no_trace(wrapper: str) -> None:
    model = Awkward()
    names = list(model.state_dict())
    wrapped = WRAPPERS[wrapper](model)
    assert wrapped is not model
    assert unwrap(wrapped) is model
    assert names_of(wrapped) == names
    assert_matches(wrapped, model.state_dict())  # after wrapping: DataParallel moves the model, if there is a GPU


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:The `NO_SHARD` sharding strategy")
def test_fsdp1_around_and_inside() -> None:
    inner = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    names = list(inner.state_dict())
    device = torch.device("cpu")
    inner[1] = FullyShardedDataParallel(checkpoint_wrapper(inner[1]), device_id=device, use_orig_params=True)
    wrapped = FullyShardedDataParallel(inner, device_id=device, use_orig_params=True)
    assert names_of(wrapped) == names


def test_wrappers_inside_the_model() -> None:
    model = Awkward()
    names = names_of(model)
    model.module = torch.compile(model.module)
    model.norm = checkpoint_wrapper(model.norm)
    model.shared[0] = checkpoint_wrapper(torch.compile(model.shared[0]))
    assert names_of(model) == names


def test_a_child_called_module_is_the_users_own() -> None:
    """P25: DDP's prefix is stripped, and a user's own "module." is not."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 5)

    assert names_of(Holder()) == ["module.weight", "module.bias"]
    assert unwrap(holder := Holder()) is holder


@pytest.mark.usefixtures("one_rank")
def test_a_child_called_module_inside_ddp() -> None:
    assert "module.weight" in names_of(DistributedDataParallel(Awkward()))


def test_compile_in_place_changes_no_name() -> None:
    """P106: both ways of compiling give the names of the plain model."""
    model = Awkward()
    names = names_of(model)
    model.compile()
    assert names_of(model) == names


def test_ties_are_split_once_by_first_name() -> None:
    """P105: a tied tensor counts once and keeps all its names."""
    model = Awkward()
    unique, aliases = split_ties(entries(model))
    assert aliases == {
        "head.weight": "embed.weight",
        "shared.1.weight": "shared.0.weight",
        "shared.1.bias": "shared.0.bias",
    }
    assert [entry.name for entry in unique] == [name for name in model.state_dict() if name not in aliases]
    assert len({id(entry.tensor) for entry in unique}) == len(unique)


def test_equal_values_are_not_a_tie() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    assert split_ties(entries(model))[1] == {}


def test_entries_read_the_slot_not_the_tensor() -> None:
    """P13, P20: buffers assigned anew and models moved to another dtype are seen."""
    model = Awkward()
    found = {entry.name: entry for entry in entries(model)}
    model.mask = torch.zeros(5, dtype=torch.bool)
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.double()
    assert found["mask"].tensor is model.mask
    assert found["scale"].tensor is model.scale
    assert found["norm.running_mean"].tensor.dtype == torch.float64


def test_walk_gives_shared_modules_under_each_name() -> None:
    model = Awkward()
    places = [prefix for prefix, module in walk(model) if module is model.shared[0]]
    assert places == ["shared.0.", "shared.1."]


def test_extra_state_has_the_keys_of_state_dict() -> None:
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(WithExtra(3, 2)))
    assert extra_state(model) == {"1._extra_state": {"calls": 3}}
    assert "1._orig_mod._extra_state" in model.state_dict()
    assert extra_state(nn.Linear(3, 3)) == {}


CHANGES = {
    "replaced": lambda model: setattr(model, "module", nn.Linear(3, 5)),
    "added": lambda model: model.add_module("more", nn.Linear(1, 1)),
    "removed": lambda model: delattr(model, "norm"),
    "wrapped": lambda model: setattr(model, "norm", checkpoint_wrapper(model.norm)),
    "replaced deep inside": lambda model: model.shared.__setitem__(1, nn.Linear(5, 5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tree_notices_modules_that_come_and_go(change: str) -> None:
    model = Awkward()
    tree = Tree(model)
    model.double()
    assert tree.unchanged(), "moving a model changes no module"
    CHANGES[change](model)
    assert not tree.unchanged()
