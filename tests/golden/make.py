"""How the golden folders were made: `torchrun --standalone --nproc_per_node=2 tests/golden/make.py v1_1`.

Never run it again for a version that exists: what it wrote then must load for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import EMA, SWA, Schedule, ShardedAverage
from sharded_avg.ranks import leave


class Golden(nn.Module):
    """Weights that are a formula of their name and of the step; one tied pair, one bf16 layer, one float buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.low = nn.Linear(5, 7, dtype=torch.bfloat16)
        self.last = nn.Linear(3, 5, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("mean", torch.zeros(5))

    @torch.no_grad()
    def set(self, step: int) -> None:
        """The weights after optimizer step `step`."""
        for index, tensor in enumerate((*self.parameters(), self.mean)):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 16 + 16 * index + 128 * step)


class Fuller(Golden):
    """With what version 1 tells since `empty` and `extra` were added: of no elements, frozen, extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Linear(2, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.tensor(7))
        self.told: Any = None

    def get_extra_state(self) -> Any:
        return {"bytes": b"\x00\xff", "tensor": torch.arange(5, dtype=torch.uint8), (1, 2): [2.5, None]}

    def set_extra_state(self, state: Any) -> None:
        self.told = state


MODELS = {"v1": Golden, "v1_1": Fuller}
RULES = {"ema": EMA(decay=0.5, warmup=True), "mean": SWA()}
SCHEDULE = Schedule(start_step=2, every_steps=2)
NUM_STEPS = 5  # updates at 2 and 4


def main() -> None:
    """Write the folder that the command line names."""
    dist.init_process_group("gloo")
    version = sys.argv[1]
    model = MODELS[version]()
    average = ShardedAverage(DistributedDataParallel(model), RULES, buffers="average", schedule=SCHEDULE)
    for step in range(1, NUM_STEPS + 1):
        model.set(step)
        average.update()
    average.save(Path(__file__).parent / version, with_buffers=version != "v1")
    leave()


if __name__ == "__main__":
    main()
