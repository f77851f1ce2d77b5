"""A mesh with a dimension that the module leaves unused: each rank along it holds the whole model once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule, fully_shard

from sharded_avg import load_averaged_state_dict
from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny
from .reference import DECAY, NUM_STEPS, assert_same, plain_average, plain_training
from .runs import module, run, trainer
from .watching import At, full_average

UNUSED = {"data_parallel_size": 1, "tensor_parallel_size": 2}  # what ModelParallelStrategy() means on two devices


class WithoutTensorParallel(Tiny):
    def configure_model(self) -> None:
        if not isinstance(self, FSDPModule):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def saved_and_resumed(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "end.ckpt"
    saver = At("on_train_epoch_end", lambda t: t.save_checkpoint(path))  # twice: over an earlier one, too
    callback = EMAWeightAveraging(decay=DECAY)
    trainer(tmp_path, "fsdp2", [callback, saver], options=UNUSED).fit(module("fsdp2", WithoutTensorParallel))
    resumed = EMAWeightAveraging(decay=DECAY)
    longer = trainer(tmp_path, "fsdp2", [resumed], options=UNUSED, max_epochs=3)
    longer.fit(module("fsdp2", WithoutTensorParallel), ckpt_path=path)
    return {"saved": load_averaged_state_dict(path), "resumed": full_average(resumed)}


def test_checkpoints_of_replicas(tmp_path: Path) -> None:
    """The replicas do not write over each other's files, and all of them resume."""
    num_steps = NUM_STEPS + NUM_BATCHES
    _, weights = plain_training(num_steps)
    halfway = plain_average({step: value for step, value in weights.items() if step <= NUM_STEPS})
    for seen in run("fsdp2", saved_and_resumed, tmp_path):
        assert_same(seen["saved"], halfway)
        assert_same(seen["resumed"], plain_average(weights))
