"""Optimizers that tell which steps were real: `average.attach(optimizer)`."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_avg import EMA, SWA, ConfigError, ShardedAverage


def model() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(3, 5)


def loss_of(net: nn.Module, step: int) -> Tensor:
    return net(torch.randn(7, 3, generator=torch.Generator().manual_seed(step))).square().mean()


def test_only_steps_count() -> None:
    """R30: inside accumulation, called twice, before any step: an `update()` without a step takes nothing in."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = ShardedAverage(net, SWA())
    average.attach(optimizer)
    average.attach(optimizer)  # once is enough, twice is no more
    counted, slow = [average.update()], []
    for micro in range(8):
        loss_of(net, micro).backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            slow.append(net.weight.detach().clone())
        counted += [average.update(), average.update()]
    assert counted == [False] + ([False] * 6 + [True, False]) * 2
    assert (average.num_steps, average.n_averaged) == (2, 2)
    with average.swapped():
        assert torch.equal(net.weight, slow[0] + (slow[1] - slow[0]) / 2)


def test_without_it_every_call_counts() -> None:
    average = ShardedAverage(model(), EMA(decay=0.5))
    assert [average.update(), average.update()] == [True, True]


def test_several_optimizers_are_one_loop() -> None:
    """Of a GAN, or of one optimizer for each parameter: steps between two updates are one."""
    net = model()
    first, second, late = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(3))
    average = ShardedAverage(net, EMA(decay=0.5))
    average.attach(first, second)
    loss_of(net, 0).backward()
    counted = []
    for stepped in ((first, second), (second,), (), (late,)):
        for optimizer in stepped:
            optimizer.step()
        counted.append(average.update())
    assert counted == [True, True, False, False]
    average.attach(late)
    assert not average.update()  # from before it was attached
    late.step()
    assert average.update()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips(fused: bool) -> None:
    """P100 for plain PyTorch: a fused optimizer is called all the same, and told that its gradients are infinite."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    average = ShardedAverage(net, EMA(decay=0.5))
    average.attach(optimizer)
    counted = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step) * (float("inf") if step == 1 else 1.0)).backward()
        before = net.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        counted.append(average.update())
        assert counted[-1] != torch.equal(net.weight, before)
    assert counted == [True, False, True, True]


def test_the_schedule_sees_real_steps_only() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen: list[int] = []
    average = ShardedAverage(net, EMA(decay=0.5), schedule=lambda step: bool(seen.append(step)) or step % 2 == 0)
    average.attach(optimizer)
    loss_of(net, 0).backward()
    for _ in range(4):
        optimizer.step()
        average.update()
        average.update()
    assert seen == [1, 2, 3, 4]
    assert average.n_averaged == 2
    assert average.update(unscheduled=True)  # asked for, whether or not there was a step
    assert average.n_averaged == 3


def test_an_update_that_fails_has_not_counted_the_step() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = ShardedAverage(net, EMA(decay=0.5))
    average.attach(optimizer)
    loss_of(net, 0).backward()
    optimizer.step()
    weight = net.weight
    net.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(Exception, match="weight"):
        average.update()
    net.weight = weight
    assert average.update()


class Wrapped:
    """As Fabric wraps an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer by class only, whose own `step` may do nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.syncs = optimizer, True

    def step(self, closure: Any = None) -> None:
        if self.syncs:
            self.optimizer.step(closure)


@pytest.mark.parametrize("wrap", [Wrapped, AcceleratedOptimizer])
def test_wrapped_optimizers(wrap: Any) -> None:
    net = model()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    outer, average = wrap(inner), ShardedAverage(net, EMA(decay=0.5))
    average.attach(outer)
    loss_of(net, 0).backward()
    if isinstance(outer, AcceleratedOptimizer):
        outer.syncs = False
        outer.step()
        assert not average.update()
    inner.step()
    assert average.update()


@pytest.mark.parametrize("given", [(), (None,), (model(),), ([],)])
def test_what_is_no_optimizer(given: tuple[Any, ...]) -> None:
    average = ShardedAverage(model(), EMA(decay=0.5))
    with pytest.raises(ConfigError, match=r"attach\(\) got"):
        average.attach(*given)
    assert average.update()  # nothing was attached


def test_neither_keeps_the_other_alive() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = ShardedAverage(net, EMA(decay=0.5))
    average.attach(optimizer)
    del average
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks
    average = ShardedAverage(net, EMA(decay=0.5))
    average.attach(optimizer)
    del optimizer
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not average.update()
