"""What tests of swaps and full states look at: outputs, pointers, bits, and bytes allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_avg import ShardedAverage

from .engines import Engine, Row
from .models import VARIANTS, batch, clean


def trained_with(row: Row, variant: str = "ema", num_steps: int = 2) -> tuple[Engine, ShardedAverage]:
    """An engine after some steps, and an average that differs from its weights."""
    engine = row.start()
    average = VARIANTS[variant].build(engine.model)
    for step in range(num_steps):
        engine.learn(batch(step, engine.part))
        average.update()
    return engine, average


def forward(engine: Engine) -> Tensor:
    """An eval forward without backward."""
    engine.model.eval()
    with torch.no_grad():
        output = engine.model(batch(7, engine.part).to(engine.own or torch.float32)).clone()
    engine.model.train()
    return output


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {clean(name): buffer for name, buffer in model.named_buffers()}


def local(param: Tensor) -> Tensor:
    if hasattr(param, "ds_tensor"):
        return param.ds_tensor
    return param.to_local() if isinstance(param, DTensor) else param


def pointers(engine: Engine) -> dict[str, int]:
    """Of this rank's part of every parameter."""
    return {name: local(param).data_ptr() for name, param in engine.model.named_parameters()}


def snapshot(engine: Engine, average: ShardedAverage) -> list[Tensor]:
    """Copies of every bit that a swap touches on this rank."""
    members, store = average._state.members, average._state.store
    live = [tensor for shard in members.all for tensor in (shard.tensor, shard.target)]
    views = [store.view(name, shard.name) for name in average.names for shard in members.averaged]
    return [tensor.clone() for tensor in [*live, *views]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class CountBytes(TorchDispatchMode):
    """Bytes of the storages that were allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        creates = not any(arg.alias_info is not None for arg in func._schema.returns)
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if creates and isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # kept, so that no other gets its place
                self.storages[storage.data_ptr()] = storage
        return result

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())
