"""Snapshots and a horizon chosen after training, on shards: saved on one engine, mixed on another."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sharded_avg import EMA, PowerAverage, ShardedAverage, Snapshots, load_averaged_state_dict
from tests.helpers.engines import ENGINES
from tests.helpers.models import awkward
from tests.helpers.pool import on_ranks


@on_ranks(3)
def test_mixed_on_other_shards(tmp_path):
    engine = ENGINES["fsdp2"].build(awkward(low=False, scalar=False))
    rules = {"wide": PowerAverage.from_sigma_rel(0.2), "narrow": PowerAverage.from_sigma_rel(0.1)}
    average = ShardedAverage(engine.model, rules)
    with Snapshots(average, tmp_path / "run", 2, keep_last=4) as snapshots:
        for step in range(10):
            engine.learn_steps(step, step + 1)
            average.update()
            snapshots.update()
    dist.barrier()
    for row in ("fsdp2", "ddp", "fsdp1-full-flat"):
        other = ENGINES[row].build(awkward(low=False, scalar=False))
        mine = ShardedAverage(other.model, EMA(decay=0.5))
        mixed = mine.load_posthoc(tmp_path / "run", sigma_rel=0.14)
        assert len({path for path, _, _ in mixed.parts}) == 4
        sums: dict[str, torch.Tensor] = {}
        for path, name, weight in mixed.parts:
            for key, value in load_averaged_state_dict(path, name=name).items():
                sums[key] = sums.get(key, 0) + weight * value.double()
        trained = other.full()
        with mine.summon_full_params(rank0_only=False) as full:
            assert all(torch.equal(full[key], sums[key].float()) for key in trained), row
        with mine.swapped():
            pass
