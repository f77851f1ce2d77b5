"""The modules that the tests train, their data, and what they must have become.

Tiny           sizes 3, 5, 7, a parameter of one element, buffers; tied, frozen or normalised weights on request
TwoOptimizers  the same, stepped by hand with two optimizers, the second one every other batch
batches        the same on every rank, or of each rank its own
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import wrap
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader

NUM_BATCHES = 4  # of an epoch
OLDER_TORCH = TorchVersion(torch.__version__) < (2, 13)  # 2.8 is so, 2.13 is not; what lies between was not looked at


class Block(nn.Module):
    """What FSDP shards by itself. Tied weights are tied in here: FSDP1 wants them in one unit."""

    def __init__(self, *, tied: bool, frozen: bool) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5).requires_grad_(not frozen)
        self.scale = nn.Parameter(torch.tensor([0.75]))
        self.again = nn.Linear(5, 7, bias=False)
        if tied:
            self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.again(self.down(torch.tanh(self.up(x))) * self.scale))


class TinyHooks:
    """Mixin for the LightningModule of either package. All hooks that `Tiny` has.

    Args:
        norm: a BatchNorm1d after the first layer.
        tied: two layers of the block share their weight.
        frozen: one layer of the block does not train.
        late: layers are made in `configure_model`, as large models are.
        by_hand: layers are wrapped for FSDP1 in `configure_model`, not by the strategy; needs a row that says so.
        optimizer: "sgd" (with momentum) or "adam".
        own_batches: each rank has batches of its own; gradients are then means over ranks.
    """

    def __init__(
        self,
        *,
        norm: bool = False,
        tied: bool = False,
        frozen: bool = False,
        late: bool = False,
        by_hand: bool = False,
        optimizer: str = "sgd",
        own_batches: bool = False,
    ) -> None:
        super().__init__()
        self.options = {"norm": norm, "tied": tied, "frozen": frozen}
        self.optimizer_name = optimizer
        self.own_batches = own_batches
        self.by_hand = by_hand
        self.wide: nn.Module | None = None
        if not late:
            self._make_layers()

    def _make_layers(self) -> None:
        generator_state = torch.get_rng_state()
        torch.manual_seed(5)  # equal on all ranks, whatever ran before
        self.wide = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5) if self.options["norm"] else nn.Identity()
        self.block = Block(tied=self.options["tied"], frozen=self.options["frozen"])
        self.head = nn.Linear(7, 3)
        self.register_buffer("shift", torch.full((5,), 0.125))
        self.register_buffer("calls", torch.tensor(0))
        torch.set_rng_state(generator_state)

    def configure_model(self) -> None:
        if self.wide is None:
            self._make_layers()
        if self.device_mesh is not None:
            shard(self, self.device_mesh)
        if self.by_hand:
            self.wide, self.block, self.head = (_wrapped(part) for part in (self.wide, self.block, self.head))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(x)) + self.shift.to(x.dtype)
        return self.head(self.block(x))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.move_buffers()
        return self._loss(batch)

    def move_buffers(self) -> None:
        """At every training step, and alike on all ranks."""
        self.shift.mul_(0.5).add_(0.25)
        self.calls.add_(1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.optimizer_name, [param for param in self.parameters() if param.requires_grad])

    def train_dataloader(self) -> Any:
        return loader(batches(NUM_BATCHES, rank=_data_rank(self.device_mesh) if self.own_batches else None))

    def val_dataloader(self) -> Any:
        return loader(batches(2, first=100))

    def test_dataloader(self) -> Any:
        return loader(batches(2, first=200))

    def predict_dataloader(self) -> Any:
        return loader(batches(2, first=300))


class TwoOptimizersHooks(TinyHooks):
    """Mixin: two optimizers stepped by hand, the second one on every other batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.move_buffers()
        first, second = self.optimizers()
        for optimizer in [first, second][: 1 + batch_idx % 2]:
            optimizer.zero_grad()
        self.manual_backward(self._loss(batch))
        for optimizer in [first, second][: 1 + batch_idx % 2]:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        params = {name: param for name, param in self.named_parameters() if param.requires_grad}
        block = [param for name, param in params.items() if "block" in name]
        others = [param for name, param in params.items() if "block" not in name]
        return make_optimizer(self.optimizer_name, others), make_optimizer(self.optimizer_name, block)


class Tiny(TinyHooks, lightning.LightningModule):
    """See TinyHooks."""

    __init__ = TinyHooks.__init__  # of its own: after a ZeRO 3, DeepSpeed 0.16.9 gives others their base module's


class TwoOptimizers(TwoOptimizersHooks, lightning.LightningModule):
    """See TwoOptimizersHooks."""

    __init__ = TwoOptimizersHooks.__init__


@functools.cache
def of_package(kind: type[TinyHooks], package: str) -> Any:
    """`Tiny` or `TwoOptimizers` as a module of "lightning.pytorch" or "pytorch_lightning"."""
    if package == lightning.__name__:
        return kind
    hooks = next(base for base in kind.__mro__ if base.__name__.endswith("Hooks"))
    own = {"__init__": hooks.__init__}
    return type(kind.__name__, (hooks, importlib.import_module(package).LightningModule), own)


def shard(module: Any, mesh: Any) -> None:
    """fully_shard, after tensor parallelism where the mesh has any. Once only: Lightning calls for every run."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if isinstance(module, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        plan = {
            "up": ColwiseParallel(use_local_output=False),  # 7 features on 2 ranks: a DTensor knows which are whose
            "down": RowwiseParallel(),
            "again": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(module.block, mesh["tensor_parallel"], plan)
    for part in [module.block, module.head, module]:
        fully_shard(part, mesh=mesh["data_parallel"])
        if OLDER_TORCH:  # its gloo sums where FSDP2 asks it to average: gradients are as many times as large
            part.set_force_sum_reduction_for_comms(True)


def _wrapped(part: nn.Module) -> nn.Module:
    return part if isinstance(part, FullyShardedDataParallel) else wrap(part)  # with what the strategy has chosen


def make_optimizer(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(params, lr=0.05)
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


def batches(count: int, *, first: int = 0, rank: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of two samples; the same on every rank unless a rank is given."""
    made = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * (0 if rank is None else 1 + rank) + number)
        made.append((torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)))
    return made


def loader(data: list[tuple[Tensor, Tensor]]) -> Any:
    """They come in order and are not collated: an element is a batch."""
    return DataLoader(data, batch_size=None)


def _data_rank(mesh: Any) -> int:
    """Ranks that share a layer by tensor parallelism see the same data."""
    if mesh is not None:
        return mesh["data_parallel"].get_local_rank()
    return dist.get_rank() if dist.is_initialized() else 0


class Tunable(Tiny):
    """Has what tuners turn: a learning rate and a batch size."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lr, self.batch_size = 0.1, 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)

    def train_dataloader(self) -> Any:
        self.batch_size
        return loader(batches(NUM_BATCHES))
