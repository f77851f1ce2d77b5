"""Whether a saved average fits, told before anything is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch

from ..errors import CheckpointError
from .manifest import Manifest, TensorRecord


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What `ShardedAverage.load` did. Everything is empty where all of it fitted.

    `missing_*` is in the model's average and not in the file; `unexpected_*` the other way round; `misfits` names
    parameters of another shape or a wider dtype, with the reason.
    """

    missing_averages: list[str] = field(default_factory=list)
    unexpected_averages: list[str] = field(default_factory=list)
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(self._problems()) or "all of it was loaded"

    def _problems(self, also_elsewhere: bool = True) -> Iterator[str]:
        for what, names in (
            ("averages missing from it", self.missing_averages),
            ("averages that it has and the model lacks", self.unexpected_averages),
            ("parameters missing from it", self.missing_keys),
            ("parameters that it has and the model's average lacks", self.unexpected_keys if also_elsewhere else []),
        ):
            if names:
                yield f"{what}: {names}"
        for name, reason in self.misfits.items():
            yield f"parameter {name!r} {reason}"

    def require_all(self, *, whole: bool = True) -> None:
        """Raise `CheckpointError` unless everything fits; if not `whole`, the file may have more than is asked for."""
        problems = list(self._problems(whole))
        if problems:
            raise CheckpointError(
                f"the saved average does not fit: {'; '.join(problems)}. Nothing was changed; strict=False loads what "
                "fits"
            )


def compare(saved: Manifest, mine: Manifest, known: Collection[str] = ()) -> LoadResult:
    """What of `saved` fits an object that would save `mine`. `known`: names that other ranks have, none unexpected."""
    return LoadResult(
        missing_averages=[name for name in mine.averages if name not in saved.averages],
        unexpected_averages=[name for name in saved.averages if name not in mine.averages],
        missing_keys=[name for name in mine.tensors if name not in saved.tensors],
        unexpected_keys=[name for name in saved.tensors if name not in mine.tensors and name not in known],
        misfits={
            name: reason
            for name, record in mine.tensors.items()
            if name in saved.tensors and (reason := _misfit(saved.tensors[name], record))
        },
    )


def _misfit(saved: TensorRecord, mine: TensorRecord) -> str:
    if list(saved.shape) != list(mine.shape):
        return f"has shape {saved.shape} in it and {mine.shape} here"
    found, kept = getattr(torch, saved.dtype, None), getattr(torch, mine.dtype)
    if not isinstance(found, torch.dtype):
        return f"has the unknown dtype {saved.dtype!r} in it"
    if torch.promote_types(found, kept) != kept:
        return f"is stored as {saved.dtype} and would be rounded to {mine.dtype}: build with dtype=torch.{saved.dtype}"
    return ""
