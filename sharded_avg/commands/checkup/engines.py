"""What torch has: GPUs, the engines that this package knows, process groups. The one file of these that imports it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from ...version import how_to_install
from .finding import ABSENT, FAILS, OK, Finding
from .trials import attempt

_PROCESS_GROUP = """
import torch, torch.distributed as dist
dist.init_process_group("{backend}", store=dist.HashStore(), rank=0, world_size=1)
ones = torch.ones(3, device="{device}")
dist.all_reduce(ones)
print(ones.sum().item())
dist.destroy_process_group()
"""


def gpu() -> Finding:
    """The GPUs that torch sees."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", OK, ", ".join(names))
    if torch.version.cuda:
        return Finding(
            "GPU", ABSENT, "none that torch sees: no driver, or no device", "nothing on a CPU; else install a driver"
        )
    return Finding("GPU", ABSENT, "this torch was built without CUDA", "nothing on a CPU; else install a CUDA build")


def engines() -> Iterator[Finding]:
    """Those of torch, by the classes that this package asks for."""
    yield Finding("one process", OK, "ShardedAverage(model, rule)")
    if not dist.is_available():
        yield Finding("DDP, FSDP, TP", ABSENT, "torch was built without torch.distributed", "install another build")
        return
    yield Finding("DDP", OK, "ShardedAverage(DistributedDataParallel(model), rule)")
    for name, module, attribute in (
        ("FSDP1", "torch.distributed.fsdp", "FullyShardedDataParallel"),
        ("FSDP2", "torch.distributed.fsdp", "FSDPModule"),
        ("TP", "torch.distributed.tensor", "DTensor"),
        ("saving", "torch.distributed.checkpoint", "DefaultSavePlanner"),
    ):
        try:
            getattr(__import__(module, fromlist=[attribute]), attribute)
            yield Finding(name, OK, f"{module}.{attribute}")
        except (ImportError, AttributeError) as error:
            yield Finding(name, FAILS, f"{module}.{attribute}: {error}", how_to_install("torch"))


def process_group(backend: str, device: str, end: float) -> Finding:
    """A process group of one rank, in a process of its own: it may wait for a network that is not there."""
    if not (dist.is_available() and dist.is_backend_available(backend)):
        return Finding(
            backend, ABSENT, "torch was built without it", "" if device == "cuda" else "install another build"
        )
    if device == "cuda" and not torch.cuda.is_available():
        return Finding(backend, ABSENT, "it needs a GPU")
    failure = attempt(_PROCESS_GROUP.format(backend=backend, device=device), end)
    if not failure:
        return Finding(backend, OK, "a process group of one rank sums")
    interface = "GLOO_SOCKET_IFNAME=lo" if backend == "gloo" else "NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME"
    return Finding(backend, FAILS, failure, f"if it names a host or an interface, set {interface} (see `ip address`)")
