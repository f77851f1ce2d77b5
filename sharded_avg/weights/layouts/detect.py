"""Which layout a model has. Asks each in turn; explains a refusal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from ...errors import ConfigError, UnsupportedModelError
from ...version import require
from .. import names
from .base import AbstractLayout
from .fsdp1 import Fsdp1Layout
from .replicated import ReplicatedLayout
from .zero import ZeroLayout, looks_like_zero


def layouts() -> Iterator[type[AbstractLayout]]:
    """The most specific first; the last one claims everything.

    Where torch's engine has not been imported, nobody has wrapped a model with it, and to import it would take seconds.
    """
    yield ZeroLayout
    if "torch.distributed.fsdp" in sys.modules:
        yield Fsdp1Layout
    if "torch.distributed.tensor" in sys.modules:
        from .dtensor import DTensorLayout

        yield DTensorLayout
    yield ReplicatedLayout


def detect(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> AbstractLayout:
    """The layout of `model`: plain, DDP, FSDP, fully_shard'ed, tensor-parallel, or a DeepSpeedEngine.

    `process_group`: the ranks that hold the model together, where no engine says so.

    Raises `ConfigError` for something that is no module and for a group that cannot be, and `UnsupportedModelError`,
    with what to do, for a model whose parameters are not there yet or belong to an engine that was not passed;
    `EngineVersionError` for an engine, or a Fabric around it, that is too old.
    """
    if process_group is not None:
        _refuse_group(process_group)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module or a DeepSpeedEngine, not {type(model).__name__}")
    _refuse_old_fabric(model)
    model = _engine_in(model)
    if not ZeroLayout.claims(model):
        _refuse_unfinished(model)
    found = layout_class(model)
    if process_group is None or found is not ReplicatedLayout:
        layout = found(model)
    else:
        layout = ReplicatedLayout(model, process_group)
    if process_group is not None:
        _refuse_other_group(model, layout, process_group)
    return layout


def layout_class(model: nn.Module) -> type[AbstractLayout]:
    """The layout that claims `model`. Raises `UnsupportedModelError` for a module that DeepSpeed has taken over."""
    model = _engine_in(model)
    if not ZeroLayout.claims(model) and looks_like_zero(model):
        raise UnsupportedModelError(
            f"the parameters of this {type(model).__name__} belong to DeepSpeed, which steps them or masters of "
            "them: pass the engine that deepspeed.initialize returned, not the module inside it"
        )
    return next(layout for layout in layouts() if layout.claims(model))


def waits_in_forward(model: nn.Module) -> bool:
    """Whether ranks wait for each other in a forward of `model`. Local."""
    try:
        return layout_class(model).waits_in_forward(_engine_in(model))
    except UnsupportedModelError:  # a module that DeepSpeed has taken over, without its engine
        return True


def _engine_in(model: nn.Module) -> nn.Module:
    """The DeepSpeedEngine inside whatever wraps it (Fabric, torch.compile); other layouts look for themselves."""
    return next((module for module in names.wrappers(model) if ZeroLayout.claims(module)), model)


def _refuse_old_fabric(model: nn.Module) -> None:
    """Nothing of Lightning is imported: a module that Fabric made has its version with it."""
    for module in filter(names.is_fabric, names.wrappers(model)):
        package = type(module).__module__.rpartition(".")[0]  # lightning.fabric, or lightning_fabric
        version = getattr(sys.modules.get(package), "__version__", None)
        if version is not None:
            require("lightning" if package.startswith("lightning.") else "lightning-fabric", version)


def _refuse_unfinished(model: nn.Module) -> None:
    for entry in names.entries(model):
        tensor = entry.tensor
        if is_lazy(tensor):
            raise UnsupportedModelError(
                f"{entry.name!r} of a lazy module has no shape yet: run one forward pass before building the average"
            )
        if tensor.layout != torch.strided:
            raise UnsupportedModelError(
                f"{entry.name!r} is a sparse tensor ({tensor.layout}), with no flat memory to average: make it dense"
            )
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{entry.name!r} is on the meta device and has no values: materialise the model (to_empty and load or "
                "initialise its weights) before building the average"
            )


def _refuse_group(process_group: object) -> None:
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError(
            f"process_group: rank {dist.get_rank()} is not one of its ranks (torch.distributed.new_group gave it "
            "GroupMember.NON_GROUP_MEMBER): build the average on the ranks of the group only, or pass None here"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise ConfigError(
            f"process_group={process_group!r}: must be a torch.distributed.ProcessGroup (what new_group() or a mesh's "
            "get_group() returns; dist.group.WORLD for all ranks), or None"
        )


def _refuse_other_group(model: nn.Module, layout: AbstractLayout, process_group: dist.ProcessGroup) -> None:
    """An engine knows best which ranks hold its model; a group of the same ranks is no contradiction."""
    given = sorted(dist.get_process_group_ranks(process_group))
    engines = sorted(dist.get_process_group_ranks(layout.group)) if layout.group is not None else []
    if engines != given:
        raise ConfigError(
            f"process_group has the ranks {given}, but the engine of this {type(model).__name__} holds it "
            f"together on {engines}: leave process_group out"
        )
