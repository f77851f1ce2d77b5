"""DDP, FSDP1, FSDP2, tensor parallelism: one rank, over nccl on a GPU."""

from __future__ import annotations

import torch

from ..check import check
from ..engines import ENGINES, join_alone
from ..proof import prove


def _enter(name: str) -> None:
    on_gpu_only = "offload" in name
    shows = "one rank: bits of full tensors, swap seen by forward and undone, files" + ("; pinned" * on_gpu_only)

    @check(shows, room="engines", needs_gpu=on_gpu_only, name=name)
    def one_rank(device: torch.device) -> str:
        join_alone(device)
        return prove(ENGINES[name], device)


for _name in ENGINES:
    _enter(_name)
