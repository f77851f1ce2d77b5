"""Fsdp1Layout against a plain model that is trained and edited beside it, without this package and without FSDP."""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import CPUOffload, MixedPrecision
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.torch_version import TorchVersion

from sharded_avg.shard import Box, Interval
from sharded_avg.weights.layouts.fsdp1 import Fsdp1Layout
from tests.helpers.fsdp1_models import (
    LOW,
    MOMENTS,
    Awkward,
    Block,
    Run,
    assert_state,
    batch,
    both_views,
    edit,
    edited_copy,
    every_strategy,
    fsdp,
    gathered,
    no_writeback,
    plain_model,
    reach,
    restore,
    views_are_shards,
)
from tests.helpers.pool import on_ranks


@pytest.mark.each_pair
@every_strategy
@both_views
@pytest.mark.parametrize("nested", [True, False])
@on_ranks(2, 3, 4)
def test_shards_are_the_model(strategy: str, use_orig_params: bool, nested: bool) -> None:
    """P59, P64, P76, P105: intervals cover each parameter, padding is in none, names are the plain model's."""
    plain = plain_model()
    model = fsdp(plain, strategy, use_orig_params, nested)
    assert Fsdp1Layout.claims(model)
    assert not Fsdp1Layout.claims(plain)
    layout = Fsdp1Layout(model)
    assert layout.group is dist.group.WORLD
    assert layout.aliases == {"again.weight": "first.weight"}
    assert_state(layout, plain)
    run = Run(model, plain)
    run.train(3)
    assert layout.is_current()
    assert_state(layout, plain)
    held = sum(shard.tensor.numel() for shard in layout.shards() if not shard.is_buffer)
    total = sum(param.numel() for param in plain.parameters())
    ranks = {"NO_SHARD": 1, "FULL_SHARD": dist.get_world_size(), "SHARD_GRAD_OP": dist.get_world_size()}
    assert held <= total / ranks.get(strategy, 2) + 16


@pytest.mark.each_pair
@every_strategy
@both_views
@pytest.mark.parametrize("mixed", [False, True])
@on_ranks(2, 3)
def test_edits_reach_forward_and_undo_is_exact(strategy: str, use_orig_params: bool, mixed: bool) -> None:
    """P60: at any moment of training, forward computes with edited shards, and training goes on as if none had been."""
    for moment in MOMENTS:
        if mixed and moment == "no_sync" and strategy == "NO_SHARD":
            continue  # FSDP1 itself raises at the next forward
        for nested in (True, False) if moment in ("eval", "train") else (True,):
            check_edits(moment, strategy, use_orig_params, mixed, nested)


def check_edits(moment: str, strategy: str, use_orig_params: bool, mixed: bool, nested: bool) -> None:
    plain = plain_model()
    more = {"mixed_precision": LOW} if mixed else {}
    run = Run(fsdp(plain, strategy, use_orig_params, nested, **more), plain, mixed)
    layout = Fsdp1Layout(run.model)
    reach(moment, run)
    with no_writeback():
        before = edit(layout)
        assert not use_orig_params or views_are_shards(layout, run.model)
        run.assert_forward(edited_copy(plain))
        run.assert_forward(edited_copy(plain))
        restore(layout, before)
        assert not use_orig_params or views_are_shards(layout, run.model)
        if moment != "no_sync":
            run.assert_forward()
            layout.release()  # or FSDP1 computes the step after the next one with what this forward gathered
    if moment == "backward":
        run.step()
    if moment == "no_sync":
        run.model.zero_grad()
    run.model.train()
    if not (mixed and "train" in moment):  # there FSDP1 itself goes wrong: the hooks of the first forward are stale
        run.train(2)
        assert_state(layout, plain)


class Odd(nn.Module):
    """Frozen, ignored and shared parts, a name that is tied inside its module, a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.randn(3))
        self.twin = self.zero
        self.last = nn.Parameter(torch.randn(1))
        self.norm = nn.BatchNorm1d(3)
        self.lora = nn.Linear(3, 3)
        self.lora.bias.requires_grad_(False)
        self.ignored = nn.Linear(3, 3, bias=False)
        self.shared = nn.Linear(3, 3)
        self.again = self.shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x * self.zero + self.twin) * self.last
        return self.again(self.ignored(self.shared(self.lora(x))))


class Shell(nn.Module):
    """A plain module around FSDP modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Awkward()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) * self.gain


@pytest.mark.each_pair
@both_views
@on_ranks(2, 3)
def test_what_fsdp_does_not_manage_is_whole(use_orig_params: bool) -> None:
    """Ignored parameters and buffers are Boxes; frozen ones say so; both names of tied ones are known."""
    plain = plain_model(Odd)
    if not use_orig_params:
        plain.requires_grad_(True)  # FSDP1 wants one value of requires_grad for a flat parameter
    wrapped = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FSDP(
            wrapped, use_orig_params=use_orig_params, ignored_states=[wrapped.ignored], device_id=torch.device("cpu")
        )
    layout = Fsdp1Layout(model)
    shards = {shard.name: shard for shard in layout.shards()}
    boxes = [name for name, shard in shards.items() if isinstance(shard.region, Box)]
    assert boxes == ["ignored.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert [name for name, shard in shards.items() if shard.is_buffer] == boxes[1:]
    assert layout.aliases == {"twin": "zero", "again.weight": "shared.weight", "again.bias": "shared.bias"}
    full = gathered(list(shards.values()))
    expected = plain.state_dict()
    assert sorted(layout.state_keys()) == sorted(expected)
    assert all(torch.equal(full[layout.aliases.get(name, name)], value) for name, value in expected.items())
    trainable = {name for name, param in plain.named_parameters() if param.requires_grad}
    assert {name for name, shard in shards.items() if shard.trainable} == trainable
    model(batch()).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert layout.is_current()


@pytest.mark.each_pair
@every_strategy
@both_views
@on_ranks(2)
def test_fsdp_inside_a_plain_module(strategy: str, use_orig_params: bool) -> None:
    """Several FSDP roots, each with its own state; the parameters around them are whole."""
    plain = plain_model(Shell)
    model = copy.deepcopy(plain)
    model.inside = fsdp(plain.inside, strategy, use_orig_params)
    layout = Fsdp1Layout(model)
    assert_state(layout, plain)
    run = Run(model, plain)
    run.train(2)
    before = edit(layout)
    run.assert_forward(edited_copy(plain))
    restore(layout, before)
    run.assert_forward()
    layout.release()
    run.train(2)
    assert_state(layout, plain)


@pytest.mark.each_pair
@both_views
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@on_ranks(2, 3, 4)
def test_neighbours_lie_together_and_ranks_may_hold_nothing(use_orig_params: bool, dtype: torch.dtype) -> None:
    """P76: empty shards are Interval(0, 0); without alignment padding, one piece begins where the last one ends."""
    tiny = plain_model(lambda: nn.Linear(1, 1)).to(dtype)
    layout = Fsdp1Layout(fsdp(tiny, "FULL_SHARD", use_orig_params, nested=False))
    assert_state(layout, tiny)
    if dist.get_world_size() == 4 and dist.get_rank() >= 2 and not use_orig_params:
        assert all(shard.region == Interval(0, 0) and shard.tensor.shape == (0,) for shard in layout.shards())

    plain = plain_model().to(dtype)
    layout = Fsdp1Layout(fsdp(plain, "FULL_SHARD", use_orig_params, nested=False))
    assert_state(layout, plain)
    pieces = [s.tensor for s in layout.shards() if not s.is_buffer and s.tensor.numel()]
    padding = 16 if use_orig_params else 1  # alignment, in bytes
    for left, right in itertools.pairwise(pieces):
        gap = right.data_ptr() - left.data_ptr() - left.numel() * left.element_size()
        assert 0 <= gap < padding


CASES: dict[str, dict[str, Any]] = {
    "checkpoint": {},
    "prefetch": {"forward_prefetch": True, "limit_all_gathers": False},
    "limited": {"forward_prefetch": True, "limit_all_gathers": True},
    "compile part": {},
    "compile all": {},
}


@pytest.mark.each_pair
@pytest.mark.parametrize("case", ["checkpoint", "prefetch", "limited"])
@both_views
@on_ranks(2)
def test_wrappers_and_prefetch(use_orig_params: bool, case: str) -> None:
    """P64: activation checkpointing and prefetching change neither names nor what an edit does."""
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        check_wrapped(case, strategy, use_orig_params)


@pytest.mark.parametrize("case", ["compile part", "compile all"])
@on_ranks(2)
def test_compiled(case: str) -> None:
    """P106: torch.compile changes neither names nor what an edit does; dynamo wants use_orig_params=True."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks at .grad of FSDP1's views
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
            torch._dynamo.reset()
            check_wrapped(case, strategy, True)


def check_wrapped(case: str, strategy: str, use_orig_params: bool) -> None:
    plain = plain_model()
    inner = copy.deepcopy(plain)
    if case == "compile part":
        inner.back = torch.compile(inner.back, backend="eager")
    model: Any = fsdp(inner, strategy, use_orig_params, **CASES[case])
    if case == "checkpoint":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    if case == "compile all":
        model = torch.compile(model, backend="eager")
    run = Run(model, plain)
    layout = Fsdp1Layout(model)
    run.train(2)
    assert_state(layout, plain)
    for _ in range(2):
        before = edit(layout)
        run.assert_forward(edited_copy(plain))
        restore(layout, before)
        run.assert_forward()
    layout.release()
    run.train(2)
    assert_state(layout, plain)


class BadBatch(Exception):
    pass


@pytest.mark.each_pair
@every_strategy
@both_views
@on_ranks(2)
def test_release_after_an_exception_in_forward(strategy: str, use_orig_params: bool) -> None:
    """An evaluation that raises leaves full copies and half of FSDP's state behind: none of it outlives release()."""
    plain = plain_model()
    run = Run(fsdp(plain, strategy, use_orig_params), plain)
    layout = Fsdp1Layout(run.model)
    run.train(1)
    inner = run.model.blocks[1].module
    for grad in (True, False):
        before = edit(layout)
        with (
            torch.set_grad_enabled(grad),
            mock.patch.object(inner, "forward", side_effect=BadBatch),
            pytest.raises(BadBatch),
        ):
            run.model(batch())
        restore(layout, before)
        assert not use_orig_params or views_are_shards(layout, run.model)
        run.assert_forward()
        layout.release()
        run.train(1)
        assert_state(layout, plain)


@both_views
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@on_ranks(2)
def test_full_precision_in_eval(strategy: str, use_orig_params: bool) -> None:
    """Copies in both precisions are freed, whichever mode the model is in when release() is called."""
    plain = plain_model()
    with mock.patch.dict(os.environ, {"FSDP_USE_FULL_PREC_IN_EVAL": "1"}):
        model = fsdp(plain, strategy, use_orig_params, mixed_precision=MixedPrecision(param_dtype=torch.float64))
    layout = Fsdp1Layout(model)
    model(batch().double()).sum().backward()
    model.zero_grad()
    run = Run(model, plain)
    for mode_then, mode_at_release in ((False, True), (True, False), (False, False)):
        before = edit(layout)
        with torch.no_grad():
            model.train(mode_then)(batch().to(torch.float64 if mode_then else torch.float32))
        model.train(mode_at_release)
        restore(layout, before)
        model.eval()
        run.assert_forward()


@both_views
@on_ranks(2)
def test_is_current(use_orig_params: bool) -> None:
    """What moves a shard, or makes it trainable, is noticed; training and evaluation are not."""
    plain = plain_model()
    model = fsdp(plain, "FULL_SHARD", use_orig_params)
    layout = Fsdp1Layout(model)
    assert layout.is_current()
    model.double()
    assert not layout.is_current()
    assert {s.dtype for s in layout.shards() if not s.is_buffer} == {torch.float64}
    model.float()
    assert not layout.is_current()
    layout.shards()
    run = Run(model, plain)
    run.train(2)
    with torch.no_grad():
        model(batch())
    layout.release()
    assert layout.is_current()
    model.register_buffer("late", torch.ones(2))
    model.module.mask = torch.ones(3, dtype=torch.bool)
    assert not layout.is_current()
    assert layout.state_keys()[-1] != "late"  # a buffer of the wrapper is none of the user's module
    assert next(s.tensor for s in layout.shards() if s.name == "mask").all()
    assert layout.is_current()
    model.requires_grad_(False)
    assert not layout.is_current()
    assert not any(shard.trainable for shard in layout.shards())


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@on_ranks(2)
def test_reassigned_parameters_are_not_lost(strategy: str) -> None:
    """What FSDP1 would write back at its next forward is in the shards after release()."""
    if strategy == "NO_SHARD" and TorchVersion(torch.__version__) < (2, 13):
        return  # seen with 2.7 and 2.8: its own forward refuses such parameters, too ("Cannot writeback")
    plain = plain_model()
    run = Run(fsdp(plain, strategy, use_orig_params=True), plain)
    layout = Fsdp1Layout(run.model)
    run.train(1)
    with torch.no_grad():
        run.model(batch())
    layout.release()
    for param in run.model.parameters():
        param.data = param.data * 2
    for param in plain.parameters():
        param.data = param.data * 2
    layout.release()
    assert_state(layout, plain)
    run.assert_forward()


@both_views
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@on_ranks(2)
def test_cpu_offload(strategy: str, use_orig_params: bool) -> None:
    """FSDP1 pins offloaded shards at its first forward: a swap around that forward must not lose the raw weights."""
    pinned: list[Tensor] = []

    def is_pinned(tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in pinned)

    def pin_memory(tensor: Tensor) -> Tensor:  # as on a machine with a GPU: a copy, unless it is pinned already
        if not is_pinned(tensor):
            pinned.append(tensor.detach().clone())
            return pinned[-1]
        return tensor

    plain = plain_model()
    model = fsdp(plain, strategy, use_orig_params, cpu_offload=CPUOffload(offload_params=True))
    layout = Fsdp1Layout(model)
    synchronize = mock.patch.object(torch.cpu.Stream, "synchronize", new_callable=mock.Mock, create=True)
    with mock.patch.multiple(Tensor, pin_memory=pin_memory, is_pinned=is_pinned), synchronize:
        before = edit(layout)
        run = Run(model, plain)
        run.assert_forward(edited_copy(plain))
        assert layout.is_current()
        restore(layout, before)
        run.assert_forward()
        layout.release()
        run.train(1)  # a second step goes wrong in FSDP1 itself, on CPU under FULL_SHARD
        assert_state(layout, plain)
