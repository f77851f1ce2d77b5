"""FSDP1 models beside plain references that know nothing of FSDP or of this package.

Awkward   the model: odd sizes, tied weights, buffers of every kind
Run       a wrapped model and its plain reference, stepped together; equal to the last bit
edit      change the shards in place, as a swap does
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.func import functional_call

from sharded_avg.shard import Interval, Shard
from sharded_avg.weights.layouts.fsdp1 import Fsdp1Layout

STRATEGIES = ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]
LOW = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
both_views = pytest.mark.parametrize("use_orig_params", [True, False])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.narrow = nn.Linear(7, 5, bias=False)
        self.scale = nn.Parameter(torch.tensor([0.9]))
        self.register_buffer("shift", torch.full((5,), 0.125))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.narrow(torch.tanh(self.norm(self.wide(x)))) + self.shift


class Awkward(nn.Module):
    """Sizes 3, 5, 7, one element, tied weights, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.back = nn.Linear(5, 3)
        self.again = nn.Linear(3, 5)
        self.again.weight = self.first.weight
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.again(self.back(x))


def plain_model(build: Callable[[], nn.Module] = Awkward) -> nn.Module:
    torch.manual_seed(5)
    return build()


def batch() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(11))


@cache
def mesh(shape: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


@cache
def alone() -> Any:
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def fsdp(plain: nn.Module, strategy: str, use_orig_params: bool, nested: bool = True, **more: Any) -> FSDP:
    """Wrap a copy; hybrid strategies shard over pairs where there are two of them, else over everything."""
    if "HYBRID" in strategy and dist.get_world_size() == 4:
        more["device_mesh"] = mesh((2, 2))
    elif "HYBRID" in strategy:
        more["process_group"] = (dist.group.WORLD, alone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NO_SHARD is deprecated; a world of one is NO_SHARD
        return FSDP(
            copy.deepcopy(plain),
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy({Block}) if nested else None,
            device_id=torch.device("cpu"),
            **more,
        )


# --- the reference: one plain model --------------------------------------------------------------------------------


def low(plain: nn.Module) -> dict[str, Tensor]:
    """What a MixedPrecision forward computes with."""
    tensors = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    return {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}


def plain_forward(plain: nn.Module, x: Tensor, mixed: bool = False) -> Tensor:
    return functional_call(plain, low(plain), (x.to(torch.bfloat16),)) if mixed else plain(x)


def reduced(grad: Tensor, mixed: bool, parts: list[int]) -> Tensor:
    """FSDP's mean of equal gradients: divided before and after the sum, in the dtype of the reduction."""
    grad = grad.to(torch.bfloat16) if mixed else grad
    world, before = dist.get_world_size(), 1
    while world % before == 0 and world / before > before:
        before *= 2
    grad = grad / before
    for size in parts:
        grad = sum([grad] * size, torch.zeros_like(grad))
    return (grad / (world / before)).to(torch.float32)


class Run:
    """A wrapped model and its plain reference, stepped together."""

    def __init__(self, model: nn.Module, plain: nn.Module, mixed: bool = False) -> None:
        self.model, self.plain, self.mixed = model, plain, mixed
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain)]
        self.parts = [2, 2] if dist.get_world_size() == 4 else [dist.get_world_size()]

    def backward(self) -> None:
        self.model(batch()).float().square().mean().backward()
        plain_forward(self.plain, batch(), self.mixed).float().square().mean().backward()
        for param in self.plain.parameters():
            if param.grad is not None:
                param.grad = reduced(param.grad, self.mixed, self.parts)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.backward()
            self.step()

    def assert_forward(self, plain: nn.Module | None = None) -> None:
        with torch.no_grad():
            expected = plain_forward(plain or self.plain, batch(), self.mixed)
            assert torch.equal(self.model(batch()), expected)


# --- what the layout says, put together without it -----------------------------------------------------------------


def gathered(shards: list[Shard], group: Any = None) -> dict[str, Tensor]:
    """Full tensors; every element must be covered, and equal wherever several ranks hold it."""
    mine = [(s.name, s.shape, s.region, s.tensor.clone(), s.is_buffer) for s in shards]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    assert all([row[:2] for row in rank] == [row[:2] for row in everyone[0]] for rank in everyone)
    full: dict[str, Tensor] = {}
    for name, shape, region, tensor, _ in (row for rank in everyone for row in rank):
        flat = full.setdefault(name, torch.empty(shape.numel(), dtype=tensor.dtype))
        seen = full.setdefault("seen " + name, torch.zeros(shape.numel(), dtype=torch.bool))
        start, stop = (region.start, region.stop) if isinstance(region, Interval) else (0, shape.numel())
        assert tensor.numel() == stop - start
        again = seen[start:stop]
        assert torch.equal(flat[start:stop][again], tensor.reshape(-1)[again])
        flat[start:stop], seen[start:stop] = tensor.reshape(-1), True
        full[name + " shape"] = shape
    names = [row[0] for row in mine]
    assert len(names) == len(set(names))
    assert all(full["seen " + name].all() for name in names)
    return {name: full[name].view(full[name + " shape"]) for name in names}


def assert_state(layout: Fsdp1Layout, plain: nn.Module) -> None:
    """Names, order, shapes and values are those of the plain model."""
    full = gathered(layout.shards(), layout.group)
    expected = plain.state_dict()
    assert layout.state_keys() == list(expected)
    assert sorted([*full, *layout.aliases]) == sorted(expected)
    for name, tensor in expected.items():
        value = full[layout.aliases.get(name, name)]
        assert torch.equal(value, tensor.to(value.dtype)), name


def edited(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.mul_(0.5).add_(0.25)


def edit(layout: Fsdp1Layout) -> list[tuple[Tensor, Tensor]]:
    """Edit parameters in place; what `restore` needs."""
    layout.release()
    pieces = [shard.tensor for shard in layout.shards() if not shard.is_buffer]
    before = [(piece, piece.clone()) for piece in pieces]
    for piece in pieces:
        edited(piece)
    return before


def restore(layout: Fsdp1Layout, before: list[tuple[Tensor, Tensor]]) -> None:
    layout.release()
    for piece, value in before:
        piece.copy_(value)


def edited_copy(plain: nn.Module) -> nn.Module:
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for param in plain.parameters():
            edited(param)
    return plain


def views_are_shards(layout: Fsdp1Layout, model: nn.Module) -> bool:
    """Whether the user's parameters, under use_orig_params=True, are the shards."""
    params = {clean_name(name): param for name, param in model.named_parameters()}
    shards = {shard.name: shard.tensor for shard in layout.shards() if not shard.is_buffer}
    assert params.keys() == shards.keys()
    pairs = [(params[name], shards[name]) for name in shards]
    return all(
        isinstance(param, nn.Parameter)
        and param.numel() == shard.numel()
        and (param.numel() == 0 or param.data_ptr() == shard.data_ptr())
        for param, shard in pairs
    )


def clean_name(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


@contextmanager
def no_writeback() -> Iterator[None]:
    with mock.patch.object(FlatParamHandle, "_writeback_tensor", side_effect=RuntimeError("written back")):
        yield


MOMENTS = ["fresh", "eval", "train in eval mode", "train", "backward", "step", "no_sync"]


def reach(moment: str, run: Run) -> None:
    if moment == "fresh":
        return
    run.train(1)
    if moment == "eval":
        run.model.eval()
        with torch.no_grad():
            run.model(batch())
    elif moment == "train in eval mode":
        run.model.eval()
        run.model(batch())
    elif moment == "train":
        run.model(batch())
    elif moment == "backward":
        run.backward()
    elif moment == "no_sync":
        with run.model.no_sync():
            run.model(batch()).float().square().mean().backward()
