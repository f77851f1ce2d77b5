"""Weighted sums of saved weights.

uniform, given, window, wsm  the weight of each source, oldest first
WeightedSum                  the sum, as a source: computed when it is read, a piece at a time
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files.source import AbstractSource, TensorInfo
from ..shard import Box

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


class WeightedSum(AbstractSource):
    """sum of weight_i * source_i for floating-point tensors; others are those of the last source.

    The sum is in `accumulate` (float64 or float32) and rounded once, to the widest dtype that the sources have for the
    tensor. Sources with weight 0 are not read. Raises `CheckpointError` if names or shapes differ.
    """

    def __init__(
        self, sources: Sequence[AbstractSource], weights: Sequence[float], *, accumulate: torch.dtype = torch.float64
    ) -> None:
        if len(sources) != len(weights) or not sources:
            raise ConfigError(f"{len(weights)} weights for {len(sources)} sources: give one for each")
        for number, source in enumerate(sources[1:], start=2):
            _refuse_misfits(sources[0].infos, source.infos, number)
        self._terms = [(w, s) for w, s in zip(weights, sources, strict=True) if w]
        self._last = sources[-1]
        self._accumulate = accumulate
        self.infos = {name: _sum_info([s.infos[name] for s in sources], name) for name in sources[0].infos}
        self.facts = {"format": "merge", "aliases": sources[0].facts.get("aliases", {})}
        self.extra = sources[-1].extra

    def read(self, name: str, box: Box | None = None) -> Tensor:
        dtype = self.infos[name].dtype
        if not _is_summed(dtype):
            return self._last.read(name, box)
        wide = torch.promote_types(self._accumulate, torch.complex64) if dtype.is_complex else self._accumulate
        total: Tensor | None = None
        for weight, source in self._terms:
            values = source.read(name, box).to(wide)
            total = values.mul_(weight) if total is None else total.add_(values, alpha=weight)
        if total is None:
            raise ConfigError("every weight is 0, so there is nothing to sum")
        return total.to(dtype)


def _is_summed(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _refuse_misfits(first: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], number: int) -> None:
    """Raise `CheckpointError` if names or shapes differ, listing some of them."""
    problems = {
        "it lacks": [name for name in first if name not in other],
        "the first lacks": [name for name in other if name not in first],
        "shapes differ": [
            f"{name}: {info.shape} and {other[name].shape}"
            for name, info in first.items()
            if name in other and other[name].shape != info.shape
        ],
    }
    told = "; ".join(
        f"{what} {names[:10]}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        for what, names in problems.items()
        if names
    )
    if told:
        raise CheckpointError(f"source {number} does not fit the first: {told}. Nothing was written")


def _sum_info(infos: Sequence[TensorInfo], name: str) -> TensorInfo:
    """The shape of all, and the widest dtype."""
    dtype = infos[0].dtype
    for info in infos[1:]:
        if _is_summed(info.dtype) != _is_summed(dtype):
            raise CheckpointError(f"{name!r} is {dtype} in one source and {info.dtype} in another: cannot be summed")
        try:
            dtype = torch.promote_types(dtype, info.dtype)
        except RuntimeError:  # float8 and bfloat16 do not promote to each other; float32 holds all of them
            dtype = torch.float32
    return TensorInfo(infos[0].shape, dtype)
