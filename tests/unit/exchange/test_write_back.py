"""Averages written back in the course of training: Lookahead and Switch EMA beside plain loops, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sharded_avg import EMA, ConfigError, NotStartedError, Schedule, ShardedAverage


def test_lookahead_by_value():
    """alpha = 0.5, k = 2, fast weights + 1 a step, from 0: 2.0 after four steps (Zhang 2019)."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    every_two = Schedule(every_steps=2)
    average = ShardedAverage(model, EMA(decay=0.5), schedule=every_two)
    average.update(unscheduled=True)  # the slow weights begin where the fast ones do
    for _ in range(4):
        with torch.no_grad():
            model[0].add_(1)
        average.update()
        average.copy_to_model(schedule=every_two)
    assert model[0].item() == 2.0


def train(steps: range, model: nn.Module, optimizer: torch.optim.Optimizer, after: object) -> None:
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def by_hand(steps: int, decay: float, every: int, factor: float) -> dict[str, Tensor]:
    """Switch EMA as a plain loop."""
    model, optimizer = made()
    average: list[Tensor] = []
    done = 0

    def after() -> None:
        nonlocal done, average
        done += 1
        live = [parameter.detach() for parameter in model.parameters()]
        if not average:
            average = [value.clone() for value in live]
        else:
            average = [a.lerp(x, 1 - decay) for a, x in zip(average, live, strict=True)]
        if done % every == 0:
            for value, mean in zip(live, average, strict=True):
                value.copy_(value.lerp(mean, factor))

    train(range(steps), model, optimizer, after)
    return model.state_dict()


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_switch_ema_resumed(tmp_path: Path, factor):
    """Saved at every possible moment, also right after writing back, a run ends with the bits of the plain loop."""
    expected = by_hand(9, 0.9, 3, factor)
    for stop in range(1, 9):
        model, optimizer = made()
        average = ShardedAverage(model, EMA(decay=0.9))

        def after(average=average):
            average.update()
            average.copy_to_model(factor=factor, schedule=Schedule(every_steps=3))

        train(range(stop), model, optimizer, after)
        average.save(tmp_path / "average")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "rest.pt")
        model, optimizer = made()
        saved = torch.load(tmp_path / "rest.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        again = ShardedAverage(model, EMA(decay=0.9))
        again.load(tmp_path / "average")
        train(range(stop, 9), model, optimizer, lambda again=again: after(again))
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), stop


def test_optimizer_state_is_untouched():
    model, optimizer = made()
    average = ShardedAverage(model, EMA(decay=0.9))
    train(range(3), model, optimizer, average.update)
    before = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
    assert average.copy_to_model(factor=0.5)
    now = list(optimizer.state.values())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, now, strict=True) for k in a)


def test_once_for_each_step():
    """A step that was skipped leaves the count where it was; nothing is written a second time."""
    model, optimizer = made()
    average = ShardedAverage(model, EMA(decay=0.9))
    train(range(2), model, optimizer, average.update)
    assert average.copy_to_model(factor=0.5, schedule=Schedule(every_steps=2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert not average.copy_to_model(factor=0.5, schedule=Schedule(every_steps=2))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("factor", [0, 1.5, -1, "half", True])
def test_factors_that_cannot_be(factor):
    model, _ = made()
    average = ShardedAverage(model, EMA(decay=0.9))
    average.update()
    with pytest.raises(ConfigError, match=rf"copy_to_model\(factor={factor!r}\)"):
        average.copy_to_model(factor=factor)


def test_nothing_to_write_back_yet():
    model, _ = made()
    average = ShardedAverage(model, EMA(decay=0.9))
    assert not average.copy_to_model(schedule=Schedule(start_step=5))
    with pytest.raises(NotStartedError):
        average.copy_to_model()
