"""Other engines than FSDP2 for the same training: each function is all that it takes.

    Training   what the loop uses: `model` computes the loss, `learn` goes back from it and takes one optimizer step

All of it runs on CPUs with gloo; on GPUs the calls are the same, without the words "cpu".
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_avg.version import how_to_install


@dataclass(frozen=True)
class Training:
    """A model in the hands of an engine."""

    model: nn.Module  # what forward is called on, and what `ShardedAverage` is given
    learn: Callable[[Tensor], None]  # loss -> gradients -> optimizer step


def with_adamw(model: nn.Module, learning_rate: float) -> Training:
    """AdamW at a constant learning rate, for every engine that leaves the optimizer to the user."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def learn(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, learn)


def ddp(model: nn.Module, learning_rate: float) -> Training:
    """Replicated weights, gradients averaged."""
    return with_adamw(DistributedDataParallel(model), learning_rate)


def fsdp1(model: nn.Module, learning_rate: float) -> Training:
    """FullyShardedDataParallel: each block's parameters in one flat tensor, cut anywhere."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from .model import Block

    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), use_orig_params=True
    )
    return with_adamw(sharded, learning_rate)


def zero(model: nn.Module, learning_rate: float, *, stage: int) -> Training:
    """DeepSpeed ZeRO: stages 1 and 2 keep whole weights on each rank, stage 3 cuts them too."""
    deepspeed = import_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own log uses it: batches come from the loop
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # recent versions clip at 1.0 unless told; the other engines here do not clip
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def learn(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return Training(engine, learn)


def import_deepspeed():  # type: ignore[no-untyped-def]
    """DeepSpeed on CPUs, quiet. Exits with what to install where it is missing."""
    scripts = str(Path(sys.executable).parent)  # DeepSpeed builds a small op once, and looks for ninja in PATH
    os.environ.update(DS_ACCELERATOR="cpu", PATH=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    try:
        import deepspeed
    except ImportError as error:
        raise SystemExit(f"this needs DeepSpeed ({error}): {how_to_install('deepspeed')}") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that DeepSpeed uses
    return deepspeed


OTHER_ENGINES: dict[str, Callable[[nn.Module, float], Training]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "zero1": partial(zero, stage=1),
    "zero2": partial(zero, stage=2),
    "zero3": partial(zero, stage=3),
}


def local_bytes(model: nn.Module) -> int:
    """Bytes of the weights that this rank keeps between steps (an optimizer's own copies are not counted)."""
    return sum(_local(parameter).nbytes for parameter in model.parameters())


def _local(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
