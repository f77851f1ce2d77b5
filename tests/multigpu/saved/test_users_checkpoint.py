"""An average in a state dict of the user's, which torch.distributed.checkpoint saves while training goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.torch_version import TorchVersion

from sharded_avg import EMA, CheckpointError, ShardedAverage
from tests.helpers.engines import Engine, Row, one_size, run_row


def averaged(average: ShardedAverage, engine: Engine) -> dict[str, Tensor]:
    """Without what is not averaged, which is live."""
    trained = engine.full()
    with average.summon_full_params(rank0_only=False) as full:
        return {name: full[name].clone() for name in trained}


def check_async_save(row: Row, path: Path) -> None:
    engine = row.start()
    average = ShardedAverage(engine.model, EMA(decay=0.5))
    engine.learn_steps(0, 2)
    average.update()
    expected = averaged(average, engine)
    alone = dist.new_group()  # its thread communicates while training does
    if TorchVersion(torch.__version__) < (2, 9) and any(not value.ndim for value in expected.values()):
        with pytest.raises(CheckpointError, match=r"call average\.async_save\(folder\)"):
            dcp.async_save({"average": average}, checkpoint_id=path, process_group=alone)
        return
    pending = dcp.async_save({"average": average}, checkpoint_id=path, process_group=alone)
    engine.learn_steps(2, 4)
    average.update()
    pending.result()
    assert not all(torch.equal(value, expected[name]) for name, value in averaged(average, engine).items())
    dcp.load({"average": average}, checkpoint_id=path)
    found = averaged(average, engine)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert average.n_averaged == 1


@pytest.mark.filterwarnings("ignore:Multiple backends are registered")
@one_size
def test_what_is_saved_is_of_the_moment_of_the_call(row: str, world_size: int, tmp_path: Path) -> None:
    run_row(row, world_size, partial(check_async_save, path=tmp_path / "checkpoint"))
