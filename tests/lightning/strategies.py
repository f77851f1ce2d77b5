"""Lightning's strategies on CPU processes: one row for each that the tests run over.

    Strategy    a row: how it is made, on how many ranks, where its body runs, what its checkpoints look like
    STRATEGIES  name -> Strategy
    where       "here"       the test's own process
                "torch"      ranks of a pool (tests/helpers/pool.py), which found each other before Lightning came
                "deepspeed"  ranks of a pool that nothing but DeepSpeed uses
                "fresh"      a Python of its own, that spawns ranks itself

ModelParallelStrategy runs on CPUs as it is. FSDPStrategy and DeepSpeedStrategy ask for GPUs; what they do apart from
asking works without, so the mixins here only step over the questions.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig

LIGHTNING = "lightning.pytorch"  # the other package is "pytorch_lightning"
KEPT_ELEMENTS = 8  # parameters up to this size stay gathered under ZeRO 3


class FSDPOnCPU:
    """Mixin for FSDPStrategy: tells FSDP1 that it runs on CPUs, and gathers without its CPU offload.

    FSDP1's `offload_to_cpu=True` assumes that gathered parameters lie somewhere else than on the CPU: where they do
    not, it frees memory that it still uses.
    """

    model: Any

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return super()._setup_model(model)
        return FullyShardedDataParallel(model, **self._arguments())

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        from torch.distributed.fsdp.wrap import enable_wrap

        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._arguments()):
            yield

    def _arguments(self) -> dict[str, Any]:
        return {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
            "device_id": torch.device("cpu"),
            **self.kwargs,
        }

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with _gathering_in_place():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        with _gathering_in_place():
            return super().optimizer_state(optimizer)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with _gathering_in_place():
            return super().load_checkpoint(*args, **kwargs)


def _full_state_dict_context(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


@contextmanager
def _gathering_in_place() -> Iterator[None]:
    """Lightning's full state dicts, in whatever module its packages have that name, without CPU offload."""
    name = "_get_full_state_dict_context"
    with ExitStack() as stack:
        for module in [module for module in list(sys.modules.values()) if name in getattr(module, "__dict__", {})]:
            stack.enter_context(mock.patch.object(module, name, _full_state_dict_context))
        yield


class DeepSpeedOnCPU:
    """Mixin for DeepSpeedStrategy: each rank is a CPU with a number, and nobody asks whether it is a GPU."""

    local_rank: int

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    @root_device.setter
    def root_device(self, device: torch.device) -> None:
        pass

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        return batch  # "cpu:1" is no place that a tensor could be moved to


def on_cpu(package: str, name: str) -> Any:
    """The class of that name, of "lightning.pytorch" or "pytorch_lightning", such that it runs on CPUs."""
    mixins = {"FSDPStrategy": (FSDPOnCPU,), "DeepSpeedStrategy": (DeepSpeedOnCPU,)}
    original = getattr(importlib.import_module(f"{package}.strategies"), name)
    return type(f"CPU{name}", (*mixins.get(name, ()), original), {})


def _named(name: str, package: str, **options: Any) -> Any:
    return name


def _parallel(package: str, **options: Any) -> Any:
    return on_cpu(package, "ModelParallelStrategy")(**options)


def _mesh(data: int, tensor: int) -> dict[str, int]:
    return {"data_parallel_size": data, "tensor_parallel_size": tensor}


def _fsdp(state_dict_type: str, package: str, **options: Any) -> Any:
    from .modules import Block

    chosen = {"auto_wrap_policy": {Block}, "state_dict_type": state_dict_type, "process_group_backend": "gloo"}
    return on_cpu(package, "FSDPStrategy")(**(chosen | options))


def _zero(stage: int, package: str, **options: Any) -> Any:
    return on_cpu(package, "DeepSpeedStrategy")(config=zero_config(stage, **options), process_group_backend="gloo")


def zero_config(stage: int, **more: Any) -> dict[str, Any]:
    """What DeepSpeed is told. Lightning changes it, so every strategy gets one of its own."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": KEPT_ELEMENTS},
        **more,
    }


@dataclass(frozen=True)
class Strategy:
    """One way to train. `make(package, **options)` gives what goes into `Trainer(strategy=...)`, new each time."""

    make: Callable[..., Any]
    world_size: int
    where: str  # "here", "torch", "deepspeed" or "fresh"
    writes_folder: bool = False  # a checkpoint is a folder, not a file
    options: dict[str, Any] = field(default_factory=dict)
    by_hand: bool = False  # the module wraps its layers for FSDP1; the module itself then is no unit of it
    runs_again: bool = True  # Lightning can run a module a second time that it has sharded once
    evaluates_checkpoints: bool = True  # standalone validate and test take a ckpt_path
    two_optimizers: bool = True  # stepped by hand; FSDP1 cannot do backward inside its own unit's forward
    exact: bool = True  # trains bit for bit like one process

    @property
    def num_replicas(self) -> int:
        """How many ranks see data of their own."""
        return self.world_size // self.options.get("tensor_parallel_size", 1)


STRATEGIES: dict[str, Strategy] = {
    "single": Strategy(partial(_named, "auto"), 1, "here"),
    "ddp": Strategy(partial(_named, "ddp"), 2, "torch"),
    "ddp_spawn": Strategy(partial(_named, "ddp_spawn"), 2, "fresh", two_optimizers=False),
    "fsdp_full": Strategy(partial(_fsdp, "full"), 2, "torch", runs_again=False, two_optimizers=False),
    "fsdp_sharded": Strategy(partial(_fsdp, "sharded"), 2, "torch", True, runs_again=False, two_optimizers=False),
    "fsdp_by_hand": Strategy(partial(_fsdp, "sharded"), 2, "torch", True, {"auto_wrap_policy": None}, by_hand=True),
    "fsdp2": Strategy(_parallel, 2, "torch", True, _mesh(2, 1)),
    "fsdp2_3ranks": Strategy(_parallel, 3, "torch", True, _mesh(3, 1), exact=False),  # thirds are rounded
    "fsdp2_tp": Strategy(_parallel, 4, "torch", True, _mesh(2, 2), exact=False),
    "deepspeed_1": Strategy(partial(_zero, 1), 2, "deepspeed", True, two_optimizers=False),
    "deepspeed_2": Strategy(partial(_zero, 2), 2, "deepspeed", True, two_optimizers=False),
    "deepspeed_3": Strategy(partial(_zero, 3), 2, "deepspeed", True, two_optimizers=False, evaluates_checkpoints=False),
}


# Without --all: one of each way to hold a model, by files and by folders. test_every_strategy.py takes all.
COVER = ("single", "ddp", "fsdp_by_hand", "fsdp2", "deepspeed_2")


def over(chosen: Callable[[Strategy], bool], *, cover: Sequence[str] = tuple(STRATEGIES)) -> pytest.MarkDecorator:
    """Run a test over the strategies whose row is chosen; those that are not in `cover` are further rows."""
    rows = []
    for name, row in STRATEGIES.items():
        marks = [pytest.mark.own_processes] if row.where in ("here", "fresh") else []
        marks += [] if name in cover else [pytest.mark.further]
        rows += [pytest.param(name, marks=marks)] if chosen(row) else []
    return pytest.mark.parametrize("name", rows)


def among(*names: str, further: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Run a test over these strategies; over the `further` ones with --all only."""
    return over(lambda row: any(row is STRATEGIES[name] for name in (*names, *further)), cover=names)
