"""Values that are computed or rounded while they are read, and what does not fit is refused before it has a name.

    AbstractRounded  a source that rounds when it is read; raises for infinities and NaN
    Cast             a source with its floating-point tensors in another dtype

A float16 ends at 65504, and an average in float32 may hold more: rounding gives an infinity, and a model of infinities
is noticed late; torch's rounding to float8_e4m3fn ends at 448 without a word, since the format has no infinity. So
every slab is looked at when it is handed out. At the first with a value that is lost the whole source is looked
through, a slab at a time, and the error names every such tensor; whoever was writing gives up.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..shard import Box
from .source import AbstractSource, TensorInfo, is_extra, slabs

_MOST_NAMED = 10


class AbstractRounded(AbstractSource):
    """A source whose values are `exact(name, box)`, rounded to the dtype of `infos`.

    Raises `CheckpointError` for NaN, and for values beyond what the dtype holds, unless `allow_nonfinite`. Infinities
    that are `meant`, such as those of a mask, stay; `infinite` lists the tensors with such.
    """

    def __init__(self, *, allow_nonfinite: bool) -> None:
        self._allow_nonfinite = allow_nonfinite
        self.infinite: dict[str, None] = {}

    @abstractmethod
    def exact(self, name: str, box: Box | None = None) -> Tensor:
        """The values before they are rounded."""

    def meant(self, name: str, box: Box | None, exact: Tensor) -> Tensor:
        """Which of the values before they are rounded are infinite, and should be."""
        return torch.isinf(_wide(exact))

    def origin(self, name: str, box: Box) -> str:
        """Where values that are not finite before they are rounded come from."""
        return "it is so in the source"

    def read(self, name: str, box: Box | None = None) -> Tensor:
        exact = self.exact(name, box)
        rounded = exact.to(self.infos[name].dtype)
        if self._allow_nonfinite or not is_real(rounded.dtype):
            return rounded
        if _doubtful(exact, rounded).any():
            if self._lost(name, box, exact, rounded).any():
                raise CheckpointError(self._lost_in_all())
            self.infinite[name] = None
        return rounded

    def _lost(self, name: str, box: Box | None, exact: Tensor, rounded: Tensor) -> Tensor:
        """Where a rounded value is neither near to what it was, nor the infinity that it should be."""
        doubtful = _doubtful(exact, rounded)
        if not doubtful.any():
            return doubtful
        return doubtful & ~(self.meant(name, box, exact) & torch.isinf(_wide(rounded)))

    def _lost_in_all(self) -> str:
        """What is wrong with which tensors, in words."""
        told = []
        aliases = self.facts.get("aliases", {})
        for name, info in self.infos.items():
            if name not in aliases and is_real(info.dtype):
                problem = self._lost_in(name, info)
                told += [f"{name!r} {problem}"] if problem else []
        named = "; ".join(told[:_MOST_NAMED])
        more = f"; and {len(told) - _MOST_NAMED} more tensors" if len(told) > _MOST_NAMED else ""
        return (
            f"{len(told)} of {len(self.infos)} tensors would not be finite, or be cut off: {named}{more}. "
            "Nothing was written. Choose a wider dtype (--dtype), leave out the source that is not finite, or pass "
            "--allow-nonfinite to write infinities and NaN"
        )

    def _lost_in(self, name: str, info: TensorInfo) -> str:
        count, largest, origin = 0, 0.0, ""
        for box in slabs(info):
            exact = self.exact(name, box)
            lost = self._lost(name, box, exact, exact.to(info.dtype))
            if lost.any():
                count += int(lost.sum())
                finite = torch.isfinite(_wide(exact))
                magnitudes = _wide(exact).abs().double()[lost & finite]
                largest = max(largest, float(magnitudes.max())) if magnitudes.numel() else largest
                if not origin and not finite[lost].all():
                    origin = self.origin(name, box)
        reasons = [f"{count} of {torch.Size(info.shape).numel()} values"] if count else []
        if largest:
            end = torch.finfo(info.dtype).max
            reasons.append(
                f"the largest is {largest:.6g}, and {str(info.dtype).removeprefix('torch.')} ends at {end:.6g}"
            )
        return f"({', '.join([*reasons, origin] if origin else reasons)})" if count else ""


def is_real(dtype: torch.dtype) -> bool:
    """Whether values of a dtype can be infinite or NaN."""
    return dtype.is_floating_point or dtype.is_complex


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize == 1 else values  # float8 has no arithmetic


def _doubtful(exact: Tensor, rounded: Tensor) -> Tensor:
    """Where a rounded value is not finite, or ends at the largest that a float8 has."""
    doubtful = ~torch.isfinite(_wide(rounded))
    if rounded.dtype.itemsize == 1 and exact.dtype != rounded.dtype:
        doubtful |= _wide(exact).abs() > _end(rounded.dtype)
    return doubtful


def _end(dtype: torch.dtype) -> float:
    """What is larger is not rounded to the largest value, but cut: half a step above it."""
    info = torch.finfo(dtype)
    return float(info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2)


class Cast(AbstractRounded):
    """The tensors of `source`, the floating-point ones rounded to `dtype`; all as they are if it is `None`.

    Modules' extra state means something to the module alone, and stays as it is.
    """

    def __init__(self, source: AbstractSource, dtype: torch.dtype | None, *, allow_nonfinite: bool = False) -> None:
        super().__init__(allow_nonfinite=allow_nonfinite)
        self._source = source
        self.extra, self.facts = source.extra, source.facts
        self.infos = {
            name: TensorInfo(info.shape, dtype)
            if dtype is not None and info.dtype.is_floating_point and not is_extra(name)
            else info
            for name, info in source.infos.items()
        }

    def exact(self, name: str, box: Box | None = None) -> Tensor:
        return self._source.read(name, box)
