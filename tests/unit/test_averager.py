"""ShardedAverage on one process, against torch.optim.swa_utils.AveragedModel and plain arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import sharded_avg
from sharded_avg import EMA, SWA, NotStartedError, ShardedAverage, SwapError


class Awkward(nn.Module):
    """Odd sizes, a scalar, ties, frozen weights, every kind of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.inner = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(()))
        self.register_buffer("index", torch.arange(512))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.norm(self.inner(self.embedding(tokens))))
        return self.head(hidden.relu()) * self.scale + self.shift


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 11, (6,), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, num_steps: int, after_step) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(num_steps):
        optimizer.zero_grad()
        model.train()
        model(tokens(step)).square().sum().backward()
        optimizer.step()
        after_step()


def awkward(seed: int = 0) -> Awkward:
    torch.manual_seed(seed)
    return Awkward()


@pytest.mark.parametrize(
    ("rule", "reference"),
    [(EMA(decay=0.9), get_ema_multi_avg_fn(0.9)), (SWA(), get_swa_multi_avg_fn())],
    ids=["ema", "swa"],
)
def test_equals_torch_averaged_model(rule, reference):
    """The second reference: every parameter bit-equal to AveragedModel's, tied ones under both names (P105)."""
    model = awkward()
    average = ShardedAverage(model, rule)
    theirs = AveragedModel(model, multi_avg_fn=reference)
    train(model, 7, lambda: (average.update(), theirs.update_parameters(model)))
    expected = theirs.module.state_dict()
    with average.summon_full_params() as full:
        assert list(full) == list(model.state_dict())
        for name, _ in model.named_parameters(remove_duplicate=False):
            assert torch.equal(full[name], expected[name]), name
        for name, buffer in model.named_buffers():  # P39: live buffers, at the time of use
            assert name == "scratch" or torch.equal(full[name], buffer), name
        awkward(1).load_state_dict(full, strict=True)
    assert not torch.equal(full["inner.weight"], model.inner.weight)


def test_buffers_averaged_on_request():
    """P40, P47, L10, L11: float persistent buffers averaged, integer and bool ones live and intact."""
    model = awkward()
    average = ShardedAverage(model, EMA(decay=0.9), buffers="average")
    expected: dict[str, torch.Tensor] = {}

    def follow() -> None:
        average.update()
        for name in ("running_mean", "running_var"):
            live = getattr(model.norm, name)
            expected[name] = expected[name].lerp(live, 1 - 0.9) if name in expected else live.clone()

    train(model, 5, follow)
    with average.summon_full_params() as full:
        for name, value in expected.items():
            assert torch.equal(full[f"norm.{name}"], value)
        assert torch.equal(full["index"], torch.arange(512))
        assert torch.equal(full["mask"], model.mask)
        assert full["norm.num_batches_tracked"] == 5
    with average.swapped():
        assert torch.equal(model.norm.running_mean, expected["running_mean"])
        model.train()
        model(tokens(99))  # changes the statistics while swapped
    with average.summon_full_params() as full:
        assert torch.equal(full["norm.running_mean"], expected["running_mean"])


def test_bf16_weights_have_an_fp32_average():
    """P55, P57, L12, L13: small steps are not lost, and validating does not round the average."""
    model = nn.Linear(3, 5, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = ShardedAverage(model, EMA(decay=0.999))
    average.update()
    with torch.no_grad():
        model.weight.fill_(1.046875)
    expected = torch.ones(5, 3)
    for _ in range(100):
        average.update()
        expected.lerp_(model.weight.float(), 1 - 0.999)
        with average.swapped():
            assert torch.equal(model.weight, expected.to(torch.bfloat16))
        assert torch.equal(model.weight, torch.full((5, 3), 1.046875, dtype=torch.bfloat16))
    with average.summon_full_params() as full:
        assert full["weight"].dtype == torch.float32
        assert torch.equal(full["weight"], expected)
    assert (expected > 1.004).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.complex64, torch.float32, torch.bfloat16])
def test_never_narrower_than_the_weights(dtype):
    """R08: by default float64 weights have a float64 average, whose bits are torch's own."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(5, 3, dtype=torch.float64).div(3).to(dtype))})
    average = ShardedAverage(model, EMA(decay=0.9))
    wide = torch.promote_types(dtype, torch.float32)
    expected = model["w"].detach().to(wide, copy=True)
    average.update()
    for _ in range(4):
        with torch.no_grad():
            model["w"].mul_(1.1)
        average.update()
        expected.lerp_(model["w"].detach().to(wide), 1 - 0.9)
    assert average.nbytes == 15 * wide.itemsize
    with average.summon_full_params() as full:
        assert full["w"].dtype == wide
        assert torch.equal(full["w"], expected)
    raw = model["w"].detach().clone()
    with average.swapped():
        assert torch.equal(model["w"], expected.to(dtype))
    assert torch.equal(model["w"], raw)


def test_each_parameter_is_as_wide_as_it_is():
    """R08: in one model, and when a model is widened between updates, nothing that the average had is lost."""
    model = nn.ParameterList([torch.ones(3, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)])
    average = ShardedAverage(model, SWA())
    average.update()
    assert average.nbytes == 3 * (8 + 4 + 4)
    model.double()
    average.update()
    assert average.nbytes == 3 * 3 * 8


def test_a_narrower_dtype_is_taken_at_its_word():
    """R08: who asks for less gets it."""
    model = nn.Linear(3, 5).double()
    for dtype in (torch.float32, torch.bfloat16):
        average = ShardedAverage(model, SWA(), dtype=dtype)
        average.update()
        with average.summon_full_params() as full:
            assert torch.equal(full["weight"], model.weight.detach().to(dtype))


def test_own_dtype_on_request():
    model = nn.Linear(3, 5).to(torch.bfloat16)
    average = ShardedAverage(model, SWA(), dtype=None)
    average.update()
    assert average.nbytes == 20 * 2


def test_several_averages_from_one_read():
    model = awkward()
    together = ShardedAverage(model, {"fast": EMA(decay=0.5), "slow": EMA(decay=0.99), "mean": SWA()})
    apart = {"fast": EMA(decay=0.5), "slow": EMA(decay=0.99), "mean": SWA()}
    apart = {name: ShardedAverage(model, rule) for name, rule in apart.items()}
    train(model, 4, lambda: (together.update(), [one.update() for one in apart.values()]))
    assert together.names == ("fast", "slow", "mean")
    for name, one in apart.items():
        with together.summon_full_params(name) as ours, one.summon_full_params() as theirs:
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        with together.swapped(name):
            assert torch.equal(model.inner.weight, theirs["inner.weight"])


def test_nothing_untrained_is_handed_out():
    """P03, P10, P108, L1, L2: before the first update there is no average, and none of its memory."""
    model = awkward()
    average = ShardedAverage(model, EMA(decay=0.9))
    before = copy.deepcopy(model.state_dict())
    with average.swapped() as happened:
        assert happened is False
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(NotStartedError, match="no update yet"), average.summon_full_params():
        pass
    with pytest.raises(NotStartedError):
        average.copy_to_model()
    assert average.nbytes == 0
    assert average.n_averaged == 0


def test_first_update_copies():
    model = awkward()
    average = ShardedAverage(model, EMA(decay=1.0))
    average.update()
    with average.summon_full_params() as full:
        assert all(torch.equal(full[name], p) for name, p in model.named_parameters())


def test_swap_restores_and_refuses():
    """P67, P90: values, pointers and the average itself are back after an exception; no nesting, no update inside."""
    model = awkward()
    average = ShardedAverage(model, {"a": EMA(decay=0.9), "b": SWA()})
    train(model, 3, average.update)
    live = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with average.summon_full_params("a") as full:
        pass

    def body() -> None:
        with average.swapped("a"):
            assert torch.equal(model.inner.weight, full["inner.weight"])
            assert torch.equal(model.head.weight, full["embedding.weight"])
            for call in (average.update, average.copy_to_model, lambda: average.load("nowhere")):
                with pytest.raises(SwapError, match="'a' is swapped in"):
                    call()
            with pytest.raises(SwapError), average.swapped("b"):
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == live[name][0]
        assert torch.equal(parameter, live[name][1])
    with average.summon_full_params("a") as again:
        assert all(torch.equal(again[key], full[key]) for key in full)
    assert average.update()


def test_copy_to_model():
    model = awkward()
    average = ShardedAverage(model, SWA())
    train(model, 3, average.update)
    with average.summon_full_params() as full:
        average.copy_to_model()
        assert all(torch.equal(full[key], value) for key, value in model.state_dict().items())


def test_frozen_cost_nothing_and_join_when_unfrozen():
    """P103: trainable only by default; a parameter unfrozen later starts as a copy at its first update."""
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 1))
    model[0].requires_grad_(False)
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update()
    assert average.nbytes == 51 * 4
    model[0].requires_grad_(True)
    average.update()
    assert average.nbytes == (2550 + 51) * 4
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update()
    with average.summon_full_params() as full:
        assert torch.equal(full["0.weight"], (model[0].weight - 1).lerp(model[0].weight, 0.5))


def test_include_chooses():
    """P79: by name, with the full shape, the dtype and requires_grad to look at, and no data."""
    model = awkward()
    seen = {}

    def only_matrices(name: str, tensor: torch.Tensor) -> bool:
        seen[name] = tensor
        return tensor.ndim == 2 and tensor.requires_grad

    average = ShardedAverage(model, SWA(), include=only_matrices)
    average.update()
    assert average.nbytes == (11 * 5 + 5 * 7) * 4
    assert all(tensor.is_meta for tensor in seen.values())
    assert seen["inner.weight"].shape == (7, 5)


def test_include_by_either_name_of_a_tie():
    model = awkward()
    average = ShardedAverage(model, SWA(), include=lambda name, tensor: name == "head.weight")
    average.update()
    assert average.nbytes == 55 * 4


def test_complex_weights_stay_complex():
    """P57: averaged as complex numbers, not as their real parts."""
    model = nn.ParameterDict({"z": nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))})
    average = ShardedAverage(model, SWA())
    average.update()
    with torch.no_grad():
        model["z"].mul_(3)
    average.update()
    with average.summon_full_params() as full:
        assert torch.equal(full["z"], torch.tensor([1 + 2j, 3 - 1j]).lerp(3 * torch.tensor([1 + 2j, 3 - 1j]), 0.5))


def test_no_extra_keys_and_no_registered_modules():
    """P25, P68, P98: the model's own state_dict does not change."""
    model = awkward()
    keys = list(model.state_dict())
    average = ShardedAverage(model, SWA())
    average.update()
    assert list(model.state_dict()) == keys


def test_compiled_module_has_clean_names():
    """P106: `_orig_mod.` is gone, and a swap changes what the module computes without new tensors."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    wrapped = torch.compile(model, backend="eager")
    average = ShardedAverage(wrapped, EMA(decay=0.9))
    average.update()
    with torch.no_grad():
        model[0].weight.add_(1)
    inputs = torch.ones(2, 3)
    before = wrapped(inputs)
    with average.swapped():
        assert not torch.equal(wrapped(inputs), before)
    assert torch.equal(wrapped(inputs), before)
    with average.summon_full_params() as full:
        assert list(full) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_public_names():
    assert sharded_avg.__all__ == sorted(sharded_avg.__all__)
    assert all(hasattr(sharded_avg, name) for name in sharded_avg.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_tensors_moved_inside_a_swap(dtype):
    """An engine may move its shards in its first forward: the raw weights come back to where they are then."""
    model = awkward().to(dtype)
    average = ShardedAverage(model, EMA(decay=0.9), buffers="average")
    average.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update()
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.summon_full_params() as full:
        pass
    with average.swapped():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
    with average.summon_full_params() as again:
        assert all(torch.equal(again[name], full[name]) for name in full)


def look_at_state(average: ShardedAverage) -> None:
    average.state_dict()


def look_in_a_swap(average: ShardedAverage) -> None:
    with average.swapped():
        pass


@pytest.mark.parametrize("look", [look_at_state, look_in_a_swap])
def test_live_tensors_moved_between_updates(look):
    """Whoever notices first that a parameter has moved, the next update reads it where it is."""
    model = nn.Linear(3, 5)
    average = ShardedAverage(model, SWA())
    average.update()
    first = model.weight.detach().clone()
    model.weight.data = torch.full((5, 3), 2.0)
    look(average)
    average.update()
    with average.summon_full_params() as full:
        assert torch.equal(full["weight"], first.lerp(torch.full((5, 3), 2.0), 0.5))


def test_live_tensors_moved_and_looked_at_inside_a_swap():
    """Whoever re-reads the model inside the swap does not make it forget where the raw weights go."""
    model = nn.Linear(3, 5)
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update()
    with torch.no_grad():
        model.weight.add_(1)
    average.update()
    raw = model.weight.detach().clone()
    with average.swapped():
        model.weight.data = model.weight.data.clone()
        average.state_dict()
        with average.summon_full_params():
            pass
    assert torch.equal(model.weight, raw)


def test_another_average_of_the_same_model_waits():
    """What is in the model inside a swap is no weight to average."""
    model = nn.Linear(3, 5)
    first, second = ShardedAverage(model, SWA()), ShardedAverage(model, SWA())
    first.update()
    with first.swapped(), pytest.raises(SwapError, match="another ShardedAverage"):
        second.update()
    assert second.update()


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_tensors_that_appear_later(kind):
    """A buffer that is None until the first forward, or a parameter registered late: in full states, and averaged."""
    model = nn.Linear(3, 5)
    model.register_buffer("cache", None)
    average = ShardedAverage(model, SWA())
    average.update()
    if kind == "buffer":
        model.cache = torch.ones(2)
    else:
        model.extra = nn.Parameter(torch.ones(2))
    average.update()
    with average.summon_full_params() as full:
        assert list(full) == list(model.state_dict())
    assert average.nbytes == (20 + 2 * (kind == "parameter")) * 4


def test_no_room_for_newcomers(monkeypatch):
    """Without memory for a parameter that was unfrozen, the average goes on as it was."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    model[0].requires_grad_(False)
    average = ShardedAverage(model, SWA())
    average.update()
    model[0].requires_grad_(True)
    with monkeypatch.context() as patched:
        patched.setattr("sharded_avg.averages.store._empty", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            average.update()
    assert len(average.state_dict()["average"]) == 2
    assert average.update()
    assert average.n_averaged == 2
    assert average.nbytes == 26 * 4
