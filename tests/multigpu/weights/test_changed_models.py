"""Modules that rename, add to or lack what is averaged, on every engine: state-dict hooks, and parts that go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import EMA, LayoutChangedError, ShardedAverage, averaged_buffers, load_averaged_state_dict
from tests.helpers.engines import mesh
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import engine_of, settings


class Renamed(nn.Module):
    """A hook that renames, extra state, and a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_state_dict_post_hook(self.out)
        self.register_load_state_dict_pre_hook(self.back)

    @staticmethod
    def out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}embedding.weight")

    @staticmethod
    def back(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[f"{prefix}embedding.weight"] = state.pop(f"{prefix}weight")

    def get_extra_state(self) -> Any:
        return torch.tensor([1, 2, 3], dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state.tolist() == [1, 2, 3]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Renamed(), nn.Linear(3, 5))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 5)


def seeded() -> Model:
    torch.manual_seed(3)
    return Model()


def _fsdp2(model: nn.Module) -> nn.Module:
    fully_shard(model.inner[1], mesh=mesh((dist.get_world_size(),)))
    return fully_shard(model, mesh=mesh((dist.get_world_size(),)))


def _fsdp1(use_orig_params: bool) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        device = torch.device("cpu")
        model.inner[1] = FullyShardedDataParallel(model.inner[1], device_id=device, use_orig_params=use_orig_params)
        return FullyShardedDataParallel(model, device_id=device, use_orig_params=use_orig_params)

    return wrap


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "FSDP1": _fsdp1(True),
    "FSDP1, flat": _fsdp1(False),
    "FSDP2": _fsdp2,
}


def full_of(average: ShardedAverage) -> dict[str, Any]:
    """On every rank."""
    with average.summon_full_params(rank0_only=False) as full:
        return full


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


def check_names(model: nn.Module, plain: nn.Module, path: Path) -> None:
    """R06, R09: after one update the average is the weights, under the keys that the plain model has."""
    expected = plain.state_dict()
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update(unscheduled=True)  # DeepSpeed has stepped nothing
    full = full_of(average)
    assert_equal(full, expected)
    Model().load_state_dict(full, strict=True)
    average.save(path)
    average.load(path)
    saved = load_averaged_state_dict(path)
    assert "inner.0.weight" in saved
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    assert_equal(full_of(average), expected)
    with average.swapped():
        pass
    average.update(unscheduled=True)


def check_losses(model: nn.Module, inside: nn.Module, plain: nn.Module, path: Path) -> None:
    """R12: without its head, the rest of an average is saved, handed out, taken over; and goes on in a new one."""
    old = ShardedAverage(model, EMA(decay=0.5))
    old.update(unscheduled=True)
    del inside.head
    del plain.head
    expected = plain.state_dict()
    for call in (lambda: old.update(unscheduled=True), lambda: old.swapped().__enter__()):
        with pytest.raises(LayoutChangedError, match=r"'head\.\w+'.*gone.*take_from.*save.*load"):
            call()
    assert_equal(full_of(old), expected)
    old.save(path)
    assert not any(key.startswith("head") for key in load_averaged_state_dict(path))
    new = ShardedAverage(model, EMA(decay=0.5))
    new.load(path)
    assert_equal(full_of(new), expected)
    again = ShardedAverage(model, EMA(decay=0.5))
    try:
        again.take_from(old)
    except LayoutChangedError:  # DistributedDataParallel: what is left is divided anew
        assert isinstance(model, DistributedDataParallel)
        again.load(path, strict=False)
    assert_equal(full_of(again), expected)
    assert again.n_averaged == 1
    again.update(unscheduled=True)
    with again.swapped():
        pass


def check_replaced(model: nn.Module, inside: nn.Module, plain: nn.Module, path: Path) -> None:
    """R12: a head of another shape is handed out as it is, and the rest is averaged."""
    old = ShardedAverage(model, EMA(decay=0.5))
    old.update(unscheduled=True)
    torch.manual_seed(9)
    inside.head = nn.Linear(5, 11)
    plain.head = nn.Linear(5, 11)
    plain.head.load_state_dict(inside.head.state_dict())
    with pytest.raises(LayoutChangedError, match=r"'head\.\w+'.*shape|'head\.\w+' was"):
        old.update(unscheduled=True)
    assert_equal(full_of(old), plain.state_dict())
    old.save(path)
    assert not any(key.startswith("head") for key in load_averaged_state_dict(path))
    new = ShardedAverage(model, EMA(decay=0.5))
    result = new.load(path, strict=False)
    assert sorted(result.missing_keys) == ["head.bias", "head.weight"]
    assert_equal(full_of(new), plain.state_dict())


CHECKS = {
    "names": lambda model, inside, plain, path: check_names(model, plain, path),
    "losses": check_losses,
    "replaced": check_replaced,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(2)
def test_wrapped(wrapper: str, tmp_path: Path) -> None:
    """R06, R09, R12: see the checks."""
    for name, check in CHECKS.items():
        if name == "replaced" and wrapper == "FSDP2":
            continue  # a plain parameter in a root that manages DTensors
        inside = seeded()
        check(WRAPPERS[wrapper](inside), inside, seeded(), tmp_path / name)


@on_ranks(2)
def test_state_without_a_mean_is_not_averaged_over_ranks() -> None:
    """R19: `averaged_buffers` leaves alone what `buffers="average"` leaves alone."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)), nn.BatchNorm1d(5))
    model[1].running_mean.fill_(float(rank))
    own = {key: value.clone() for key, value in model.named_buffers()}
    with averaged_buffers(model):
        assert torch.equal(model[1].running_mean, torch.full((5,), 0.5))
        for key, value in model.named_buffers():
            assert torch.equal(value, own[key]) or "running" in key
    assert all(torch.equal(value, own[key]) for key, value in model.named_buffers())


@contextmanager
def engine(stage: str) -> Iterator[Any]:
    model = seeded()
    with engine_of(settings(stage), model, torch.optim.AdamW(model.parameters())) as made:
        yield made


@pytest.mark.parametrize("stage", ["1-fp32", "3-fp32"])
@on_ranks(2, kind="deepspeed")
def test_deepspeed(stage: str, tmp_path: Path) -> None:
    """R06, R09, R12: see the checks."""
    for name, check in (("names", CHECKS["names"]), ("losses", CHECKS["losses"])):
        with engine(stage) as made:
            [empty] = [param for key, param in made.module.named_parameters() if key.endswith("empty")]
            if getattr(empty, "ds_shape", empty.shape) == (0, 3):
                check(made, made.module, seeded(), tmp_path / name)
            else:  # DeepSpeed 0.16 flattens a parameter without elements: the model is no longer the plain one
                ShardedAverage(made, EMA(decay=0.5)).update(unscheduled=True)
