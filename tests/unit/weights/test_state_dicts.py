"""Hooks and overrides of the user's modules: what is handed out and saved has the keys of `model.state_dict()`."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sharded_avg import EMA, ConfigError, ShardedAverage, load_averaged_state_dict
from sharded_avg.weights.state_dicts import is_rewritten
from sharded_avg.weights.write import write_live

DECAY = 0.75


def renamed(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}table"] = state.pop(f"{prefix}weight")


def named_back(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state[f"{prefix}weight"] = state.pop(f"{prefix}table")


class Public(nn.Embedding):
    """`register_state_dict_post_hook`, as it is documented."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_state_dict_post_hook(types.FunctionType(renamed.__code__, globals()))
        self.register_load_state_dict_pre_hook(named_back)


class Bound(nn.Embedding):
    """`_register_state_dict_hook` of a method, which looks at its own module."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self._register_state_dict_hook(self.out)
        self.register_load_state_dict_pre_hook(named_back)

    def out(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        del state[f"{prefix}weight"]
        state[f"{prefix}table"] = self.weight


class Partial(nn.Embedding):
    """A hook with the module as an argument."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self._register_state_dict_hook(partial(self.out, self))
        self.register_load_state_dict_pre_hook(named_back)

    @staticmethod
    def out(mine: nn.Module, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        assert mine is module
        renamed(module, state, prefix, metadata)


class Saving(nn.Embedding):
    """An overridden `_save_to_state_dict`, which leaves out what `super()` would detach."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}table"] = self.weight.data

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        named_back(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)


class Asked(nn.Embedding):
    """An overridden `state_dict`, called by the parent's with its arguments."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        renamed(self, state, prefix, None)
        return state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        named_back(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)


class Model(nn.Module):
    """An embedding in the middle of other layers; odd sizes, a tie, a frozen layer, buffers, extra state."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.inner = nn.Sequential(kind(7, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.inner[0].weight
        self.frozen = nn.Linear(3, 1).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        del state


class Root(Model):
    """A root that takes no arguments, leaves out what is frozen, and gives everything another prefix."""

    def state_dict(self) -> Any:  # type: ignore[override]
        state = super().state_dict()
        return {f"net.{key}": value for key, value in state.items() if not key.startswith("frozen")}

    def load_state_dict(self, state: Any, **arguments: Any) -> Any:  # type: ignore[override]
        own = {key.removeprefix("net."): value for key, value in state.items()}
        return super().load_state_dict({**super().state_dict(), **own}, **arguments)


class InMemory(Model):
    """Every value on the CPU, in half precision."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {k: v.detach().cpu().half() if isinstance(v, Tensor) else v for k, v in state.items()}


def returning(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> dict[str, Any]:
    return {f"net.{key}": value for key, value in state.items()}


def stripped(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in list(state):
        state[key.removeprefix("net.")] = state.pop(key)


def with_a_hook_that_returns() -> nn.Module:
    model = Model()
    model._register_state_dict_hook(returning)
    model.register_load_state_dict_pre_hook(stripped)
    return model


def patched() -> nn.Module:
    """As old fine-tuning scripts do: the live model's own `state_dict` in a closure."""
    model = Model()
    old = model.state_dict
    model.state_dict = types.MethodType(  # type: ignore[method-assign]
        lambda self, *args, **kwargs: {k: v for k, v in old().items() if not k.startswith("first")}, model
    )
    load = model.load_state_dict
    model.load_state_dict = lambda state, strict=True: load({**old(), **state}, strict=strict)  # type: ignore[method-assign]
    return model


def with_old_spectral_norm() -> nn.Module:
    model = Model()
    nn.utils.spectral_norm(model.first)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: partial(Model, kind) for kind in (Public, Bound, Partial, Saving, Asked)},
    "Root": Root,
    "InMemory": InMemory,
    "a hook that returns": with_a_hook_that_returns,
    "patched": patched,
    "old spectral_norm": with_old_spectral_norm,
}


@torch.no_grad()
def averaged(make: Callable[[], nn.Module]) -> tuple[nn.Module, ShardedAverage, nn.Module]:
    """A model, its average, and another model of the same kind whose weights are what the average should be."""
    torch.manual_seed(1)
    model = make()
    torch.manual_seed(1)
    expected = make()
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    for _ in range(3):
        for live, mean in zip(model.parameters(), expected.parameters(), strict=True):
            if live.requires_grad:
                live.add_(torch.randn_like(live))
                mean.lerp_(live, 1 - DECAY)
        average.update()
    return model, average, expected


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


@pytest.mark.parametrize("name", MODELS)
def test_full_states_are_those_of_state_dict(name: str) -> None:
    """R06: keys, order and values, extra state and empty parameters too; the live model keeps its own."""
    model, average, expected = averaged(MODELS[name])
    raw = {key: value.clone() for key, value in model.named_parameters()}
    with average.summon_full_params() as full:
        assert_equal(full, expected.state_dict())
        MODELS[name]().load_state_dict(full, strict=True)
    assert all(torch.equal(value, raw[key]) for key, value in model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_saved_averages_have_these_names_too(name: str, tmp_path: Path) -> None:
    """R06: what is saved is loaded by the model, and by an average of such a model, with the same names."""
    _, average, expected = averaged(MODELS[name])
    average.save(tmp_path / "a", with_buffers=True)
    saved = load_averaged_state_dict(tmp_path / "a")
    keys = dict(expected.state_dict())
    assert {key for key, value in saved.items() if isinstance(value, Tensor) and value.numel()} <= (
        keys.keys() | ({"first.weight", "first.bias"} if name == "patched" else set())
    )
    model = MODELS[name]()
    model.load_state_dict(saved, strict=False)
    for (key, loaded), mean in zip(model.named_parameters(), expected.parameters(), strict=True):
        if mean.requires_grad and not (name == "patched" and key.startswith("first")):
            assert torch.equal(loaded, mean), key
    other = ShardedAverage(MODELS[name](), EMA(decay=DECAY))
    other.load(tmp_path / "a")
    other.update()
    assert other.n_averaged == 5


@pytest.mark.parametrize("name", MODELS)
def test_the_rest_does_not_notice(name: str) -> None:
    """R06: swaps, writing back and taking over go on by the same names."""
    model, average, expected = averaged(MODELS[name])
    raw = {key: value.clone() for key, value in model.named_parameters()}
    with average.swapped():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(torch.equal(value, raw[key]) for key, value in model.named_parameters())
    other = ShardedAverage(MODELS[name](), EMA(decay=DECAY))
    other.take_from(average)
    assert average.manifest() == other.manifest()
    if name in ("InMemory", "patched"):
        return
    with other.summon_full_params(writeback=True) as full:
        key = next(key for key in full if key.endswith("first.bias"))
        full[key].fill_(7)
    with other.summon_full_params() as full:
        assert (full[key] == 7).all()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("InMemory", "patched", "Root")])
def test_full_tensors_are_written_by_these_names(name: str) -> None:
    """R06: `write_live` takes what `state_dict()` gives, as a checkpoint of raw weights has it."""
    model, average, expected = averaged(MODELS[name])
    with average.summon_full_params() as full:
        tensors = {key: value for key, value in full.items() if isinstance(value, Tensor)}
    assert write_live(model, tensors) == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_names_are_chosen_by_the_models_own() -> None:
    """R06: `include` sees the names of `named_parameters()`, as everywhere in torch."""
    seen = []
    ShardedAverage(Model(Public), EMA(decay=DECAY), include=lambda name, tensor: bool(seen.append(name)) or True)
    assert "inner.0.weight" in seen
    assert not [name for name in seen if "table" in name]


class Fused(nn.Module):
    """Two parameters, and one tensor in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 3))
        self.bias = nn.Parameter(torch.randn(5))
        self.register_state_dict_post_hook(self.out)

    @staticmethod
    def out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}qk"] = torch.cat([state.pop(f"{prefix}q"), state.pop(f"{prefix}k")])


def test_tensors_made_anew_are_made_of_averages(tmp_path: Path) -> None:
    """R06: in memory a hook's own tensors are right; for a folder, which has pieces, the difference is said."""
    with pytest.warns(UserWarning, match=r"makes \['0.qk'\] anew and has no \['0.q', '0.k'\]"):
        _, average, expected = averaged(lambda: nn.Sequential(Fused(), nn.Linear(3, 2)))
    with average.summon_full_params() as full:
        assert_equal(full, expected.state_dict())
    average.save(tmp_path / "a")
    assert set(load_averaged_state_dict(tmp_path / "a")) == {"0.q", "0.k", "0.bias", "1.weight", "1.bias"}
    with pytest.raises(ConfigError, match=r"writeback.*'0\.q'"), average.summon_full_params(writeback=True):
        pass
    average.update()


def test_copies_are_not_written_back() -> None:
    """R06: what a hook cast is another tensor, and would round the average."""
    _, average, _ = averaged(InMemory)
    with average.summon_full_params() as full:
        before = {key: value for key, value in full.items() if isinstance(value, Tensor)}
    with pytest.raises(ConfigError, match="writeback"), average.summon_full_params(writeback=True):
        pass
    with average.summon_full_params() as full:
        assert all(torch.equal(full[key], value) for key, value in before.items())


def test_a_hook_that_wants_values_is_asked_later() -> None:
    """R06: keys that depend on values cannot be known before there are any; full states have them."""

    def by_value(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if state[f"{prefix}weight"].sum().item() < 1e9:
            state[f"{prefix}small"] = state.pop(f"{prefix}weight")

    def make() -> nn.Module:
        model = nn.Linear(3, 2)
        model.register_state_dict_post_hook(by_value)
        return model

    with pytest.warns(UserWarning, match="cannot be asked"):
        _, average, expected = averaged(make)
    with average.summon_full_params() as full:
        assert_equal(full, expected.state_dict())


class Exports(nn.Module):
    """One parameter under the name of another, which is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.ema = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.register_state_dict_post_hook(self.out)

    @staticmethod
    def out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}w"] = state.pop(f"{prefix}ema")


def test_one_tensor_under_the_name_of_another(tmp_path: Path) -> None:
    """R06: names that would collide are told, and both averages are kept."""
    with pytest.warns(UserWarning, match=r"has no \['w'\]"):
        _, average, expected = averaged(Exports)
    with average.summon_full_params() as full:
        assert_equal(full, expected.state_dict())
    average.save(tmp_path / "a")
    saved = load_averaged_state_dict(tmp_path / "a")
    assert torch.equal(saved["w"], expected.w)
    assert torch.equal(saved["ema"], expected.ema)


def test_plain_models_are_not_asked() -> None:
    """What torch and the engines do themselves is no reason to build a double."""
    assert not is_rewritten(Model())
    assert not is_rewritten(torch.compile(nn.Linear(3, 3), backend="eager"))
    assert not is_rewritten(checkpoint_wrapper(nn.Linear(3, 3)))
    assert is_rewritten(Model(Public))
