"""Which parameters are averaged as the model changes under the average: unfrozen, frozen, moved, replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sharded_avg import EMA, LayoutChangedError, ShardedAverage
from sharded_avg.weights.layouts.dtensor import DTensorLayout
from sharded_avg.weights.layouts.replicated import ReplicatedLayout
from sharded_avg.weights.members import Members

DECAY = 0.75


def half_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1, bias=False))
    model[0].requires_grad_(False)
    return model


@torch.no_grad()
def step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


def full(average: ShardedAverage) -> dict[str, Tensor]:
    with average.summon_full_params() as state:
        return {name: tensor.clone() for name, tensor in state.items()}


def test_a_parameter_unfrozen_later_joins_as_a_copy():
    """P103: at its first update it is the live value; from then on the rule. The others do not notice."""
    model = half_frozen()
    average = ShardedAverage(model, EMA(decay=DECAY))
    expected: dict[str, Tensor] = {}
    for number in range(6):
        step(model)
        if number == 2:
            model[0].weight.requires_grad_(True)
        if number == 4:
            model[0].bias.requires_grad_(True)
        assert average.update()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seen = expected.setdefault(name, parameter.detach().clone())
                expected[name] = seen.lerp(parameter.detach(), 1 - DECAY)
        held = full(average)
        assert all(torch.equal(held[name], value) for name, value in expected.items())
        assert average.nbytes == sum(value.nbytes for value in expected.values())
    assert len(expected) == 5


def test_a_parameter_frozen_later_stays_in_the_average():
    model = half_frozen()
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    expected = model[2].weight.detach().clone()
    model[2].weight.requires_grad_(False)
    step(model)
    average.update()
    assert torch.equal(full(average)["2.weight"], expected.lerp(model[2].weight.detach(), 1 - DECAY))


def test_unfreezing_does_not_reach_an_average_between_updates():
    """A swap after the unfreezing and before the update that admits it: the parameter keeps its live value."""
    model = half_frozen()
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    model[0].requires_grad_(True)
    step(model)
    live = model[0].weight.detach().clone()
    with average.swapped():
        assert torch.equal(model[0].weight, live)
    assert torch.equal(full(average)["0.weight"], live)
    assert average.update()
    assert torch.equal(full(average)["0.weight"], live)


def _flip(model: nn.Sequential) -> None:
    model[0].bias.requires_grad_(True)


def _freeze(model: nn.Sequential) -> None:
    model[2].weight.requires_grad_(False)


def _move(model: nn.Sequential) -> None:
    model[2].weight.data = model[2].weight.detach().clone()


def _replace(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach())


def _cast(model: nn.Sequential) -> None:
    model.to(torch.float64)


def _replace_buffer(model: nn.Sequential) -> None:
    model[1].running_mean = torch.ones(5)


CHANGES = [_flip, _freeze, _move, _replace, _cast, _replace_buffer]


@pytest.mark.parametrize("layout_class", [ReplicatedLayout, DTensorLayout])
@pytest.mark.parametrize("change", CHANGES)
def test_layouts_notice_what_changed(layout_class: type, change: Callable, one_rank: None):
    model = half_frozen()
    layout = layout_class(model)
    layout.shards()
    step(model)
    assert layout.is_current()
    change(model)
    assert not layout.is_current()
    layout.shards()
    assert layout.is_current()


@pytest.fixture
def one_rank(request):
    """DTensorLayout asks for the number of ranks, also if no parameter is a DTensor."""
    if request.node.callspec.params.get("layout_class") is not DTensorLayout:
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_refresh_reads_nothing_anew_while_nothing_changes(monkeypatch):
    model = half_frozen()
    members = Members(model, None, average_buffers=False)
    before = members.all
    members.refresh()
    assert members.all is before
    model[0].requires_grad_(True)
    members.refresh()
    assert members.all is not before
    assert members.waiting == ["0.weight", "0.bias"]


@torch.no_grad()
def test_a_parameter_of_another_shape_is_refused():
    model = half_frozen()
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    model[2].weight = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(LayoutChangedError, match=r"2\.weight"):
        average.update()
