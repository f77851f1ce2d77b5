"""What users of weight averaging ran into elsewhere, on one process, where no other file of tests has it.

docs/field_reports.md lists all reports, by ID, with the tests that answer them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from sharded_avg import EMA, SWA, CheckpointError, Schedule, ShardedAverage, load_averaged_state_dict
from sharded_avg.averages import store
from sharded_avg.shard import Box, Shard

DECAY = 0.75
quiet_saves = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def full_of(average: ShardedAverage) -> dict[str, Tensor]:
    with average.summon_full_params() as full:
        return {name: tensor.clone() for name, tensor in full.items()}


@torch.no_grad()
def shake(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


# --- models that nobody can copy -----------------------------------------------------------------------------------


class Uncopyable(nn.Module):
    """Refuses to be copied or pickled; a lock, an iterator and a trainer hang on it, as they do on real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
        self.old_mix = old_weight_norm(nn.Linear(5, 2))
        self.lock = threading.Lock()
        self.batches: Iterator[Tensor] = (torch.ones(1, 3) for _ in range(10**9))
        self.trainer: Any = [self]

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("the model was deep-copied")

    __copy__ = __deepcopy__

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("the model was pickled")


def old_weight_norm(layer: nn.Linear) -> nn.Linear:
    """The legacy one leaves a `weight` that is no leaf: torch refuses to deep-copy it."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)
    layer(torch.ones(1, layer.in_features))
    return layer


@quiet_saves
def test_only_tensors_are_copied(tmp_path):
    """P30, P44: a model that cannot be deep-copied (L15: legacy weight_norm) is averaged, evaluated and saved."""
    model = Uncopyable()
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    average = ShardedAverage(model, EMA(decay=DECAY))
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        shake(model)
        assert average.update()
        for name, live in model.state_dict().items():
            expected[name] = expected.get(name, live).lerp(live, 1 - DECAY)
    with average.swapped():
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    average.save(tmp_path / "average")
    for found in (full_of(average), load_averaged_state_dict(tmp_path / "average")):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert next(model.batches).shape == (1, 3)


# --- training is left alone ----------------------------------------------------------------------------------------


def trained(keep: Callable[[nn.Module], ShardedAverage] | None) -> dict[str, Any]:
    """Everything that a run leaves behind, the state of the random numbers included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    average = keep(model) if keep else None
    rates = []
    for _ in range(5):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates.append(scheduler.get_last_lr())
        if average is not None:
            average.update()
            with average.swapped(), torch.no_grad():
                model.eval()(torch.ones(2, 3))
            model.train()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rates": rates,
        "random": torch.get_rng_state(),
    }


def leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_averaging_does_nothing_but_average(buffers):
    """P28, P35: weights, optimizer, learning rates, scheduler and random numbers are those of a run without it."""
    without = leaves(trained(None))
    beside = leaves(trained(lambda model: ShardedAverage(model, SWA(), buffers=buffers)))
    for left, right in zip(without, beside, strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


# --- statistics of batch norm --------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("index", torch.arange(512))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(x))


def evaluated_with(average: ShardedAverage, model: Normed, x: Tensor) -> Tensor:
    with average.swapped() as is_swapped, torch.no_grad():
        assert is_swapped
        output = model.eval()(x)
    model.train()
    return output


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_evaluation_of_the_average_has_statistics_that_training_moved(buffers):
    """P39, P50, L14: statistics as of now, or averaged, but never those of the last update; integers whole."""
    model = Normed()
    average = ShardedAverage(model, EMA(decay=DECAY), buffers=buffers, schedule=Schedule(every_steps=8))
    state: dict[str, Tensor] = {}
    for _ in range(31):  # the last update is 7 batches back
        shake(model)
        model(torch.randn(4, 3))
        if average.update():
            state = {name: state.get(name, live).lerp(live, 1 - DECAY) for name, live in floats_of(model)}
    assert average.n_averaged == 3
    if buffers == "copy":
        state |= {name: live.clone() for name, live in floats_of(model) if "running" in name}
    reference = Normed().eval()
    reference.load_state_dict(state, strict=False)
    x = torch.randn(4, 3)
    with torch.no_grad():
        expected = reference(x)
    assert torch.equal(evaluated_with(average, model, x), expected)
    full = full_of(average)
    assert all(torch.equal(full[name], value) for name, value in state.items())
    assert full["norm.num_batches_tracked"] == 31
    assert torch.equal(full["index"], torch.arange(512))
    assert torch.equal(full["mask"], torch.tensor([True, False, True]))


def floats_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]


# --- checkpoints without an average --------------------------------------------------------------------------------


def no_folder(path: Any) -> None:
    path.mkdir()


def a_models_own(path: Any) -> None:
    dcp.save({"model": nn.Linear(3, 5).state_dict()}, checkpoint_id=path)


@quiet_saves
@pytest.mark.parametrize("write", [no_folder, a_models_own])
def test_without_a_saved_average_it_starts_from_the_weights(tmp_path, write):
    """P97: a checkpoint without one is refused, in words; nothing random is averaged: the next update is a copy."""
    write(tmp_path / "checkpoint")
    model = nn.Linear(3, 5)
    average = ShardedAverage(model, EMA(decay=DECAY))
    with pytest.raises(CheckpointError, match="no saved average"):
        average.load(tmp_path / "checkpoint")
    assert (average.n_averaged, average.nbytes) == (0, 0)
    shake(model)
    average.update()
    assert all(torch.equal(full_of(average)[name], live) for name, live in model.state_dict().items())


@quiet_saves
def test_strict_is_respected(tmp_path):
    """P97: a parameter that the file lacks is an error; with strict=False it starts from its live value."""
    saved = nn.Sequential(nn.Linear(3, 5))
    before = ShardedAverage(saved, SWA())
    before.update()
    before.save(tmp_path / "average")
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    average = ShardedAverage(model, SWA())
    with pytest.raises(CheckpointError, match=r"1\.weight"):
        average.load(tmp_path / "average")
    assert average.n_averaged == 0
    result = average.load(tmp_path / "average", strict=False)
    assert list(result.missing_keys) == ["1.weight", "1.bias"]
    found = full_of(average)
    assert torch.equal(found["0.weight"], saved[0].weight)
    assert torch.equal(found["1.weight"], model[1].weight)


# --- torch.compile -------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def whole(model: Two, counter: CompileCounter) -> nn.Module:
    return torch.compile(model, backend=counter)


def in_place(model: Two, counter: CompileCounter) -> nn.Module:
    model.compile(backend=counter)
    return model


def a_part(model: Two, counter: CompileCounter) -> nn.Module:
    model.first = torch.compile(model.first, backend=counter)
    return model


@torch.no_grad()
def validated(model: nn.Module, average: ShardedAverage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs with raw and with averaged weights, and raw ones again afterwards."""
    raw = model(x)
    with average.swapped():
        inside = model(x)
    assert torch.equal(model(x), raw)
    return raw, inside


@pytest.mark.parametrize("compiled", [whole, in_place, a_part])
def test_compiled_models_compute_with_the_average_and_are_compiled_once(compiled):
    """P106: the average moves, evaluation computes with it and then without it, and no swap causes a compilation."""
    torch._dynamo.reset()
    counter, plain, reference = CompileCounter(), Two(), Two()
    names = list(plain.state_dict())
    model = compiled(plain, counter)
    average, x = ShardedAverage(model, EMA(decay=DECAY)), torch.ones(2, 3)
    compilations = []
    for _ in range(3):
        shake(model)
        average.update()
        raw, inside = validated(model, average, x)
        compilations.append(counter.frame_count)
        reference.load_state_dict(full_of(average))
        with torch.no_grad():
            assert torch.equal(inside, reference(x))
    assert not torch.equal(inside, raw)
    assert compilations == [1, 1, 1]
    assert list(full_of(average)) == names


# --- averages in host memory ---------------------------------------------------------------------------------------


class OnGpu(Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


def test_host_memory_is_pinned_for_shards_on_a_gpu(monkeypatch):
    """P77, P102: plain tensors are pinned, of the size of the shard; and so is what they travel through."""
    asked = []
    real = torch.empty

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append((size, pin_memory))
        return real(*size, **options)

    live = torch.ones(5, dtype=torch.bfloat16).as_subclass(OnGpu)
    shard = Shard("w", torch.Size((3, 5)), Box((0, 0), (1, 5)), live, trainable=True)
    monkeypatch.setattr(store.torch, "empty", empty)
    held = store.Store(("average",), torch.float32, torch.device("cpu"))
    held.arrange([shard])
    assert asked == [((5,), True), ((5,), True)]
    assert type(held.view("average", "w")) is Tensor
