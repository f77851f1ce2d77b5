"""Which of several sources is older, and which are one and the same.

A shell's glob gives step-100 before step-20, and a window over the last ones then ends in the middle of training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

from ...errors import CheckpointError, ConfigError
from ...files.safetensors_file import safetensors_of
from ...files.source import AbstractSource, slabs
from ...formats.open import StrPath
from ..progress import say


def order_of_steps(paths: Sequence[StrPath], sources: Sequence[AbstractSource], *, matters: bool) -> list[int]:
    """Indices of the sources, oldest first by the steps that they record; what differs from the order given is told.

    Where none records a step, as in other tools' files, by the updates that they count. If the order does not matter
    (and steps are lacking or the same): as given. If nothing is recorded: as given, which is told, unless numbers in
    the names say otherwise. Else `CheckpointError`.
    """
    what = "step" if any(isinstance(source.facts.get("step"), int) for source in sources) else "n_averaged"
    steps = [source.facts.get(what) for source in sources]
    known = [step for step in steps if isinstance(step, int)]
    names = [Path(path).name for path in paths]
    given = list(range(len(sources)))
    if len(set(known)) == len(sources):
        order = sorted(given, key=lambda index: known[index])
        if order != given:
            told = ", ".join(f"{names[i]} ({steps[i]})" for i in order)
            say(f"sources are taken in the order of their steps: {told}")
        return order
    if not matters:
        return given
    told = ", ".join(f"{name} ({step})" for name, step in zip(names, steps, strict=True))
    if known:
        wrong = f"some of these sources record no step, {told}" if len(known) < len(sources) else f"equal steps, {told}"
    elif _numbers_descend(paths):
        wrong = f"they record no steps, and the numbers in their names are in another order than they are, {names}"
    else:
        say(f"these sources record no steps, and are taken as they are given, oldest first: {', '.join(names)}")
        return given
    raise CheckpointError(
        f"which source is older cannot be told, and the weights depend on it: {wrong}. If they are given oldest first, "
        "say so with --as-given; or give --weights"
    )


def _numbers_descend(paths: Sequence[StrPath]) -> bool:
    """Whether paths that differ in their numbers only are not in the order of these."""
    parts = [re.split(r"(\d+)", os.path.normpath(path)) for path in paths]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return False
    numbers = [[int(digits) for digits in part[1::2]] for part in parts]
    return numbers != sorted(numbers)


def given_twice(paths: Sequence[StrPath], sources: Sequence[AbstractSource]) -> str | None:
    """Two sources that are the same, in words: one path, links to one place, or copies of one save; `None` if none are.

    However the paths are spelt: files are compared, also those that a folder stands for. Copies have the same step;
    their values are compared, of which different saves differ in the first already.
    """
    for (path, source), (other, another) in combinations(zip(paths, sources, strict=True), 2):
        if os.path.samefile(_file_of(path), _file_of(other)):
            return f"{str(path)!r} and {str(other)!r} are the same"
        step = source.facts.get("step")
        may_be_copies = isinstance(step, int) and step == another.facts.get("step") and source.infos == another.infos
        if may_be_copies and all(
            torch.equal(source.read(name, box), another.read(name, box))
            for name, info in source.infos.items()
            for box in slabs(info)
        ):
            return f"{str(path)!r} and {str(other)!r} hold the same values of the same step, {step}"
    return None


def _file_of(path: StrPath) -> Path:
    """The file that the tensors of a path are in, or the first of several; a folder of our own or of DCP is its own."""
    try:
        return next(iter(safetensors_of(Path(path))), Path(path))
    except ConfigError:  # a folder of several, of which an importer knows which one is meant
        return Path(path)
