"""Which parameters are averaged as the model changes under the average: unfrozen, frozen, moved, replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sharded_avg import EMA, SWA, LayoutChangedError, ShardedAverage, load_averaged_state_dict
from sharded_avg.weights.layouts.detect import detect
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
    members = Members(model, detect(model), None, buffers=lambda name, tensor: False)
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


# --- parts of the model that go -------------------------------------------------------------------------------------


def with_head() -> nn.ModuleDict:
    torch.manual_seed(2)
    body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    return nn.ModuleDict({"body": body, "head": nn.Linear(5, 2), "more": nn.Linear(2, 1)})


def _delete(model: nn.ModuleDict) -> None:
    del model["head"]


def _reshape(model: nn.ModuleDict) -> None:
    model["head"].weight = nn.Parameter(torch.ones(7, 5))
    model["head"].bias = nn.Parameter(torch.ones(7))


def _other_head(model: nn.ModuleDict) -> None:
    model["head"] = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))


def _unregister(model: nn.ModuleDict) -> None:
    model["head"].weight, model["head"].bias = None, None


def _fuse(model: nn.ModuleDict) -> None:
    model["head"] = nn.utils.parametrizations.weight_norm(model["head"])
    del model["head"].bias


LOSSES = {"deleted": _delete, "reshaped": _reshape, "replaced": _other_head, "unset": _unregister, "wrapped": _fuse}


@torch.no_grad()
def before_a_loss(**arguments: Any) -> tuple[nn.ModuleDict, ShardedAverage, dict[str, Tensor]]:
    """A model, its average, and what that is."""
    model = with_head()
    average = ShardedAverage(model, {"ema": EMA(decay=DECAY), "mean": SWA()}, **arguments)
    average.update()
    expected = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    step(model)
    average.update()
    for name, parameter in model.named_parameters():
        expected[name].lerp_(parameter, 1 - DECAY)
    return model, average, expected


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_rest_outlives_a_part_of_the_model(loss: str, buffers: str, tmp_path: Path):
    """R12: it is saved, handed out, and taken over as the error advises; updates and swaps are refused."""
    model, old, expected = before_a_loss(buffers=buffers)
    LOSSES[loss](model)
    for _ in range(2):
        for call in (old.update, lambda: old.swapped("ema").__enter__(), lambda: old.copy_to_model("ema")):
            with pytest.raises(LayoutChangedError, match=r"'head\.\w+' was.*take_from\(old\).*old\.save.*new\.load"):
                call()
    live = model.state_dict()
    with old.summon_full_params("ema") as full:
        assert list(full) == list(live)
        for name, value in full.items():
            assert torch.equal(value, live[name] if name.startswith("head") else expected.get(name, live[name]))
        model.load_state_dict(model.state_dict() | full)
    old.save(tmp_path / "a")
    saved = load_averaged_state_dict(tmp_path / "a", name="ema")
    assert {name for name in saved if name in expected} == {n for n in expected if not n.startswith("head")}
    assert all(torch.equal(saved[name], expected[name]) for name in saved if name in expected)

    rules = {"ema": EMA(decay=DECAY), "mean": SWA()}
    taking, loading = (ShardedAverage(model, rules, buffers=buffers) for _ in range(2))
    taking.take_from(old)
    result = loading.load(tmp_path / "a", strict=False)
    assert all(name.startswith("head") for name in result.missing_keys)
    assert not result.unexpected_keys
    for new in (taking, loading):
        assert new.n_averaged == 2
        with new.summon_full_params("ema") as full:
            assert all(torch.equal(full[name], expected[name]) for name in saved if name in expected)
        assert new.update()
        with new.swapped("mean"):
            pass


def test_a_part_that_comes_back_is_found():
    """R12: nothing of a lost part is thrown away while the average lives."""
    model, average, expected = before_a_loss()
    head = model["head"]
    del model["head"]
    average.state_dict()
    with pytest.raises(LayoutChangedError):
        average.update()
    model["head"] = head
    with average.summon_full_params("ema") as full:
        assert all(torch.equal(full[name], value) for name, value in expected.items())
    assert average.update()


def test_what_was_wrapped_can_still_be_saved(tmp_path: Path):
    """R12: the advice to go on from a file can be followed, also where the live model cannot be read any more."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, old, expected = before_a_loss()
        mesh = init_device_mesh("cpu", (1,))  # its default is a GPU, where there is one
        torch.distributed.fsdp.fully_shard(model["body"], mesh=mesh)
        for call in (old.update, lambda: old.summon_full_params("ema").__enter__()):
            with pytest.raises(LayoutChangedError, match=r"wrapped afterwards.*old\.save"):
                call()
        old.save(tmp_path / "a")
        new = ShardedAverage(model, {"ema": EMA(decay=DECAY), "mean": SWA()})
        new.load(tmp_path / "a", strict=False)
        with new.summon_full_params("ema") as full:
            assert all(torch.equal(full[name], value) for name, value in expected.items())
        assert new.update()
    finally:
        torch.distributed.destroy_process_group()


def test_before_the_first_update_nothing_is_lost(tmp_path: Path):
    """R12: there are only counters, which are saved."""
    model = with_head()
    average = ShardedAverage(model, EMA(decay=DECAY))
    del model["head"]
    average.save(tmp_path / "a")
    new = ShardedAverage(model, EMA(decay=DECAY))
    new.load(tmp_path / "a")
    assert new.n_averaged == 0


@pytest.mark.parametrize("first", [True, False])
def test_one_of_two_tied_names_goes(first: bool, tmp_path: Path):
    """R12: a tied tensor stays in the model while it has a name, and so does its average."""
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False), "norm": nn.Linear(3, 3)}
    )
    model["head"].weight = model["embedding"].weight
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    expected = model["head"].weight.detach().clone()
    step(model)
    average.update()
    expected.lerp_(model["head"].weight.detach(), 1 - DECAY)
    del model["embedding" if first else "head"]
    name = "head.weight" if first else "embedding.weight"
    average.save(tmp_path / "a")
    assert torch.equal(load_averaged_state_dict(tmp_path / "a")[name], expected)
    with average.summon_full_params() as full:
        assert torch.equal(full[name], expected)
    step(model)
    assert average.update()
    expected.lerp_(model[name.split(".")[0]].weight.detach(), 1 - DECAY)
    with average.swapped():
        assert torch.equal(model[name.split(".")[0]].weight, expected)
