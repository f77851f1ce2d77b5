"""Rules: the equation, checked against its source and against plain arithmetic."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from sharded_avg import EMA, SWA, ConfigError, CustomRule, Moment

SHAPES = [(), (1,), (3,), (5, 7), (2, 3, 5)]


def tensors(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def elementwise_product(averaged: torch.Tensor, current: torch.Tensor, num_averaged: int) -> torch.Tensor:
    return averaged * current + num_averaged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (EMA(decay=0.9), get_ema_multi_avg_fn(0.9)),
        (EMA(decay=0.999), get_ema_multi_avg_fn(0.999)),
        (EMA(decay=0.25), get_ema_multi_avg_fn(0.25)),
        (SWA(), get_swa_multi_avg_fn()),
        (CustomRule(avg_fn=get_ema_avg_fn(0.9)), None),
    ],
    ids=["ema 0.9", "ema 0.999", "ema 0.25", "swa", "avg_fn"],
)
def test_rule_equals_torch(rule, reference, dtype):
    """Bit for bit what torch.optim.swa_utils computes on the same tensors."""
    ours, theirs = tensors(0, dtype), tensors(0, dtype)
    for n in range(1, 6):
        current = tensors(n, dtype)
        rule.update_(ours, current, Moment(n))
        if reference is None:
            theirs = [get_ema_avg_fn(0.9)(a, c, n) for a, c in zip(theirs, current, strict=True)]
        else:
            reference(theirs, current, n)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_weight_follows_the_equations():
    assert EMA(decay=0.9).weight(Moment(1)) == 1 - 0.9
    warm = EMA(decay=0.99, warmup=True)
    for n in (1, 2, 50, 10_000):
        assert warm.weight(Moment(n)) == 1 - min(0.99, (1 + n) / (10 + n))
    assert [SWA().weight(Moment(n)) for n in (1, 2, 3)] == [1 / 2, 1 / 3, 1 / 4]


def test_swa_is_the_mean():
    averages = tensors(0, torch.float64)
    seen = [tensors(n, torch.float64) for n in range(5)]
    for n in range(1, 5):
        SWA().update_(averages, seen[n], Moment(n))
    for index, average in enumerate(averages):
        torch.testing.assert_close(average, torch.stack([tensors_[index] for tensors_ in seen]).mean(0))


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf, "0.9", None, True])
def test_decay_that_cannot_be(decay):
    with pytest.raises(ConfigError, match=r"decay=.*\[0, 1\]") as caught:
        EMA(decay=decay)
    assert repr(decay) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("steps", [0, -1, math.inf, math.nan, "x", True])
def test_half_life_that_cannot_be(steps):
    with pytest.raises(ConfigError, match="half-life"):
        EMA.from_half_life(steps)


def test_warmup_must_be_a_bool():
    with pytest.raises(ConfigError, match="warmup='yes'"):
        EMA(warmup="yes")


def test_custom_rule_needs_exactly_one_function():
    with pytest.raises(ConfigError, match="exactly one"):
        CustomRule()
    with pytest.raises(ConfigError, match="exactly one"):
        CustomRule(avg_fn=elementwise_product, multi_avg_fn=lambda a, c, n: None)
    with pytest.raises(ConfigError, match="callable"):
        CustomRule(avg_fn=3)


@pytest.mark.parametrize("result", [None, torch.zeros(2), 3.0])
def test_custom_rule_checks_what_the_function_returns(result):
    rule = CustomRule(avg_fn=lambda averaged, current, n: result)
    averages = [torch.ones(3)]
    with pytest.raises(ConfigError, match="avg_fn returned"):
        rule.update_(averages, [torch.zeros(3)], Moment(1))
    assert torch.equal(averages[0], torch.ones(3))


@pytest.mark.parametrize(
    "rule",
    [EMA(decay=0.5, warmup=True), SWA(), CustomRule(avg_fn=elementwise_product)],
    ids=lambda rule: type(rule).__name__,
)
def test_rules_are_plain_frozen_values(rule):
    """P08, P41: rules can be pickled, compared, and not changed."""
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(AttributeError):
        rule.decay = 0.1
    assert rule.settings()["kind"] == type(rule).__name__


def test_custom_rule_names_its_function():
    settings = CustomRule(avg_fn=elementwise_product).settings()
    assert settings["function"] == f"{__name__}:elementwise_product"
