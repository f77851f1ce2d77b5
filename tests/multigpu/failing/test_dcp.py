"""A user's own dcp.save and dcp.load, where the average's part of it cannot be made on one rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import SWA, ShardedAverage
from sharded_avg.averages.state import State
from tests.helpers.pool import on_ranks


@on_ranks(2)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_part_that_cannot_be_made(error: type[BaseException], tmp_path: Path):
    """All ranks raise within seconds, and the same calls succeed afterwards."""
    average = ShardedAverage(DistributedDataParallel(nn.Linear(3, 5)), SWA())
    average.update()
    mine, look = dist.get_rank() == 1, State.look

    def fail(state: State, **options: Any) -> None:
        if mine:
            raise error("here")
        look(state, **options)

    began = time.monotonic()
    with mock.patch.object(State, "look", fail):
        with pytest.raises(CheckpointException, match=error.__name__):
            dcp.save({"average": average}, checkpoint_id=tmp_path / "failed")
        if mine:  # outside of DCP, it is raised at once
            with pytest.raises(error, match="here"):
                average.state_dict()
    assert time.monotonic() - began < 20
    dcp.save({"average": average}, checkpoint_id=tmp_path / "whole")
    with mock.patch.object(State, "look", fail), pytest.raises(CheckpointException, match=error.__name__):
        dcp.load({"average": average}, checkpoint_id=tmp_path / "whole")
    dcp.load({"average": average}, checkpoint_id=tmp_path / "whole")
    assert average.n_averaged == 1
