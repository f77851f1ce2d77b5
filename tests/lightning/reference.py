"""What plain torch says: the weights after each step of a loop that knows no Lightning, their average, their losses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .modules import NUM_BATCHES, Tiny, TwoOptimizers, batches, make_optimizer

NUM_STEPS = 2 * NUM_BATCHES  # of two epochs
DECAY = 0.75
FIRST = {"val_loss": 100, "test_loss": 200}  # batches of each evaluation begin at this number
Weights = dict[str, Tensor]


def assert_same(left: Weights, right: Weights, *, exact: bool = True) -> None:
    assert left.keys() == right.keys()
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def plain_training(num_steps: int, *, num_replicas: int = 1, **options: Any) -> tuple[Any, dict[int, Weights]]:
    """The module after a loop that knows no Lightning, and the weights after each of its steps.

    With batches of their own, replicas step by the mean of their gradients.
    """
    model = Tiny(**options | {"late": False})
    ranks = range(num_replicas) if options.get("own_batches") else [None]
    data = [batches(NUM_BATCHES, rank=rank) for rank in ranks]
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = make_optimizer(options.get("optimizer", "sgd"), trained)
    weights = {}
    for step in range(num_steps):
        optimizer.zero_grad()
        model.move_buffers()
        for own in data:
            (model._loss(own[step % NUM_BATCHES]) / len(data)).backward()
        optimizer.step()
        weights[step + 1] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model, weights


def plain_training_by_hand(num_steps: int) -> Weights:
    """What `TwoOptimizers` does, without Lightning."""
    model, data = TwoOptimizers(), batches(NUM_BATCHES)
    optimizers = model.configure_optimizers()
    for step in range(num_steps):
        model.move_buffers()
        due = optimizers[: 1 + step % 2]
        for optimizer in due:
            optimizer.zero_grad()
        model._loss(data[step % NUM_BATCHES]).backward()
        for optimizer in due:
            optimizer.step()
    return dict(model.state_dict())


def plain_loss(model: Any, first: int) -> float:
    """The mean loss over the batches of an evaluation, which begin at this number."""
    model.eval()
    with torch.no_grad():
        losses = [model._loss(batch) for batch in batches(2, first=first)]
    return float(torch.stack(losses).mean())


def plain_average(weights: dict[int, Weights], decay: float = DECAY) -> Weights:
    """The average of the weights after each step, floating-point buffers included, by the formula."""
    first, *others = [weights[step] for step in sorted(weights)]
    average = {name: value.clone() for name, value in first.items()}
    for live in others:
        for name, value in live.items():
            average[name] = average[name].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
    return average


def with_weights(weights: Weights) -> Tiny:
    model = Tiny()
    model.load_state_dict(weights)
    return model


def mean_of(weights: Sequence[Weights]) -> Weights:
    """The plain mean, one after the other; what is never averaged is that of the last."""
    mean = {name: value.clone() for name, value in weights[0].items()}
    for number, live in enumerate(weights[1:], start=1):
        for name, value in live.items():
            mean[name] = mean[name].lerp(value, 1 / (number + 1)) if value.is_floating_point() else value.clone()
    return mean


@functools.cache
def raw_after(step: int) -> Weights:
    return plain_training(4 * NUM_BATCHES)[1][step]


@functools.cache
def average_after(step: int, first: int = 1) -> Weights:
    """Of every step from `first` on."""
    return plain_average({number: raw_after(number) for number in range(first, step + 1)})


def averages_after(weights: dict[int, Weights]) -> dict[int, Weights]:
    """The average after each of these steps."""
    return {step: plain_average({s: weights[s] for s in weights if s <= step}) for step in weights}


def losses(metric: str, choice: str, average: Weights, raw: Weights) -> dict[str, float]:
    """What is logged under this name with `evaluate_with=choice`."""
    found = {}
    if choice != "raw":
        found[metric] = plain_loss(with_weights(average), first=FIRST[metric])
    if choice != "average":
        prefix = "raw/" if choice == "both" else ""
        found[prefix + metric] = plain_loss(with_weights(raw), first=FIRST[metric])
    return found
