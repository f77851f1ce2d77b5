"""A model in the hands of an engine: torch and the model alone, so that a control can train without sharded_avg.

Engine    what forward is called on, and how to step it and to look into it: by what the engine itself offers
ENGINES   DDP, FSDP1, FSDP2, tensor parallelism; DeepSpeed's are in checks/zero.py
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from .devices import is_gpu, wait_for
from .reference import Block, Frozen, Net, State, batch, clean, learn, net, outputs, trained, weights

BF16 = torch.bfloat16
STEPS = 4
Make = Callable[[torch.device], "Engine"]


@dataclass
class Engine:
    """A model in the hands of an engine."""

    model: nn.Module
    learn: Callable[[int], None]  # Collective. One step, numbered
    full: Callable[[], State]  # Collective. Clones of what is averaged: whole weights, or their fp32 masters
    working: Callable[[], State]  # Collective. Clones of the whole weights that forward reads
    device: torch.device  # where forward computes
    dtype: torch.dtype = torch.float32  # of the inputs
    tolerance: float = 1e-5  # of forward, beside a plain model; larger where it computes in less than fp32
    home: torch.device | None = None  # where averages are, and computed; by default, there too
    close: Callable[[], None] = lambda: None

    def evaluate(self) -> Tensor:
        """Collective."""
        return outputs(self.model, batch(100, self.device, self.dtype))


def join_alone(device: torch.device) -> None:
    """Be a job of one rank, over nccl on a GPU and gloo on a CPU, for the rest of this process."""
    if dist.is_initialized():
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    on_gpu = device.type == "cuda"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works where the host's own name does not resolve
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)


def done(device: torch.device) -> None:
    """Collective. Nobody leaves while another still works."""
    wait_for(device)
    dist.barrier()


def _engine(model: nn.Module, device: torch.device, full: Any) -> Engine:
    # foreach=False: DTensors and plain tensors do not mix
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.01, foreach=False)

    def step(number: int) -> None:
        learn(model, optimizer, batch(number, device))

    return Engine(model, step, full, full, device)


def ddp(device: torch.device) -> Engine:
    model = DistributedDataParallel(net(device), device_ids=[device] if is_gpu(device) else None)
    return _engine(model, device, partial(weights, model))


def fsdp1(device: torch.device, *, use_orig_params: bool, **more: Any) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one rank it makes NO_SHARD
        model = FSDP(
            net(device),
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy({Block, Frozen}),
            device_id=device,
            **more,
        )

    def full() -> State:
        with FSDP.summon_full_params(model, writeback=False):
            params = {clean(name): param for name, param in model.named_parameters()}
            return {name: params[name].detach().to(device, copy=True) for name in trained(Net())}

    engine = _engine(model, device, full)
    if "cpu_offload" in more:
        engine.home = torch.device("cpu")
    return engine


def _mesh(device: torch.device) -> DeviceMesh:
    """Of the job's own group: beside gloo `init_device_mesh` makes another, maybe of nccl (pytorch#132709)."""
    return DeviceMesh.from_group(dist.group.WORLD, device.type)


def fsdp2(device: torch.device, **options: Any) -> Engine:
    model = net(torch.device("cpu") if "offload_policy" in options else device)
    mesh = _mesh(device)
    for module in (*model.blocks, model.frozen, model):
        fully_shard(module, mesh=mesh, **options)
    for name, buffer in model._buffers.items():
        model._buffers[name] = buffer.to(device)
    engine = _engine(model, device, partial(_full_tensors, model, device))
    if "offload_policy" in options:
        engine.home = torch.device("cpu")
    return engine


def tp(device: torch.device) -> Engine:
    model = net(device)
    mesh = _mesh(device)
    plan = {"blocks.*.wide": ColwiseParallel(), "blocks.*.narrow": RowwiseParallel()}
    return _engine(parallelize_module(model, mesh, plan), device, partial(_full_tensors, model, device))


def _full_tensors(model: Any, device: torch.device) -> State:
    if hasattr(model, "reshard"):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
    full = {}
    for name, param in trained(model).items():
        local = param.detach()
        if isinstance(local, DTensor):
            local = _whole(local)
        full[name] = local.to(device, copy=True)
    return full


def _whole(tensor: DTensor) -> Tensor:
    """Collective. Its local tensors side by side: `full_tensor()` over gloo may crash on a GPU (pytorch#132471)."""
    local, (placement,) = tensor.to_local(), tensor.placements
    if not placement.is_shard():
        return local
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, local.cpu())
    return torch.cat(pieces, placement.dim)


_LOW = MixedPrecision(param_dtype=BF16, reduce_dtype=BF16)
_LOW2 = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32, cast_forward_inputs=True)


def _low(make: Make) -> Make:
    """An engine whose forward computes in bf16."""

    def made(device: torch.device) -> Engine:
        engine = make(device)
        engine.tolerance = 0.05
        return engine

    return made


ENGINES: dict[str, Make] = {
    "ddp": ddp,
    "fsdp1_views": partial(fsdp1, use_orig_params=True),
    "fsdp1_flat": partial(fsdp1, use_orig_params=False),
    "fsdp1_mixed": _low(partial(fsdp1, use_orig_params=True, mixed_precision=_LOW)),
    "fsdp1_offload": partial(fsdp1, use_orig_params=True, cpu_offload=CPUOffload(offload_params=True)),
    "fsdp2": fsdp2,
    "fsdp2_unsharded_after_forward": partial(fsdp2, reshard_after_forward=False),
    "fsdp2_mixed": _low(partial(fsdp2, mp_policy=_LOW2)),
    "fsdp2_offload": partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=True)),
    "tp": tp,
}
PAIRED = tuple(name for name in ENGINES if "offload" not in name)  # pinned memory is shown by one rank
