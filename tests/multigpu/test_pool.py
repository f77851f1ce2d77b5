from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .pool import on_ranks


@on_ranks(2, 3, 4)
def test_body_runs_on_every_rank(world_size: int, tmp_path: Path) -> None:
    assert dist.get_world_size() == world_size
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    assert total.item() == world_size * (world_size + 1) / 2
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == world_size
    assert torch.get_num_threads() == 1
    assert os.environ["WORLD_SIZE"] == str(world_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 5])
@on_ranks(2)
def test_arguments_reach_the_ranks(size: int, dtype: torch.dtype) -> None:
    value = torch.ones(size, dtype=dtype)
    dist.all_reduce(value)
    assert torch.equal(value, torch.full((size,), 2.0, dtype=dtype))
