"""Cases on one process, as functions that build one: memory is held for one case at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from .. import EMA, ShardedAverage
from .rivals import DECAY, flat_lerp, installed, lerp_each
from .timing import OURS, Case, Contender, Memory
from .weights import Sizes, numel_of, tensors, transformer

BYTES_FP32 = 12  # of an update, per element: weights and average are read, the average is written
BYTES_BF16 = 10
BASE = "one flat lerp_"


def base(numel: int) -> Contender:
    """One flat fp32 `lerp_` of the same number of elements."""
    return Contender(BASE, flat_lerp(numel), BYTES_FP32 * numel)


def started(model: nn.Module, num_averages: int = 1) -> ShardedAverage:
    """An average, or several named ones, after the first update."""
    rules = {f"ema{i}": EMA(decay=1 - (1 - DECAY) / (i + 1)) for i in range(num_averages)}
    average = ShardedAverage(model, rules)
    average.update()
    return average


def ours(
    average: ShardedAverage, moved_bytes: int, target: float | None = None, *, unscheduled: bool = False
) -> Contender:
    """`average.update`, as a contender; `unscheduled` where an engine tells that there was no step since the last."""

    def update() -> None:
        if not average.update(unscheduled=unscheduled):
            raise RuntimeError("update() took nothing in, so that its time says nothing")

    return Contender(OURS, update, moved_bytes, target)


def update_case(name: str, make: Callable[[], nn.Module], target: float | None = None) -> Case:
    """One fp32 average beside one flat `lerp_`, and beside what a user would pick instead."""
    model = make()
    numel, average = numel_of(model), started(model)
    contenders = [base(numel), ours(average, BYTES_FP32 * numel, target)]
    contenders.append(Contender("lerp_ of each tensor", lerp_each(model), BYTES_FP32 * numel))
    contenders += [Contender(rival, update, BYTES_FP32 * numel, is_rival=True) for rival, update in installed(model)]
    return Case(name, contenders, Memory.of(average, numel))


def bf16_case(count: int, numel: int) -> Case:
    """bf16 weights into an fp32 average."""
    model = tensors(count, numel, torch.bfloat16)
    average, total = started(model), count * numel
    contenders = [base(total), ours(average, BYTES_BF16 * total, target=1.7)]
    return Case(f"bf16 weights, fp32 average: {count:,} x {numel:,}", contenders, Memory.of(average, total))


def several_case(count: int, numel: int, num_averages: int) -> Case:
    """Several averages from one read of the weights; the base is as many averages apart."""
    model = tensors(count, numel)
    together = started(model, num_averages)
    apart = [started(model) for _ in range(num_averages)]
    total = count * numel

    def update_apart() -> None:
        for average in apart:
            average.update()

    contenders = [
        Contender(f"{num_averages} ShardedAverages", update_apart, num_averages * BYTES_FP32 * total),
        Contender(f"one, with {num_averages} rules", together.update, (4 + 8 * num_averages) * total),
    ]
    return Case(f"{num_averages} averages: {count:,} x {numel:,}", contenders)


def swap_case(name: str, make: Callable[[], nn.Module]) -> Case:
    """Bringing the average in and the raw weights back; the base copies the weights once."""
    model = make()
    average, numel = started(model), numel_of(model)
    source, target = torch.randn(numel), torch.randn(numel)

    def there_and_back() -> None:
        with average.swapped("ema0"):
            pass

    contenders = [
        Contender("one flat copy_", lambda: target.copy_(source), 12 * numel),
        Contender("swapped(), there and back", there_and_back, 32 * numel),
    ]
    return Case(f"swap: {name}", contenders)


def cases(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Everything that one process measures: a key, and how to build it."""
    large, small, gpt = (partial(tensors, *sizes.large), partial(tensors, *sizes.small), sizes.transformer)
    large_name, small_name = (f"{count:,} x {numel:,}" for count, numel in (sizes.large, sizes.small))
    gpt_name, make_gpt = f"transformer, {gpt[0]} layers of width {gpt[1]}", partial(transformer, *gpt)
    yield "large", partial(update_case, f"fp32: {large_name}", large, target=1.25)
    yield "small", partial(update_case, f"fp32: {small_name}", small, target=9.0)
    yield "transformer", partial(update_case, f"fp32: {gpt_name}", make_gpt)
    yield "bf16", partial(bf16_case, *sizes.large)
    yield "two", partial(several_case, *sizes.large, num_averages=2)
    yield "three", partial(several_case, *sizes.large, num_averages=3)
    yield "swap", partial(swap_case, large_name, large)
    yield "swap-small", partial(swap_case, small_name, small)
