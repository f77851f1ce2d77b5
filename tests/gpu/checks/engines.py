"""DDP, FSDP1, FSDP2, tensor parallelism: one rank over nccl, and two ranks that share the GPU over gloo."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ..check import CouldNotRun, check
from ..devices import is_gpu
from ..engines import Engine, Make, join_alone, prove
from ..reference import Block, Frozen, Net, State, batch, clean, learn, net, trained, weights

ROOM = "engines"
BF16 = torch.bfloat16
PAIR_LIMIT_S = 100.0
ROOT = Path(__file__).resolve().parents[3]


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


def fsdp2(device: torch.device, **options: Any) -> Engine:
    model = net(torch.device("cpu") if "offload_policy" in options else device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
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
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
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
            local = _on(local, device).full_tensor()
        full[name] = local.to(device, copy=True)
    return full


def _on(tensor: DTensor, device: torch.device) -> DTensor:
    """Where the process group can gather it."""
    local, shape = tensor.to_local(), tensor.shape
    if local.device.type == device.type:
        return tensor
    there = local.to(device)
    return DTensor.from_local(there, tensor.device_mesh, tensor.placements, shape=shape, stride=tensor.stride())


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


def _enter(name: str) -> None:
    on_gpu_only = "offload" in name
    shows = "one rank: bits of full tensors, swap seen by forward and undone, files" + ("; pinned" * on_gpu_only)

    @check(shows, room=ROOM, needs_gpu=on_gpu_only, name=name)
    def one_rank(device: torch.device) -> str:
        join_alone(device)
        return prove(ENGINES[name], device)


for _name in ENGINES:
    _enter(_name)


@check("two ranks over gloo that share the device: weights that really are cut", room="two ranks", limit_s=PAIR_LIMIT_S)
def two_ranks(device: torch.device) -> str:
    with tempfile.TemporaryDirectory() as folder:
        outcomes = _outcomes_of_two(device, Path(folder))
    failed = {name: why for name, why in outcomes.items() if why and not is_missing(why)}
    assert not failed, "; ".join(f"{name}: {why}" for name, why in failed.items())
    missing = {name: why for name, why in outcomes.items() if why}
    if len(missing) == len(outcomes):
        raise CouldNotRun("; ".join(f"{name}: {why}" for name, why in missing.items()))
    worked = ", ".join(name for name, why in outcomes.items() if not why)
    return worked + "".join(f"; {name} could not run: {why}" for name, why in missing.items())


def is_missing(why: str) -> bool:
    """Whether it is gloo that cannot do this on a GPU."""
    text = why.lower()
    hints = ("gloo", "not supported", "does not support", "not implemented", "notimplemented", "no backend type")
    others = ("assertionerror", "timed out", "timeout", "connection", "peererror")
    return any(hint in text for hint in hints) and not any(other in text for other in others)


def _outcomes_of_two(device: torch.device, folder: Path) -> dict[str, str]:
    """What each engine said on the rank that failed first, or "" """
    command = [sys.executable, "-m", "tests.gpu.rank", str(folder), str(device)]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, stdin=subprocess.DEVNULL) for rank in range(2)]
    try:
        deadline = time.monotonic() + PAIR_LIMIT_S - 10
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > deadline:
                raise AssertionError(f"not done after {PAIR_LIMIT_S - 10:.0f} s; {_said(folder)}")
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    said = _said(folder)
    if not any(said.values()) and any(rank.returncode for rank in ranks):
        raise AssertionError(f"the ranks ended with {[rank.returncode for rank in ranks]} after {', '.join(said)}")
    return said


def _said(folder: Path) -> dict[str, str]:
    said: dict[str, str] = {}
    for file in sorted(folder.glob("*.said")):
        for line in file.read_text().splitlines():
            name, _, why = line.partition("\t")
            said[name] = said.get(name) or why
    return said
