"""BatchNorm statistics recomputed for the average, against torch's update_bn; and nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_avg import EMA, ConfigError, ShardedAverage, averaged_buffers, ranks, refreshed_batch_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


class Normed(nn.Module):
    """Every kind of BatchNorm, dropout, a buffer that each training forward changes, and one that shares memory."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.plain_mean = nn.BatchNorm1d(5, momentum=None)
        self.stateless = nn.BatchNorm1d(5, track_running_stats=False)
        self.frozen = nn.BatchNorm1d(5).eval()
        self.head = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("expanded", torch.ones(1).expand(5), persistent=False)
        self.register_buffer("unset", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.cache += 1
        x = self.drop(self.norm(self.mix(x))) * self.expanded
        return self.head(self.stateless(self.frozen(self.plain_mean(x))))


def batch(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [batch(100 + seed, dtype) for seed in range(3)]


class Run:
    """A model in training, with its average."""

    def __init__(self, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.model = Normed().to(dtype)
        self.dtype = dtype
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.average = ShardedAverage(self.model, EMA(decay=0.9), **arguments)

    def learn(self, start: int, stop: int) -> Run:
        for step in range(start, stop):
            self.model(batch(step, self.dtype)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update()
        return self


def state(model: nn.Module) -> list[Any]:
    """Everything that a refresh could disturb, with where it lies."""
    values: list[Any] = [copy.deepcopy(list(model.state_dict().items())), torch.get_rng_state()]
    values += [(name, tensor.data_ptr(), tensor.shape, tensor.clone()) for name, tensor in model.named_buffers()]
    values += [(name, module.training, getattr(module, "momentum", 0)) for name, module in model.named_modules()]
    return values


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """In evaluation mode, with the modes put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        result = model(batch(77, dtype)).clone()
    for module, mode in modes:
        module.training = mode
    return result


def with_update_bn(run: Run) -> nn.Module:
    """A plain module, loaded with the average, after torch's update_bn."""
    fresh = Normed().to(run.dtype)
    with run.average.summon_full_params() as full:
        fresh.load_state_dict(full)
    with torch.random.fork_rng(), torch.no_grad():
        update_bn(batches(run.dtype), fresh)
    return fresh


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_average(dtype: torch.dtype) -> None:
    """P32, P50: what a fresh module computes that was loaded with the average and went through update_bn."""
    run = Run(dtype).learn(0, 5)
    expected = with_update_bn(run)
    with run.average.swapped():
        stale = output(run.model, dtype)
        with refreshed_batch_norm(run.model, batches(dtype)):
            inside = output(run.model, dtype)
            for name, buffer in run.model.named_buffers():
                if "norm" in name or "plain_mean" in name or "frozen" in name:
                    assert torch.equal(buffer, dict(expected.named_buffers())[name]), name
            assert run.model.norm.num_batches_tracked == 3
    assert torch.equal(inside, output(expected, dtype))
    assert not torch.equal(inside, stale), "this test could not fail"


def test_training_goes_on_as_if_nothing_had_been() -> None:
    """P32: weights, statistics, averages and random numbers of a run that refreshes, and of one that never does."""
    refreshing = Run()
    for start in (0, 3, 6):
        refreshing.learn(start, start + 3)
        before = state(refreshing.model)
        with refreshing.average.swapped(), refreshed_batch_norm(refreshing.model, batches()):
            refreshing.model.eval()
            refreshing.model(batch(5))
        assert same(state(refreshing.model), before)
    other = Run().learn(0, 9)
    assert same(strip(state(refreshing.model)), strip(state(other.model)))
    with refreshing.average.summon_full_params() as ours, other.average.summon_full_params() as theirs:
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def strip(values: list[Any]) -> list[Any]:
    """Without addresses."""
    return [(v[0], *v[2:]) if isinstance(v, tuple) and len(v) == 4 else v for v in values]


def test_statistics_copied_averaged_or_recomputed() -> None:
    """P52: all three, for the same weights."""
    copied, averaged = Run(), Run(buffers="average")
    means = []
    for run in (copied, averaged):
        torch.manual_seed(1)
        for step in range(4):
            run.learn(step, step + 1)
            means.append(run.model.norm.running_mean.clone())
    assert same(means[:4], means[4:])
    expected = means[0]
    for mean in means[1:4]:
        expected = torch.lerp(expected, mean, 1 - 0.9)
    recomputed = with_update_bn(copied).norm.running_mean
    with copied.average.swapped():
        assert torch.equal(copied.model.norm.running_mean, means[3])
    with averaged.average.swapped():
        assert torch.equal(averaged.model.norm.running_mean, expected)
    for run in (copied, averaged):
        with run.average.swapped(), refreshed_batch_norm(run.model, batches()):
            assert torch.equal(run.model.norm.running_mean, recomputed)
    with averaged.average.swapped():
        assert torch.equal(averaged.model.norm.running_mean, expected)
    assert torch.equal(averaged.model.norm.running_mean, means[3])
    assert len({tuple(mean.tolist()) for mean in (means[3], expected, recomputed)}) == 3


def test_recomputed_statistics_are_handed_out() -> None:
    """P32: a full state for release has the statistics that belong to its weights."""
    run = Run().learn(0, 5)
    expected = with_update_bn(run).state_dict()
    expected.pop("seen")  # update_bn leaves other buffers changed
    with (
        run.average.swapped(),
        refreshed_batch_norm(run.model, batches()),
        run.average.summon_full_params() as full,
    ):
        assert all(torch.equal(full[name], tensor) for name, tensor in expected.items())


def test_without_a_swap_statistics_are_those_of_the_live_weights() -> None:
    run = Run().learn(0, 2)
    expected = copy.deepcopy(run.model)
    with torch.random.fork_rng(), torch.no_grad():
        update_bn(batches(), expected)
    with refreshed_batch_norm(run.model, batches()):
        assert torch.equal(output(run.model), output(expected))


# --- batches and forward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: [x, torch.zeros(3)]], ids=["tuple", "list"])
def test_the_first_of_a_tuple_is_the_input(wrap: Callable[[Tensor], object]) -> None:
    run = Run().learn(0, 2)
    with refreshed_batch_norm(run.model, batches()):
        expected = output(run.model)
    with refreshed_batch_norm(run.model, map(wrap, batches())):
        assert torch.equal(output(run.model), expected)


def test_batches_of_another_form() -> None:
    run = Run().learn(0, 2)
    with refreshed_batch_norm(run.model, batches()):
        expected = output(run.model)
    dicts = [{"x": x} for x in batches()]
    with refreshed_batch_norm(run.model, dicts, forward=lambda model, batch: model(**batch)):
        assert torch.equal(output(run.model), expected)


def test_loaders_draw_random_numbers() -> None:
    """P32: a DataLoader takes its seed from torch's generator, also when it does not shuffle."""
    model = Run().learn(0, 1).model
    before = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.randn(9, 3, generator=torch.Generator()), batch_size=3, shuffle=True)
    with refreshed_batch_norm(model, loader):
        assert model.norm.num_batches_tracked == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_build_for_an_accelerator_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """R17: torch built for CUDA, no driver: `current_accelerator()` names the build, and asking for a device raises."""

    def no_driver() -> int:
        raise RuntimeError("Found no NVIDIA driver on your system")

    model = Run().learn(0, 1).model
    with refreshed_batch_norm(model, batches()):
        expected = output(model)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", no_driver)
    monkeypatch.setattr(torch.cuda, "current_device", no_driver)
    assert ranks.accelerator() is None
    with refreshed_batch_norm(model, batches()):
        assert torch.equal(output(model), expected)
    with averaged_buffers(model):
        pass


def test_an_iterator_that_was_read_already() -> None:
    model = Run().learn(0, 1).model
    once = iter(batches())
    with refreshed_batch_norm(model, once):
        pass
    before = state(model)
    with pytest.raises(ConfigError, match="no batch"), refreshed_batch_norm(model, once):
        pass
    assert same(state(model), before)


def test_without_batch_norm_nothing_is_read() -> None:
    def unread() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    with refreshed_batch_norm(nn.Linear(3, 5), unread()):
        pass


def test_a_compiled_model() -> None:
    run = Run().learn(0, 2)
    with refreshed_batch_norm(run.model, batches()):
        expected = output(run.model)
    before = state(run.model)
    compiled = torch.compile(run.model, backend="eager")
    with refreshed_batch_norm(compiled, batches()):
        assert torch.equal(output(compiled), expected)
    assert same(state(run.model), before)


@pytest.mark.parametrize("call", [averaged_buffers, lambda model: refreshed_batch_norm(model, [])])
def test_what_is_no_module(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match="not dict"), call({}):
        pass


# --- what comes in between -----------------------------------------------------------------------------------------


class InjectedError(RuntimeError):
    pass


def refreshed(model: nn.Module) -> Any:
    return refreshed_batch_norm(model, batches())


Manager = Callable[[nn.Module], Any]
MANAGERS = [averaged_buffers, refreshed]
ERRORS = [InjectedError, KeyboardInterrupt]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("k", range(4))
def test_failing_batches(k: int, error: type[BaseException]) -> None:
    """P32, P67: everything is as it was."""
    run = Run().learn(0, 2)
    before, entered = state(run.model), False

    def failing() -> Iterator[Tensor]:
        yield from batches()[:k]
        raise error

    with pytest.raises(error), run.average.swapped(), refreshed_batch_norm(run.model, failing()):
        entered = True
    assert not entered
    assert same(state(run.model), before)


class FailAtCall(TorchDispatchMode):
    """Raise before or after the k-th operation."""

    def __init__(self, k: int, after: bool, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.after, self.error = k, after, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = func(*args, **(kwargs or {}))
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("after", [False, True])
def test_failing_at_any_operation(manager: Manager, after: bool, error: type[BaseException]) -> None:
    """P32, P67: while buffers are kept, changed or put back: everything is as it was."""
    run, k, failed = Run().learn(0, 2), 0, True
    before = state(run.model)
    while failed:
        k, failed = k + 1, False
        try:
            with FailAtCall(k, after, error), manager(run.model):
                pass
        except error:
            failed = True
        assert same(state(run.model), before), f"operation {k}"
    assert k > (20 if manager is averaged_buffers else 100), "few operations were reached"


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("manager", MANAGERS)
def test_failing_body(manager: Manager, error: type[BaseException]) -> None:
    """P67."""
    run = Run().learn(0, 2)
    before = state(run.model)
    with pytest.raises(error), manager(run.model):  # noqa: PT012
        run.model.eval()
        run.model.norm.running_mean.fill_(3)
        run.model.norm.momentum = 0.5
        raise error
    if manager is averaged_buffers:
        run.model.train()
        run.model.frozen.eval()
        run.model.norm.momentum = 0.3
    assert same(state(run.model), before)


def evaluate_and_break(model: Normed) -> None:
    with torch.inference_mode():
        model.norm.running_mean = torch.zeros(5)  # another tensor, to which training cannot write
    model.plain_mean.running_var = None
    model.seen += 1
    model.cache = torch.zeros(9)  # grown


def test_statistics_replaced_inside_are_put_back() -> None:
    """A buffer that the block changed and that is no statistic keeps the change."""
    run = Run().learn(0, 2)
    expected = output(run.model)
    with refreshed_batch_norm(run.model, batches()):
        assert run.model.seen == 2
        evaluate_and_break(run.model)
    assert torch.equal(output(run.model), expected)
    assert run.model.seen == 3
    assert run.model.cache.shape == (9,)
    run.learn(2, 3)


def test_evaluating_in_inference_mode() -> None:
    refreshing = Run().learn(0, 2)
    with torch.inference_mode(), refreshing.average.swapped(), refreshed_batch_norm(refreshing.model, batches()):
        output(refreshing.model)
    refreshing.learn(2, 4)
    other = Run().learn(0, 4)
    assert same(strip(state(refreshing.model)), strip(state(other.model)))


def test_the_mean_over_one_process_is_the_same() -> None:
    run = Run().learn(0, 2)
    before = state(run.model)
    with averaged_buffers(run.model):
        assert same(state(run.model), before)
    assert same(state(run.model), before)
