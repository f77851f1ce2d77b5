"""Masters in files (offload_optimizer to NVMe): the same as masters in host memory, bit for bit, whatever is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from sharded_avg import EMA, ShardedAverage
from sharded_avg.weights.layouts.zero import ZeroLayout
from tests.helpers.further import further
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import Config, assert_same, engine_of, evaluate, gathered, settings, train
from tests.helpers.zero_files import offloading_to_files


def everything(config: Config, folder: Path) -> list[dict[str, Tensor]]:
    """What a run comes to, and what forward computes, in which averages go into the engine and training goes on."""
    seen = []
    with offloading_to_files(), engine_of(config) as engine:
        average, layout = ShardedAverage(engine, EMA(decay=0.5)), ZeroLayout(engine)
        for step in range(3):
            train(engine, range(step, step + 1))
            assert average.update()
        raw = evaluate(engine)
        with average.swapped():
            seen.append({"logits": evaluate(engine)})
        assert torch.equal(evaluate(engine), raw)
        average.save(folder)
        seen.append(masters_of(layout))
        average.copy_to_model()  # DeepSpeed's next step begins on it
        seen += [masters_of(layout), {"logits": evaluate(engine)}]
        train(engine, range(3, 5))
        assert average.update()
        seen += [masters_of(layout), {"logits": evaluate(engine)}, averages_of(average)]
        average.load(folder)
        return [*seen, averages_of(average)]


def masters_of(layout: ZeroLayout) -> dict[str, Tensor]:
    return gathered(layout, lambda shard: shard.tensor)


def averages_of(average: ShardedAverage) -> dict[str, Tensor]:
    with average.summon_full_params(rank0_only=False) as full:
        return {name: value.clone() for name, value in full.items()}


@pytest.mark.parametrize("pipelined", [True, further(False)])
@on_ranks(2, kind="deepspeed")
def test_masters_in_files(pipelined: bool, tmp_path: Path) -> None:
    """P82: sub-groups of 20 elements, of which the smallest stay in memory."""
    import deepspeed

    if pipelined and TorchVersion(deepspeed.__version__) < (0, 17):
        pytest.skip("a step of DeepSpeed 0.16 fails there (pipelined_optimizer_swapper.py, len(swap_paths))")

    def config(**device: Any) -> Config:
        found = settings("3-bf16-subgroups", aio={"block_size": 80})
        found["zero_optimization"]["offload_optimizer"] = device
        return found

    nvme = dict.fromkeys(("pipeline_read", "pipeline_write"), pipelined) | {"buffer_count": 8}
    expected = everything(config(device="cpu"), tmp_path / "cpu")
    found = everything(config(device="nvme", nvme_path=str(tmp_path / "files"), **nvme), tmp_path / "nvme")
    assert any((tmp_path / "files").rglob("*.swp"))
    for left, right in zip(found, expected, strict=True):
        assert_same(left, right)
