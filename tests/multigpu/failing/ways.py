"""Ways in which one rank's call can be another than the others', or fail, and the calls that each of them is tried on.

A Way changes the Request of the rank that is to fail, and hands what undoes it to the stack.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_avg.averages.state import swapped_models
from sharded_avg.weights.aside import RawWeights

from .calls import Request

Change = Callable[[Request, ExitStack], None]


class OfTheUserError(Exception):
    """What code of the user's raises."""


@dataclass(frozen=True)
class Way:
    """`own`: what the rank itself raises, or `None` where it only differs from the others and is told so."""

    calls: tuple[str, ...]
    change: Change
    own: str | None = None


def _raise(*_: Any, **__: Any) -> Any:
    raise OfTheUserError("of the test")


def _with(**values: Any) -> Change:
    """Another attribute of the request."""

    def change(request: Request, _: ExitStack) -> None:
        for name, value in values.items():
            setattr(request, name, value)

    return change


def _options(**options: Any) -> Change:
    return lambda request, _: request.options.update(options)


def _left(make: Callable[[Tensor], Any]) -> Change:
    """What the user's code leaves in the dict that is to be written back, where it gets one."""

    def change(request: Request, _: ExitStack) -> None:
        request.is_reached = False

        def edit(full: dict[str, Any]) -> None:
            for name in [name for name in full if "narrow" in name]:
                full[name] = make(full[name])
                request.is_reached = True

        request.edit = edit

    return change


def _disk(owner: Any, name: str) -> Change:
    """What is asked of the file system fails; `request.is_reached` says whether it was asked on this rank."""

    def change(request: Request, undo: ExitStack) -> None:
        def full(*_: Any, **__: Any) -> Any:
            request.is_reached = True
            raise OSError(28, "No space left on device")

        request.is_reached = False
        undo.enter_context(pytest.MonkeyPatch.context()).setattr(owner, name, full)

    return change


def _emptied(request: Request, _: ExitStack) -> None:
    request.given = RawWeights(request.given.average, {})


def _fewer(request: Request, _: ExitStack) -> None:
    values = request.given.values
    request.given = RawWeights(request.given.average, {name: values[name] for name in list(values)[1:]})


def _second_raises(request: Request, _: ExitStack) -> None:
    first, *others = request.batches
    request.batches = (batch if index == 0 else _raise() for index, batch in enumerate([first, *others]))


def _not_started(request: Request, _: ExitStack) -> None:
    request.average = request.subject.another()


def _another_not_started(request: Request, _: ExitStack) -> None:
    request.given = request.subject.another()


def _still_swapped(request: Request, undo: ExitStack) -> None:
    model = request.average._state.layout.model
    swapped_models.add(model)
    undo.callback(swapped_models.discard, model)


def _another_count(request: Request, undo: ExitStack) -> None:
    kept = request.subject.kept()
    request.average.update(unscheduled=True)
    undo.callback(request.subject.put_back, kept)


def _other_names(request: Request, _: ExitStack) -> None:
    request.average = request.subject.another(include=lambda name, tensor: tensor.requires_grad and "back" not in name)
    for _step in range(3):
        request.average.update()


def _frozen(request: Request, undo: ExitStack) -> None:
    """A parameter that this rank alone takes for frozen: the average is built after that."""
    params = [param for name, param in request.model.named_parameters() if "back" in name]
    request.is_reached = any(param.requires_grad for param in params)  # FSDP1 may have flat parameters alone
    for param in params:
        if param.requires_grad:
            param.requires_grad_(False)
            undo.callback(param.requires_grad_, True)
    request.average = request.subject.another()
    for _step in range(3):
        request.average.update()


NAMED = ("swapped", "distance", "raw_weights", "copy_to_model", "summon", "writeback")
COUNTED = (*NAMED, "summon on all", "save", "save with buffers", "async_save")
AVERAGES = (*COUNTED, "load", "take_from")
NOT_SWAPPED = (
    "swapped",
    "distance",
    "raw_weights",
    "copy_to_model",
    "restore_raw",
    "writeback",
    "load",
    "take_from",
    "load_posthoc",
)
WRITTEN = ("writeback", "writeback from all")
PATHS = ("save", "save with buffers", "async_save", "load", "load what fits", "load_posthoc")
SAVES = ("save", "save with buffers", "async_save")

WAYS = {
    "asked": {
        "an unknown name": Way((*NAMED, "load_posthoc"), _with(name="nobody"), "ConfigError"),
        "a name of another type": Way((*NAMED, "load_posthoc"), _with(name=["average"])),
        "no path": Way(PATHS, _with(path=None)),
        "a path of another type": Way(PATHS, _with(path=[3])),
        "a path that cannot be": Way(PATHS, _with(path="/tmp/a\0b")),
        "a path below a file": Way(PATHS, _with(path="/etc/hostname/x")),
        "a path of no known kind": Way(PATHS, _with(path="nosuch://x/y")),
        "another path": Way(PATHS, lambda request, _: setattr(request, "path", f"{request.path}_other")),
        "another rank0_only": Way(("summon",), _options(rank0_only=False)),
        "another writeback": Way(("summon",), _options(writeback=True)),
        "another with_buffers": Way(("save",), _options(with_buffers=True)),
        "another width": Way(("load_posthoc",), _options(sigma_rel=0.15)),
        "a width that there is not": Way(("load_posthoc",), _options(sigma_rel="wide")),
        "another strict": Way(("load",), _options(strict=False)),
        "no raw weights": Way(("restore_raw",), _with(given=None)),
        "raw weights of another type": Way(("copy_to_model", "restore_raw"), _with(given="raw")),
        "emptied raw weights": Way(("restore_raw",), _emptied, "ConfigError"),
        "fewer raw weights": Way(("restore_raw",), _fewer),
        "no other average": Way(("take_from",), _with(given=None)),
    },
    "averages": {
        "not started": Way(NAMED, _not_started),
        "still swapped": Way(NOT_SWAPPED, _still_swapped, "SwapError"),
        "another count": Way(COUNTED, _another_count),
        "another that has not started": Way(("take_from",), _another_not_started),
        "other names": Way(AVERAGES, _other_names),
        "other parameters frozen": Way(("swapped", "summon", "distance"), _frozen),
    },
    "left": {
        "meta": Way(WRITTEN, _left(lambda tensor: tensor.to("meta"))),
        "sparse": Way(WRITTEN, _left(lambda tensor: tensor.to_sparse())),
        "complex": Way(WRITTEN, _left(lambda tensor: tensor.to(torch.complex64))),
        "another shape": Way(WRITTEN, _left(lambda tensor: tensor[:1].clone())),
        "none": Way(WRITTEN, _left(lambda tensor: None)),
        "uninitialized": Way(WRITTEN, _left(lambda tensor: nn.UninitializedParameter())),
    },
    "user": {
        "the block raises": Way(("swapped", "writeback", "writeback from all"), _with(inside=_raise, edit=_raise)),
        "batches raise": Way(("refreshed_batch_norm",), lambda r, _: setattr(r, "batches", map(_raise, [1]))),
        "the second batch raises": Way(("refreshed_batch_norm",), _second_raises),
        "no batches": Way(("refreshed_batch_norm",), _with(batches=[])),
        "no model": Way(("refreshed_batch_norm", "averaged_buffers"), _with(model=None)),
        "another model": Way(("averaged_buffers",), _with(model=nn.BatchNorm1d(3))),
    },
    "disk": {
        "open": Way(SAVES, _disk(builtins, "open")),
        "mkdir": Way(SAVES, _disk(os, "mkdir")),
        "fsync": Way(SAVES, _disk(os, "fsync")),
        "replace": Way(SAVES, _disk(os, "replace")),
        "rename": Way(SAVES, _disk(os, "rename")),
        "listdir": Way(("save", "load"), _disk(os, "listdir")),
    },
}
