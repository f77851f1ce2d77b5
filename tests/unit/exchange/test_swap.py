"""What others do to the model inside a swap, and graphs that reach across its ends; in one process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sharded_avg import EMA, LayoutChangedError, ShardedAverage, SwapError

Body = Callable[[nn.Module], object]


def trained(dtype: torch.dtype = torch.float32, average_dtype: Any = "auto") -> tuple[nn.Module, ShardedAverage]:
    """Weights too large for half, an average that is another one, and both unlike what half can hold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight[0, 0] = 1e5
    average = ShardedAverage(model, EMA(decay=0.5), dtype=average_dtype)
    for _ in range(2):
        average.update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1 / 3)
    return model, average


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def averages_of(average: ShardedAverage) -> dict[str, Tensor]:
    with average.summon_full_params() as full:
        names = [name for name in full if "running" not in name and "num_batches" not in name]
        return {name: full[name].clone() for name in names}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def step(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    model(torch.randn(4, 3).to(dtype)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def with_other_weight(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros(5, 3))


def set_data(change: Callable[[Tensor], Tensor]) -> Body:
    def body(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = change(parameter.data)

    return body


def quantise(parameter: Tensor) -> None:
    parameter.data.copy_((parameter.data * 8).round() / 8)


def in_place(change: Callable[[Tensor], object]) -> Body:
    return lambda model: [change(parameter) for parameter in model.parameters()]


REPLACED: dict[str, Body] = {
    "half": nn.Module.half,
    "half and back": lambda model: model.half().float(),
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda model: model.to(torch.float16).to(torch.float32),
    "data": set_data(torch.zeros_like),
    "data moved": set_data(torch.clone),
    "a parameter": with_other_weight,
}
WRITTEN: dict[str, Body] = {
    "step": step,
    "load_state_dict": lambda m: m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()}),
    "no_grad": lambda m: torch.no_grad()(in_place(lambda parameter: parameter.mul_(2)))(m),
    "data.add_": in_place(lambda parameter: parameter.data.add_(1)),
    "data.neg_": in_place(lambda parameter: parameter.data.neg_()),
    "one element": lambda m: m[2].weight.data[0, 0].add_(1),
    "quantised": in_place(quantise),
    "step, then half": lambda m: (step(m), m.half()),
}


@pytest.mark.parametrize("average_dtype", ["auto", None, torch.float64], ids=str)
@pytest.mark.parametrize("body", REPLACED)
def test_replaced_weights_cost_nothing(body: str, average_dtype: Any) -> None:
    """R04: the average is what it was, and the model has its raw weights, in the dtype that it was given inside."""
    model, average = trained(average_dtype=average_dtype)
    raw, before = weights_of(model), averages_of(average)
    with average.swapped():
        REPLACED[body](model)
        assert same(averages_of(average), before), "handed out inside"
    expected = {name: value.to(dict(model.named_parameters())[name].dtype) for name, value in raw.items()}
    assert same(weights_of(model), expected)
    assert same(averages_of(average), before)
    assert average.update()


@pytest.mark.parametrize("body", WRITTEN)
def test_written_averages_are_told(body: str) -> None:
    """R04: an average that lay in the model is lost where it was written to: leaving says so, with raw weights back."""
    model, average = trained()
    raw = weights_of(model)
    with (
        pytest.raises(SwapError, match=r"written to inside .*'(0|1|2)\.(weight|bias)'.* holds there what"),
        average.swapped(),
    ):
        WRITTEN[body](model)
    assert same({name: value.float() for name, value in weights_of(model).items()}, raw) or "half" in body
    with average.swapped():
        pass


@pytest.mark.parametrize("body", ["step", "load_state_dict", "no_grad"])
@pytest.mark.parametrize(
    ("dtype", "average_dtype"), [(torch.bfloat16, "auto"), (torch.float32, torch.float64)], ids=str
)
def test_written_copies_are_undone_and_told(body: str, dtype: torch.dtype, average_dtype: Any) -> None:
    """R04: where the average is kept apart from the weights, nothing is lost, and leaving says so, too."""
    model, average = trained(dtype, average_dtype)
    raw, before = weights_of(model), averages_of(average)
    with pytest.raises(SwapError, match="are what they were before"), average.swapped():
        WRITTEN[body](model)
    assert same(weights_of(model), raw)
    assert same(averages_of(average), before)


def test_the_error_of_the_block_comes_first() -> None:
    """R04: it says in a note what has become of the average."""
    model, average = trained()
    has_notes = sys.version_info >= (3, 11)  # before, it is a warning
    said = contextlib.nullcontext() if has_notes else pytest.warns(UserWarning, match="written to")
    with said, pytest.raises(ValueError, match="by design") as caught, average.swapped():  # noqa: PT012
        step(model)
        raise ValueError("by design")
    assert not has_notes or "written to" in caught.value.__notes__[0]


def test_only_what_was_written_to_is_named() -> None:
    """R04: where autograd's counters know."""
    model, average = trained()
    with pytest.raises(SwapError) as caught, average.swapped(), torch.no_grad():
        model[2].bias.add_(1)
    assert "'2.bias'" in str(caught.value)
    assert "'0.weight'" not in str(caught.value)


@pytest.mark.parametrize("kind", ["embedding", "bag"])
def test_forward_that_writes_to_its_weights(kind: str) -> None:
    """R04: max_norm renormalises rows of the weight in each forward, also without grad: no average may lie there."""
    torch.manual_seed(0)
    model = nn.Sequential(
        (nn.Embedding if kind == "embedding" else nn.EmbeddingBag)(7, 3, max_norm=0.1), nn.Linear(3, 2)
    )
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update()
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update()
    raw, before = weights_of(model), averages_of(average)
    with average.swapped(), torch.no_grad():
        model(torch.tensor([[0, 1, 2]]))
        assert not torch.equal(model[0].weight, before["0.weight"]), "forward wrote nothing"
    assert same(weights_of(model), raw)
    assert same(averages_of(average), before)


def test_raw_weights_are_back_where_another_part_is_gone() -> None:
    """R04: what cannot be brought back is told; the rest is back, wherever it is by then."""
    model, average = trained()
    raw = weights_of(model)
    with pytest.raises(LayoutChangedError), average.swapped():  # noqa: PT012
        model.double()
        model[2] = nn.Identity()
    assert torch.equal(model[0].weight, raw["0.weight"].double())


# --- autograd ------------------------------------------------------------------------------------------------------


def student_and_teacher(model: nn.Module, average: ShardedAverage, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Gradients of a loss whose teacher is the average, between forward and backward of the student."""
    x = torch.linspace(-1, 1, 15).view(5, 3)
    student = forward(model, x)
    with average.swapped(), torch.no_grad():
        teacher = model(x).clone()
    model.zero_grad()
    (student - teacher).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("forward", [plainly, checkpointed])
def test_a_swap_between_forward_and_backward(forward: Callable[..., Tensor]) -> None:
    """R07: a teacher that is the average; the gradients are those of the raw weights."""
    model, average = trained()
    model.eval()
    with torch.no_grad():
        model[0].weight[0, 0] = 0.5
    x = torch.linspace(-1, 1, 15).view(5, 3)
    with average.swapped(), torch.no_grad():
        teacher = model(x).clone()
    (model(x) - teacher).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    found = student_and_teacher(model, average, forward)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    step(model)  # and training goes on
    assert average.update()


def test_a_backward_on_the_other_side_raises() -> None:
    """R07: a graph of raw weights inside, one of averaged weights outside: wrong gradients otherwise."""
    model, average = trained()
    x, message = torch.ones(4, 3), "modified by an inplace operation"
    outside = model(x).square().mean()
    with average.swapped():
        with pytest.raises(RuntimeError, match=message):
            outside.backward()
        inside, again = model(x).square().mean(), model(x).square().mean()
    with pytest.raises(RuntimeError, match=message):
        inside.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # no step brings it to the version that it had inside
    average.update()
    with pytest.raises(RuntimeError, match=message):
        again.backward()


def test_weights_that_are_not_swapped_keep_their_versions() -> None:
    """R07: what was written to inside and is not averaged is another value by then, and autograd must see it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    average = ShardedAverage(model, EMA(decay=0.5), include=lambda name, _: name.startswith("0."))
    average.update()
    loss = model(torch.ones(2, 3)).square().mean()
    with average.swapped(), torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- cost ----------------------------------------------------------------------------------------------------------


def calls_per_parameter(num_parameters: int) -> float:
    model = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(num_parameters)])
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update()
    num_calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        num_calls[0] += event in ("call", "c_call")

    with average.swapped():
        pass
    swap = average.swapped()
    sys.setprofile(count)
    try:
        with swap:
            pass
    finally:
        sys.setprofile(None)
    return num_calls[0] / num_parameters


def test_a_swap_costs_the_same_for_each_of_many_parameters() -> None:
    """R21: linear in their number, and few calls for each."""
    few, many = calls_per_parameter(500), calls_per_parameter(4_000)
    assert many <= few * 1.05
    assert many <= 12
