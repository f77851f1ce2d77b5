"""Cases that need a process group: each job runs on ranks of its own, over gloo on this machine's CPU.

    Job       builds a Case on every rank, and says on how many ranks
    Settings  what the ranks are told
    Outcome   what rank 0 sends back

FSDP1 and ZeRO are measured on one rank: how their shards lie in memory does not depend on the number of ranks.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from ..ranks import leave
from .growth import Growth
from .local import BYTES_FP32, base, ours, started
from .rivals import gather_then_average
from .timing import OURS, Case, Contender, Memory, Timing, clock_for, measure
from .weights import Sizes, numel_of, transformer

Make = Callable[[Sizes], tuple[str, nn.Module]]  # what to call the model, and the model

TIMEOUT_S = 600.0  # DeepSpeed builds an op when it is first used


@dataclass(frozen=True)
class Settings:
    """What every rank is told."""

    sizes: Sizes
    num_rounds: int
    num_threads: int


@dataclass(frozen=True)
class Outcome:
    """What rank 0 measured."""

    timings: list[Timing] = field(default_factory=list)
    memory: Memory | None = None
    growth: list[Growth] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Collective: `build` is called on all ranks."""

    key: str
    build: Callable[[Sizes], Case]
    num_ranks: int = 1
    needs: str | None = None  # a package


class Owner(nn.Module):
    """Parameters of its own, all used by forward, so that an engine can step them."""

    def __init__(self, shapes: Iterable[torch.Size]) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()


def _small(sizes: Sizes) -> tuple[str, nn.Module]:
    count, numel = sizes.small
    return f"{count:,} x {numel:,}", Owner([torch.Size([numel])] * count)


def _transformer(sizes: Sizes) -> tuple[str, nn.Module]:
    layers, width = sizes.transformer
    return f"transformer, {layers} layers of width {width}", Owner(
        p.shape for p in transformer(layers, width).parameters()
    )


def lying_together(sizes: Sizes, *, make: Make, name: str, engine: Callable[[nn.Module], Any]) -> Case:
    """An engine whose shards lie together in memory: one `lerp_`, whatever their number."""
    shapes, model = make(sizes)
    numel = numel_of(model)
    average = started(engine(model))
    contenders = [base(numel), ours(average, BYTES_FP32 * numel, target=1.3, unscheduled=True)]
    return Case(f"{name}, 1 rank: {shapes}", contenders, Memory.of(average, numel))


def fsdp1(model: nn.Module) -> nn.Module:
    """All parameters in one flat parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on one rank FSDP falls back to NO_SHARD, and says so
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def zero(model: nn.Module, stage: int) -> Any:
    """A DeepSpeedEngine with a bf16 model and fp32 masters, which are what is averaged.

    It has made a step: an average takes in nothing before that.
    """
    scripts = str(Path(sys.executable).parent)  # DeepSpeed builds an op once, and looks for ninja in PATH
    os.environ.update(DS_ACCELERATOR="cpu", PATH=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.backward(engine(torch.ones(1, dtype=torch.bfloat16)).sum())
    engine.step()
    return engine


def gathering(sizes: Sizes) -> Case:
    """FSDP2 on two ranks: the average on the shards, and gathering full tensors to average them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers, width = sizes.transformer
    model, mesh = transformer(layers, width), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model:  # type: ignore[attr-defined]
        fully_shard(module, mesh=mesh)
    sharded: Any = fully_shard(model, mesh=mesh)
    total, local = numel_of(sharded), sum(parameter.to_local().numel() for parameter in sharded.parameters())
    average = started(sharded)
    contenders = [
        base(local),
        ours(average, BYTES_FP32 * local),
        Contender("gather, then average", gather_then_average(sharded), BYTES_FP32 * total, is_rival=True),
    ]
    name = f"FSDP2, {dist.get_world_size()} ranks: transformer, {layers} layers of width {width}"
    return Case(name, contenders, Memory.of(average, local))


def replicated(sizes: Sizes) -> Case:
    """DDP on two ranks: each averages its half."""
    from torch.nn.parallel import DistributedDataParallel

    layers, width = sizes.transformer
    model = transformer(layers, width)
    average = started(DistributedDataParallel(model))
    total = numel_of(model)
    share = -(-total // dist.get_world_size())
    local = min(share, total - dist.get_rank() * share)
    contenders = [
        Contender("one flat lerp_ of the whole", base(total).call, BYTES_FP32 * total),
        Contender(OURS, average.update, BYTES_FP32 * local),
    ]
    name = f"DDP, {dist.get_world_size()} ranks: transformer, {layers} layers of width {width}"
    return Case(name, contenders, Memory.of(average, local))


_FSDP1 = partial(lying_together, name="FSDP1", engine=fsdp1)
_ZERO2 = partial(lying_together, name="ZeRO-2", engine=partial(zero, stage=2))
_ZERO3 = partial(lying_together, name="ZeRO-3", engine=partial(zero, stage=3))
JOBS = (
    Job("fsdp1", partial(_FSDP1, make=_transformer)),
    Job("zero2", partial(_ZERO2, make=_transformer), needs="deepspeed"),
    Job("zero3", partial(_ZERO3, make=_transformer), needs="deepspeed"),
    Job("fsdp1-small", partial(_FSDP1, make=_small)),
    Job("zero2-small", partial(_ZERO2, make=_small), needs="deepspeed"),
    Job("zero3-small", partial(_ZERO3, make=_small), needs="deepspeed"),
    Job("fsdp2", gathering, num_ranks=2),
    Job("ddp", replicated, num_ranks=2),
)


def run(job: Job, settings: Settings) -> Outcome:
    """Measure a job on ranks of its own. Raises `TimeoutError`, or what a rank raised.

    `ModuleNotFoundError` if a package that it needs is not installed.
    """
    if job.needs is not None and importlib.util.find_spec(job.needs) is None:
        raise ModuleNotFoundError(f"{job.needs} is not installed")
    with TemporaryDirectory() as folder:
        arguments = (job, settings, folder)
        start: Any = spawn  # untyped
        ranks = start(_rank, arguments, nprocs=job.num_ranks, join=False)
        deadline = time.monotonic() + TIMEOUT_S
        while not ranks.join(timeout=5):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{job.key}: the ranks were not done after {TIMEOUT_S:.0f} s, and were ended")
        outcome: Outcome = pickle.loads(Path(folder, "outcome").read_bytes())
        return outcome


def _rank(rank: int, job: Job, settings: Settings, folder: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # engines print, and stdout may be this benchmark's JSON
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.num_ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=job.num_ranks)
    case = job.build(settings.sizes)
    if job.num_ranks > 1:  # waiting for others takes no CPU time, but it takes time
        timings = measure(case, num_rounds=settings.num_rounds, clock=time.perf_counter, between=dist.barrier)
    else:
        timings = measure(case, num_rounds=settings.num_rounds, clock=clock_for(settings.num_threads)[1])
    if rank == 0:
        Path(folder, "outcome").write_bytes(pickle.dumps(Outcome(timings, case.memory)))
    leave()
