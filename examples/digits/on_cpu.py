"""Lightning's strategies on CPUs, with gloo. Nobody who has GPUs needs this file.

DDPStrategy and ModelParallelStrategy run on CPUs as they are. FSDPStrategy and DeepSpeedStrategy ask for GPUs; what
they do apart from asking works without, so the subclasses only step over the questions.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import strategies as original
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

__all__ = ["DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"]


class FSDPStrategy(original.FSDPStrategy):
    """FSDP1 is told that its device is the CPU. Checkpoints: `state_dict_type="sharded"` only."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class DeepSpeedStrategy(original.DeepSpeedStrategy):
    """Each rank is a CPU with a number, and nobody asks whether it is a GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        scripts = str(Path(sys.executable).parent)  # DeepSpeed builds a small op once, and looks for ninja in PATH
        os.environ.update(DS_ACCELERATOR="cpu", PATH=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
        super().__init__(*args, **kwargs)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    @root_device.setter
    def root_device(self, device: torch.device) -> None:
        pass

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        return batch  # "cpu:1" is no place that a tensor could be moved to
