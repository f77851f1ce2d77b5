"""Which buffers are averaged: by policy, by pattern, by predicate; and which of torch's own never are."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from sharded_avg import EMA, ConfigError, ShardedAverage
from sharded_avg.weights.buffers import LEFT_LIVE, left_live
from sharded_avg.weights.names import entries

DECAY = 0.75
GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guide.md"


class Kept(nn.Module):
    """A statistic and a counter of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(3))
        self.register_buffer("passed", torch.zeros(1))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.z = nn.Buffer(torch.zeros(2, dtype=torch.complex64))


def model_with_buffers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"norm": nn.BatchNorm1d(3), "kept": Kept(), "linear": nn.Linear(3, 2)})


CAN = {"norm.running_mean", "norm.running_var", "kept.level", "kept.passed", "kept.z"}
POLICIES: dict[str, tuple[Any, set[str]]] = {
    "copy": ("copy", set()),
    "average": ("average", CAN),
    "no pattern": ({}, set()),
    "a pattern": ({"*.running_*": "average"}, {"norm.running_mean", "norm.running_var"}),
    "the first pattern says": ({"*.passed": "copy", "kept.*": "average"}, {"kept.level", "kept.z"}),
    "everything": ({"*": "average"}, CAN),
    "a name": ({"kept.level": "average", "kept": "average"}, {"kept.level"}),
    "a class of letters": ({"*.[lp]*": "average"}, {"kept.level", "kept.passed"}),
    "other case": ({"KEPT.*": "average"}, set()),
    "a predicate": (lambda name, tensor: name.startswith("kept") and tensor.shape == (3,), {"kept.level"}),
    "a predicate that takes all": (lambda name, tensor: True, CAN),
}


@torch.no_grad()
def moved(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.add_(torch.rand_like(tensor))


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str) -> None:
    """R19: those that are chosen are averaged, and the others are the live ones; bit for bit."""
    policy, chosen = POLICIES[name]
    model = model_with_buffers()
    average = ShardedAverage(model, EMA(decay=DECAY), buffers=policy)
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        moved(model)
        average.update()
        for key in chosen:
            live = model.get_buffer(key)
            expected[key] = expected[key].lerp(live, 1 - DECAY) if key in expected else live.clone()
    live = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {key for key, _ in model.named_buffers()} & live.keys()
    with average.summon_full_params() as full:
        assert all(torch.equal(full[key], expected.get(key, live[key])) for key in buffers)
    with average.swapped():
        assert all(torch.equal(model.get_buffer(key), expected.get(key, live[key])) for key in buffers)
    assert all(torch.equal(value, live[key]) for key, value in model.state_dict().items())


def test_a_predicate_sees_no_values() -> None:
    """R19: the full shape and dtype on the meta device, so that all ranks answer alike; only what can be averaged."""
    seen: dict[str, Tensor] = {}
    ShardedAverage(
        model_with_buffers(), EMA(decay=DECAY), buffers=lambda name, tensor: bool(seen.update({name: tensor}))
    )
    assert seen.keys() == CAN
    assert all(tensor.is_meta for tensor in seen.values())


@pytest.mark.parametrize("buffers", ["skip", 3, None, {"a": "skip"}, {"a": True}, {3: "copy"}, ["*"]])
def test_policies_that_cannot_be(buffers: Any) -> None:
    """R19: the error shows the value and the ways to say it."""
    with pytest.raises(ConfigError, match=r"buffers=.*average"):
        ShardedAverage(nn.Linear(2, 2), EMA(decay=DECAY), buffers=buffers)


# --- torch's own ---------------------------------------------------------------------------------------------------


def pruned(method: Callable[..., Any], **arguments: Any) -> nn.Module:
    return method(nn.Linear(3, 5), "weight", **arguments)


def parametrized_buffer() -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = nn.Module()
    module.register_buffer("level", torch.ones(3))
    parametrize.register_parametrization(module, "level", Doubled())
    return module


def observers() -> dict[str, Callable[[], nn.Module]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao import quantization as q
    from torch.ao.quantization.fake_quantize import FixedQParamsFakeQuantize

    kinds = (
        *(q.MinMaxObserver, q.MovingAverageMinMaxObserver, q.PerChannelMinMaxObserver, q.HistogramObserver),
        *(q.MovingAveragePerChannelMinMaxObserver, q.FakeQuantize, q.NoopObserver, q.PlaceholderObserver),
    )
    fixed = partial(FixedQParamsFakeQuantize, q.default_symmetric_fixed_qparams_observer)
    return {kind.__name__: kind for kind in kinds} | {"FixedQParamsFakeQuantize": fixed}


# Every way in which torch.nn keeps buffers, and which of them are averaged on request.
KEEPERS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    **{
        f"{kind}{dims}d": (partial(getattr(nn, f"{kind}{dims}d"), 3, **more), {"running_mean", "running_var"})
        for kind, more in (("BatchNorm", {}), ("InstanceNorm", {"track_running_stats": True}))
        for dims in (1, 2, 3)
    },
    "SyncBatchNorm": (partial(nn.SyncBatchNorm, 3), {"running_mean", "running_var"}),
    "FractionalMaxPool2d": (partial(nn.FractionalMaxPool2d, 2, 3, _random_samples=torch.rand(1, 1, 2)), set()),
    "FractionalMaxPool3d": (partial(nn.FractionalMaxPool3d, 2, 3, _random_samples=torch.rand(1, 1, 3)), set()),
    **{
        kind: (partial(getattr(nn, kind), weight=torch.rand(3)), set())
        for kind in (
            "NLLLoss",
            "NLLLoss2d",
            "CrossEntropyLoss",
            "BCELoss",
            "MultiMarginLoss",
            "MultiLabelSoftMarginLoss",
        )
    },
    "BCEWithLogitsLoss": (partial(nn.BCEWithLogitsLoss, torch.rand(3), pos_weight=torch.rand(3)), set()),
    "parametrizations.spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 5)), set()),
    "parametrizations.orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 5)), set()),
    "parametrizations.weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 5)), set()),
    "parametrize, a buffer": (parametrized_buffer, {"parametrizations.level.original"}),
    "utils.spectral_norm": (lambda: spectral_norm(nn.Linear(3, 5)), set()),
    "utils.prune, random": (partial(pruned, prune.random_unstructured, amount=2), set()),
    "utils.prune, twice": (lambda: prune.l1_unstructured(pruned(prune.identity), "weight", 2), set()),
    **{f"torch.ao, {name}": (make, set()) for name, make in observers().items()},
}


def beside_weights(keeper: nn.Module) -> nn.Module:
    return nn.ModuleDict({"keeper": keeper, "linear": nn.Linear(3, 2)})


@pytest.mark.parametrize("policy", ["average", "pattern", "predicate"])
@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_state_without_a_mean_stays_live(name: str, policy: str) -> None:
    """R19: without being asked, and also where a pattern or a predicate takes everything."""
    make, averaged = KEEPERS[name]
    torch.manual_seed(0)
    model = beside_weights(make())
    buffers = {"average": "average", "pattern": {"*": "average"}, "predicate": lambda name, tensor: True}[policy]
    average = ShardedAverage(model, EMA(decay=DECAY), buffers=buffers)
    average.update()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.numel():
                buffer.copy_(torch.rand_like(buffer) + 1)
    average.update()
    persistent = {entry.name: entry.tensor for entry in entries(model) if entry.is_buffer and entry.tensor.numel()}
    with average.summon_full_params() as full:
        changed = {key for key, live in persistent.items() if not torch.equal(full[key], live)}
    assert changed == {f"keeper.{key}" for key in averaged}


def test_what_spectral_norm_computes_stays_right() -> None:
    """R19: the averaged weight has the spectral norm that the live vectors give it, and not one divided by less."""
    torch.manual_seed(0)
    model = parametrizations.spectral_norm(nn.Linear(3, 5))
    average = ShardedAverage(model, EMA(decay=DECAY), buffers="average")
    for _ in range(3):
        with torch.no_grad():
            model.parametrizations.weight.original.copy_(torch.randn(5, 3))
        model.train()
        for _ in range(30):
            model(torch.ones(1, 3))
        average.update()
    model.eval()
    u, v = model.parametrizations.weight[0]._u, model.parametrizations.weight[0]._v
    with average.swapped():
        weight = model.parametrizations.weight.original
        assert torch.equal(model.weight, weight / torch.vdot(u, weight @ v))
        assert torch.allclose(u.norm(), torch.ones(()))


def buffer_calls() -> Iterator[tuple[str, str]]:
    """(file below torch/nn, first argument) of each call of `register_buffer`, as written."""
    root = Path(nn.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_buffer":
                yield path.relative_to(root).as_posix(), ast.unparse(node.args[0])


def test_the_table_is_complete() -> None:
    """R19: a torch that keeps a buffer more fails here. Then decide: may it be averaged? LEFT_LIVE, KEEPERS, guide."""
    known = {
        "modules/batchnorm.py": {"'running_mean'", "'running_var'", "'num_batches_tracked'"},
        "modules/loss.py": {"'weight'", "'pos_weight'"},
        "modules/pooling.py": {"'_random_samples'"},
        "modules/module.py": {"name"},  # nn.Buffer as an attribute: the user's own
        "utils/parametrizations.py": {"'base'", "'_u'", "'_v'"},
        "utils/parametrize.py": {"name"},  # the user's own tensor
        "utils/prune.py": {"name + '_mask'"},
        "utils/spectral_norm.py": {"fn.name + '_u'", "fn.name + '_v'"},
    }
    found: dict[str, set[str]] = {}
    for file, argument in buffer_calls():
        found.setdefault(file, set()).add(argument)
    assert {file: names for file, names in found.items() if names - known.get(file, set())} == {}


def test_modules_of_torch_nn_keep_no_other_buffers() -> None:
    """R19: what can be made without arguments, or with sizes, is made and looked at."""
    kept: dict[str, set[str]] = {}
    for name in dir(nn):
        cls = getattr(nn, name)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or name in KEEPERS or "Lazy" in name:
            continue
        for arguments in ((), (4,), (4, 4), (2, 4), (4, 4, 4), (4, 2, 8)):
            try:
                module = cls(*arguments)
            except Exception:
                continue
            floats = {key for key, buffer in module.named_buffers() if buffer.is_floating_point()}
            if floats:
                kept[name] = floats
            break
    assert kept == {}


def test_the_guide_has_the_table() -> None:
    """R19: each class of LEFT_LIVE and each hook is named where users read about buffers."""
    text = GUIDE.read_text()
    for word in ("running_mean", "_u", "_v", "base", "weight_mask", "_random_samples", "pos_weight", "torch.ao"):
        assert f"`{word}" in text or f"{word}`" in text, word
    for cls, keys in LEFT_LIVE:
        assert all(key in text for key in keys), cls


def test_left_live_knows_the_names_inside_wrappers() -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), torch.compile(parametrizations.spectral_norm(nn.Linear(3, 3)), backend="eager")
    )
    assert left_live(model) == {"1.parametrizations.weight.0._u", "1.parametrizations.weight.0._v"}
