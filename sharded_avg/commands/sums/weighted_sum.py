"""Weighted sums of saved weights.

uniform, given, window, wsm  the weight of each source, oldest first
WeightedSum                  the sum, as a source: computed when it is read, a piece at a time
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...files.rounded import AbstractRounded, is_real
from ...files.source import AbstractSource, TensorInfo, is_extra
from ...shard import Box
from ..target import some_of

WSM_SHAPES: dict[str, Callable[[float], float]] = {"linear": lambda x: 1 - x, "1-sqrt": lambda x: 1 - math.sqrt(x)}


def uniform(num_sources: int) -> list[float]:
    """1/k each: the mean, as in stochastic weight averaging (Izmailov et al. 2018)."""
    return [1 / num_sources] * num_sources


def given(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum, so that they are an average. Raises `ConfigError` if that cannot be."""
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or not math.isfinite(total) or total == 0:
        raise ConfigError(f"weights {list(weights)}: they must be finite numbers whose sum is not 0")
    return [weight / total for weight in weights]


def window(num_sources: int, last: int) -> list[float]:
    """LAWA: a = (1/k) sum of the last k snapshots (Kaddour, "Stop Wasting My Time!", 2022); 0 for earlier ones."""
    if not 1 <= last <= num_sources:
        raise ConfigError(f"a window of {last} over {num_sources} sources: it must be between 1 and {num_sources}")
    return [0.0] * (num_sources - last) + uniform(last)


def wsm(num_sources: int, shape: str) -> list[float]:
    """Merging that stands in for a decay of the learning rate (WSM, arXiv 2507.17634), oldest first.

    With k sources and a decay shape f, w_i = f(i/k) for i = 0..k-1 is the share that gradients between sources i-1
    and i keep. Then c_i = w_i - w_{i+1}, c_{k-1} = w_{k-1}, and c_0 = 1 - sum of the others.
    f is "linear", 1 - x (which gives the uniform mean), or "1-sqrt", 1 - sqrt(x).
    """
    if shape not in WSM_SHAPES:
        raise ConfigError(f"shape={shape!r}: must be one of {list(WSM_SHAPES)}")
    kept = [WSM_SHAPES[shape](i / num_sources) for i in range(num_sources)] + [0.0]
    coefficients = [here - after for here, after in pairwise(kept)]
    return [1 - math.fsum(coefficients[1:]), *coefficients[1:]]


class WeightedSum(AbstractRounded):
    """sum of weight_i * source_i for floating-point tensors; others, and modules' extra state, are the last source's.

    The sum is in `accumulate` (float64 or float32) and rounded once, to `dtype` or to the widest that the sources
    have for the tensor. Sources with weight 0 are not read. A value that is the same infinity in every source stays
    what it is, as in a mask; one that is infinite in some of them only has diverged there. Raises `CheckpointError`
    if names differ, or shapes of what is summed, and as AbstractRounded.
    """

    def __init__(
        self,
        sources: Sequence[AbstractSource],
        weights: Sequence[float],
        *,
        accumulate: torch.dtype = torch.float64,
        dtype: torch.dtype | None = None,
        allow_nonfinite: bool = False,
        summed: Container[str] | None = None,
    ) -> None:
        """`summed`: names of what is summed, where not all that is floating-point is."""
        super().__init__(allow_nonfinite=allow_nonfinite)
        if len(sources) != len(weights) or not sources:
            raise ConfigError(f"{len(weights)} weights for {len(sources)} sources: give one for each")
        if not any(weights):
            raise ConfigError("every weight is 0, so there is nothing to sum")
        self._summed = {
            name
            for source in sources
            for name, info in source.infos.items()
            if is_real(info.dtype) and not is_extra(name) and (summed is None or name in summed)
        }
        for number, source in enumerate(sources[1:], start=2):
            self._refuse_misfits(sources[0].infos, source.infos, number)
        self._terms = [(w, s) for w, s in zip(weights, sources, strict=True) if w]
        self._numbers = [number for number, weight in enumerate(weights, start=1) if weight]
        self._last = sources[-1]
        self._accumulate = accumulate
        self.extra = self._last.extra
        self.infos = {
            name: _sum_info([source.infos[name] for source in sources], dtype)
            if name in self._summed
            else _sum_info([info], dtype if info.dtype.is_floating_point and not is_extra(name) else None)
            for name, info in self._last.infos.items()
        }
        self.facts = {"format": "merge", "aliases": sources[0].facts.get("aliases", {})}

    def exact(self, name: str, box: Box | None = None) -> Tensor:
        if name not in self._summed:
            return self._last.read(name, box)
        wide = self._wide(name)
        (weight, first), *rest = self._terms
        total = first.read(name, box).to(wide).mul_(weight)
        for weight, source in rest:
            total.add_(source.read(name, box).to(wide), alpha=weight)
        if not torch.isfinite(total).all():
            total = torch.where(self.meant(name, box, total), first.read(name, box).to(wide), total)
        return total

    def _wide(self, name: str) -> torch.dtype:
        is_complex = self.infos[name].dtype.is_complex
        return torch.promote_types(self._accumulate, torch.complex64) if is_complex else self._accumulate

    def meant(self, name: str, box: Box | None, exact: Tensor) -> Tensor:
        if name not in self._summed:
            return super().meant(name, box, exact)
        (_, source), *rest = self._terms
        first = source.read(name, box).to(self._wide(name))
        same = torch.isinf(first)
        for _, source in rest:
            same &= source.read(name, box).to(self._wide(name)) == first
        return same

    def origin(self, name: str, box: Box) -> str:
        for number, (_, source) in zip(self._numbers, self._terms, strict=True):
            values = source.read(name, box)
            if not torch.isfinite(values.float() if values.dtype.itemsize == 1 else values).all():
                return f"it is so in source {number}"
        return f"the sum is too large for {str(self._accumulate).removeprefix('torch.')}"

    def _refuse_misfits(self, first: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], number: int) -> None:
        """Raise `CheckpointError` if names, or shapes of what is summed, differ, listing some of them."""
        both = {name: (first[name], other[name]) for name in first if name in other and name in self._summed}
        problems = {
            "it lacks": [name for name in first if name not in other and not is_extra(name)],
            "the first lacks": [name for name in other if name not in first and not is_extra(name)],
            "shapes differ": [
                f"{name}: {a.shape} and {b.shape}" for name, (a, b) in both.items() if a.shape != b.shape
            ],
            "it cannot be summed": [
                f"{name}: {a.dtype} and {b.dtype}"
                for name, (a, b) in both.items()
                if is_real(a.dtype) != is_real(b.dtype)
            ],
        }
        told = "; ".join(f"{what} {some_of(names)}" for what, names in problems.items() if names)
        if told:
            raise CheckpointError(f"source {number} does not fit the first: {told}. Nothing was written")


def _sum_info(infos: Sequence[TensorInfo], dtype: torch.dtype | None) -> TensorInfo:
    """The shape of all, and `dtype` or the widest that they have; complex stays complex."""
    widest = infos[0].dtype
    for info in infos[1:]:
        try:
            widest = torch.promote_types(widest, info.dtype)
        except RuntimeError:  # float8 and bfloat16 do not promote to each other; float32 holds all of them
            widest = torch.float32
    return TensorInfo(infos[0].shape, widest if dtype is None or widest.is_complex else dtype)
