"""The model that every engine gets, and slow averages of full tensors to compare with.

Awkward     a small model with everything that is easy to get wrong: odd sizes, ties, a scalar, buffers of all kinds
Formula     a rule, and the same formula written for one full tensor
Variant     arguments of one ShardedAverage that every engine is tested with, and its Formulas
Reference   averages of full tensors, kept without the package
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, exp, pi
from typing import Any

import torch
from torch import Tensor, nn

from sharded_avg import (
    EMA,
    LAWA,
    SWA,
    CosineMerge,
    CustomRule,
    PolynomialAverage,
    PowerAverage,
    ShardedAverage,
    decays,
)
from sharded_avg.rules.base import AbstractRule

SEVERAL = "several"


class Block(nn.Module):
    """A residual block of sizes 5 and 7; `wide` and `narrow` are what tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(5, 7)
        self.narrow = nn.Linear(7, 5, bias=False)
        self.scale = nn.Parameter(torch.tensor([0.9]))  # one element
        self.register_buffer("shift", torch.full((5,), 0.125))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.narrow(torch.tanh(self.wide(x))) + self.shift


class Low(nn.Module):
    """A bf16 module inside a model of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.to(torch.bfloat16))).to(x.dtype)


class Frozen(nn.Module):
    """Parameters that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.mix(x))


class Awkward(nn.Module):
    """Everything at once: (batch, 3) -> (batch, 5). `low`: a bf16 module is inside; `scalar`: a 0-d parameter is."""

    def __init__(self, *, low: bool, scalar: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.gain = nn.Parameter(torch.full(() if scalar else (1,), 1.25))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(5)
        self.frozen = Frozen()
        self.low = Low() if low else None
        self.back = nn.Linear(5, 3)
        self.again = nn.Linear(3, 5)
        self.again.weight = self.first.weight  # tied
        self.register_buffer("ramp", torch.linspace(-0.5, 0.5, 5))
        self.register_buffer("count", torch.tensor(1 << 40))  # no float32 holds this one plus one
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("none_yet", torch.zeros(0, 3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x * self.mask) * self.gain + self.ramp
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x + self.frozen(x)
        if self.low is not None:
            x = x + self.low(x)
        return self.again(self.back(x.to(self.back.weight.dtype)))  # fp32 buffers have widened it


def awkward(*, low: bool = True, scalar: bool = True) -> Awkward:
    """An Awkward with the same weights on every rank and at every call."""
    torch.manual_seed(5)
    return Awkward(low=low, scalar=scalar)


def batch(step: int, part: int = 0) -> Tensor:
    """Another one for each step and each part of the data."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1000 * part + step))


def clean(name: str) -> str:
    """The name without what wrappers add, found out here without the package."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


# --- the averages --------------------------------------------------------------------------------------------------


def three_to_one(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return average * 0.75 + live * 0.25


def three_to_one_(averaged: list[Tensor], live: list[Tensor], num_averaged: int) -> None:
    torch._foreach_mul_(averaged, 0.75)
    torch._foreach_add_(averaged, live, alpha=0.25)


def _three_to_one_full(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return average.mul(0.75).add(live, alpha=0.25)


def _ema(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return torch.lerp(average, live, 1 - 0.9)


def _ema_with_warmup(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return torch.lerp(average, live, 1 - min(0.9, (1 + num_averaged) / (10 + num_averaged)))


def _mean(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return torch.lerp(average, live, 1 / (num_averaged + 1))


def _half_life(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return torch.lerp(average, live, 1 - 2.0 ** (-1 / 3))


def _debiased(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return torch.lerp(average, live, 1 - (1 - (1 - 0.9) / (1 - 0.9 ** (num_averaged + 1))))


def _decayed(decay: Callable[[int], float]) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda average, live, num_averaged: torch.lerp(average, live, 1 - decay(num_averaged))


def _power(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return torch.lerp(average, live, 1 - (num_averaged / (num_averaged + 1)) ** 0.5)


def _polynomial(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    return torch.lerp(average, live, 3 / (num_averaged + 3))


def _cosine_merge(average: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    before, after = (0.5 * (1 + cos(pi * n / 7)) for n in (num_averaged, num_averaged + 1))
    return torch.lerp(average, live, (before - after) / (1 - after))


@dataclass(frozen=True)
class Formula:
    """A rule, and what it does to one full tensor: `full(average, live, updates so far)` is the next average."""

    rule: AbstractRule
    full: Callable[[Tensor, Tensor, int], Tensor] = _mean
    window: int = 0  # if there is one, the plain mean of so many latest weights, instead of `full`

    def __call__(self, average: Tensor, seen: list[Tensor], num_averaged: int) -> Tensor:
        """The next average; `seen` are all weights so far, the newest last."""
        if not self.window:
            return self.full(average, seen[-1], num_averaged)
        total = seen[-self.window :][0].clone()
        for live in seen[-self.window :][1:]:
            total += live
        return total / len(seen[-self.window :])


FORMULAS = {
    "ema": Formula(EMA(decay=0.9), _ema),
    "ema_warmup": Formula(EMA(decay=0.9, warmup=True), _ema_with_warmup),
    "swa": Formula(SWA(), _mean),
    "avg_fn": Formula(CustomRule(avg_fn=three_to_one), three_to_one),
    "lawa": Formula(LAWA(last=2), window=2),
    "half_life": Formula(EMA.from_half_life(3), _half_life),
    "debiased": Formula(EMA(decay=decays.Debiased(decay=0.9)), _debiased),
    "power": Formula(PowerAverage.merge_1_sqrt(), _power),
    "polynomial": Formula(PolynomialAverage(2), _polynomial),
    "cosine_merge": Formula(CosineMerge(7), _cosine_merge),
    "inverse_gamma": Formula(
        EMA(decay=decays.WarmupInverseGamma(power=0.75, max=0.75)),
        _decayed(lambda n: max(0.0, min(0.75, 1 - (1 + n) ** -0.75))),
    ),
    "exponential": Formula(
        EMA(decay=decays.WarmupExponential(decay=0.9, tau=3)), _decayed(lambda n: 0.9 * (1 - exp(-n / 3)))
    ),
    "cosine": Formula(
        EMA(decay=decays.Cosine(start=0.5, end=1, steps=7)),
        _decayed(lambda n: 1 + 0.5 * (0.5 - 1) * (1 + cos(pi * min(n, 7) / 7))),
    ),
    "linear": Formula(
        EMA(decay=decays.Linear(start=0.5, end=1, steps=7)), _decayed(lambda n: 0.5 + (1 - 0.5) * min(n, 7) / 7)
    ),
    "half_life_share": Formula(EMA(decay=decays.HalfLifeShare(share=0.5)), _decayed(lambda n: 2 ** (-1 / (0.5 * n)))),
    "multi_avg_fn": Formula(CustomRule(multi_avg_fn=three_to_one_), _three_to_one_full),
}


@dataclass(frozen=True)
class Variant:
    """One way to build a ShardedAverage: which Formulas, by name, and the other arguments."""

    formulas: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.formulas if len(self.formulas) > 1 else ("average",)

    def build(self, model: nn.Module) -> ShardedAverage:
        rules = {name: FORMULAS[name].rule for name in self.formulas}
        return ShardedAverage(model, rules if len(rules) > 1 else rules[self.formulas[0]], **self.arguments)


# Every kind of rule alone, in fp32; what differs between dtypes does not differ between rules, so those go with one
# rule. Rules that are a weight w(n) and no more go together.
WEIGHTED = ("half_life", "debiased", "power", "polynomial", "cosine_merge")
DECAYS = ("inverse_gamma", "exponential", "cosine", "linear", "half_life_share")
VARIANTS = {
    **{name: Variant((name,)) for name in FORMULAS if name not in (*WEIGHTED, *DECAYS)},
    "weighted": Variant((*WEIGHTED, *DECAYS)),
    SEVERAL: Variant(("ema", "swa")),
    "own_dtype": Variant(("ema",), {"dtype": None}),
    "float64": Variant(("ema",), {"dtype": torch.float64}),
}


class Reference:
    """What one Variant should come to. `own`: the dtype of a parameter, where `full` has its fp32 master."""

    def __init__(self, variant: Variant, own: torch.dtype | None) -> None:
        self._variant, self._own = variant, own
        self._dtype = variant.arguments.get("dtype", torch.float32)
        self._num_averaged = 0
        self._seen: dict[str, list[Tensor]] = {}
        self.averages: dict[str, dict[str, Tensor]] = {name: {} for name in variant.names}

    def update(self, full: Mapping[str, Tensor]) -> None:
        """Take in the full tensors of every trained parameter."""
        for key, tensor in full.items():
            live = tensor.detach().to(self._dtype or self._own or tensor.dtype, copy=True)
            self._seen.setdefault(key, []).append(live)
        for name, formula in zip(self._variant.names, self._variant.formulas, strict=True):
            for key in full:
                self._update(self.averages[name], key, FORMULAS[formula])
        self._num_averaged += 1

    def _update(self, averages: dict[str, Tensor], key: str, formula: Formula) -> None:
        seen = self._seen[key]
        averages[key] = formula(averages[key], seen, self._num_averaged) if self._num_averaged else seen[0]
