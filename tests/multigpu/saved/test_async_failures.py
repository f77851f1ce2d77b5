"""A save that fails on one rank, in whatever part of it: all ranks raise within seconds, and the next save succeeds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import EMA, CheckpointError, ConfigError, PeerError, ShardedAverage, load_averaged_state_dict
from sharded_avg.saved.folder import saving
from tests.helpers.pool import on_ranks

SOON_S = 15.0


def started() -> ShardedAverage:
    torch.manual_seed(0)
    average = ShardedAverage(DistributedDataParallel(nn.Linear(3, 7)), EMA(decay=0.5))
    average.update()
    return average


def fails(average: ShardedAverage, path: Path, patch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    """One save of the kind that `where` names, which on the last rank meets `error` there."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if dist.get_rank() == dist.get_world_size() - 1:
        places = {
            "collecting": (type(average._checkpoints), "_part"),
            "staging": (saving.Saving, "detach"),
            "writing": (saving, "write_pieces"),
            "waiting": (saving.PendingSave, "wait"),
        }
        patch.setattr(*places[where], fail)
    average.async_save(path).result()


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", [OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["collecting", "staging", "writing", "waiting"])
def test_an_asynchronous_save_fails_on_all_ranks(tmp_path, where, kind):
    """P88: also Ctrl-C. What failed is told once: the next save is a new one."""
    if (where, kind) == ("writing", KeyboardInterrupt):
        pytest.skip("Ctrl-C comes to the main thread, and writing is another's")
    average = started()
    average.save(tmp_path / "run")
    before = (tmp_path / "run" / "manifest.json").read_text()
    average.update()
    is_last = dist.get_rank() == dist.get_world_size() - 1
    expected = CheckpointError if where == "writing" else kind if is_last else PeerError
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(expected):
        fails(average, tmp_path / "run", patch, where, kind("of this test"))
    assert time.monotonic() - begin < SOON_S
    dist.barrier()
    assert (tmp_path / "run" / "manifest.json").read_text() == before
    average.save(tmp_path / "run")
    pending = average.async_save(tmp_path / "next")
    pending.result()
    pending.result()
    dist.barrier()
    for name in ("run", "next"):
        assert load_averaged_state_dict(tmp_path / name).keys() == {"weight", "bias"}


@on_ranks(2)
def test_a_failure_that_nobody_asked_for_is_told_by_the_next_save(tmp_path):
    average = started()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(saving, "write_pieces", lambda *_: 1 / 0)
        average.async_save(tmp_path / "run")
        average._checkpoints._pending.wait()
    with pytest.raises(CheckpointError, match="rank 1: ZeroDivisionError"):
        average.save(tmp_path / "run")
    average.save(tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").exists()


@on_ranks(2)
def test_ranks_that_ask_for_different_things(tmp_path):
    """Another path, or none that can be one."""
    average = started()
    with pytest.raises(ConfigError, match="different places"):
        average.save(tmp_path / str(dist.get_rank()))
    with pytest.raises(ConfigError if dist.get_rank() else PeerError):
        average.save(3 if dist.get_rank() else tmp_path / "run")
    with pytest.raises(CheckpointError if dist.get_rank() else PeerError, match="fsspec"):
        average.save("nosuch://x" if dist.get_rank() else tmp_path / "run")
    average.save(tmp_path / "run")
