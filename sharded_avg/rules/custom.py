"""A function of the user's as a rule, with the signatures of torch.optim.swa_utils."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .base import AbstractRule, Moment

AvgFn = Callable[[Tensor, Tensor, int], Tensor]
MultiAvgFn = Callable[[list[Tensor], list[Tensor], int], None]


@dataclass(frozen=True, kw_only=True)
class CustomRule(AbstractRule):
    """The user's own elementwise function, with the signatures of torch.optim.swa_utils; give exactly one.

    avg_fn(averaged, current, num_averaged) -> new average, one piece at a time;
    multi_avg_fn(averaged_list, current_list, num_averaged) -> None, in place.

    `current` arrives in the average's dtype. Pass a function that can be imported (not a lambda or a closure) where
    the rule has to be pickled. Raises `ConfigError` if neither or both are given.
    """

    avg_fn: AvgFn | None = None
    multi_avg_fn: MultiAvgFn | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("avg_fn", "multi_avg_fn") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"CustomRule needs exactly one of avg_fn and multi_avg_fn; got {given or 'neither'}")
        if not callable(getattr(self, given[0])):
            raise ConfigError(f"CustomRule({given[0]}={getattr(self, given[0])!r}): must be callable")

    def update_(self, averaged: Sequence[Tensor], current: Sequence[Tensor], at: Moment) -> None:
        """Call `multi_avg_fn` once for all pieces, or `avg_fn` for each, whose result is copied into the average.

        Raises `ConfigError` if `avg_fn` returns anything but a tensor of the piece's shape.
        """
        if self.multi_avg_fn is not None:
            self.multi_avg_fn(list(averaged), list(current), at.num_averaged)
        elif self.avg_fn is not None:
            for average, live in zip(averaged, current, strict=True):
                average.copy_(self._checked(self.avg_fn(average, live, at.num_averaged), average))

    @staticmethod
    def _checked(result: object, average: Tensor) -> Tensor:
        if not isinstance(result, Tensor) or result.shape != average.shape:
            what = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise ConfigError(
                f"avg_fn returned {what} for a piece of shape {tuple(average.shape)}; it must return the new average "
                "of that piece, elementwise"
            )
        return result

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind, and the module and name of the function."""
        fn = self.avg_fn if self.avg_fn is not None else self.multi_avg_fn
        where = f"{getattr(fn, '__module__', '?')}:{getattr(fn, '__qualname__', type(fn).__qualname__)}"
        return {"kind": "CustomRule", "function": where}
