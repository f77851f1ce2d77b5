"""Files that somebody made to harm, or that came to harm: what the tests of this folder make them with."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sharded_avg
from sharded_avg import SWA, CheckpointError, ShardedAverage


class Payload:
    """Unpickling this makes a file: with os.system, eval, a constructor, or a change of what is there."""

    def __init__(self, canary: Path, how: str) -> None:
        self.canary, self.how = canary, how

    def __reduce__(self) -> Any:
        code = f"open({str(self.canary)!r}, 'w').close()"
        calls: dict[str, Any] = {
            "os.system": (os.system, (f"touch {self.canary}",)),
            "eval": (eval, (code,)),
            "Path.touch": (Path.touch, (self.canary,)),
            "open": (open, (str(self.canary), "w")),
        }
        return calls[self.how]


def make(folder: Path) -> Path:
    """A saved average of five odd-sized tensors, one of them empty, one of one element, one tied."""
    torch.manual_seed(0)
    net = nn.Module()
    for name, shape in {"a": (5, 3), "b": (7,), "c": (1,), "d": (0, 3)}.items():
        net.register_parameter(name, nn.Parameter(torch.randn(shape)))
    net.e = net.a
    average = ShardedAverage(net, SWA())
    average.update()
    average.save(folder)
    return folder


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match):
        sharded_avg.load_averaged_state_dict(path)


def reindex(folder: Path, change: Callable[[Any], None]) -> None:
    """Change DCP's own index, which the test may unpickle because it made it."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def place_of(index: Any, fqn: str) -> Any:
    return next(place for key, place in index.storage_data.items() if key.fqn == fqn)
