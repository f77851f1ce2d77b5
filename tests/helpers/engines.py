"""Every engine that the contract tests run on: a new one is a row of ENGINES.

Row      an engine with one configuration, and on how many ranks it is tested
Engine   a model in its hands, with what a test asks of it. `full` and `local_numel` know nothing of sharded_avg:
         they use what the engine itself offers, or its own bookkeeping and plain collectives
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from .further import covered_by
from .models import Awkward, Block, Frozen, Low, awkward, batch, clean
from .pool import run_on_ranks

BF16 = torch.bfloat16


@dataclass
class Engine:
    """A model in the hands of an engine, with its optimizer."""

    model: nn.Module  # what forward is called on, and what `ShardedAverage` is given
    learn: Callable[[Tensor], None]  # Collective. One training step
    full: Callable[[], dict[str, Tensor]]  # Collective. Trained parameters after a step, whole; fp32 masters if any
    local_numel: Callable[[], int]  # trained elements that this rank owns, each once
    part: int = 0  # which part of the data this rank sees
    own: torch.dtype | None = None  # dtype of the parameters, where `full` gives masters of another

    def learn_steps(self, start: int, stop: int) -> None:
        """Collective. Steps `start` to `stop - 1`."""
        for step in range(start, stop):
            self.learn(batch(step, self.part))


@dataclass(frozen=True)
class Row:
    """`twin`: forward gives the plain model's numbers up to rounding only; compare with the same engine instead."""

    build: Callable[[Awkward], Engine]
    world_sizes: tuple[int, ...]
    low: bool = True  # the model has a bf16 part, where the engine takes several dtypes
    kind: str = "torch"
    twin: bool = False

    def plain(self) -> Awkward:
        """The model before an engine took it."""
        return awkward(low=self.low, scalar=self.kind == "torch")  # DeepSpeed refuses 0-d parameters

    def start(self) -> Engine:
        """Collective. The engine with its model, on the same weights each time."""
        return self.build(self.plain())


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {clean(name): param for name, param in module.named_parameters() if param.requires_grad}


def _with_sgd(model: nn.Module, not_reduced: Iterable[nn.Parameter] = ()) -> Callable[[Tensor], None]:
    """A training step; `not_reduced` are parameters whose gradients the engine leaves different on each rank."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=False)  # DTensors and plain ones do not mix
    alone = list(not_reduced)

    def learn(x: Tensor) -> None:
        loss_of(model(x)).backward()
        for param in alone:
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()

    return learn


# --- one process, DDP ----------------------------------------------------------------------------------------------


def _whole(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: state[name].clone() for name in _trained(module)}


def _fair_share(params: Iterable[Tensor], rank: int, num_ranks: int) -> int:
    """Elements that a rank has if each dtype is divided as evenly as can be in equal stretches."""
    totals: dict[torch.dtype, int] = {}
    for param in params:
        totals[param.dtype] = totals.get(param.dtype, 0) + param.numel()
    stretches = {total: math.ceil(total / num_ranks) for total in totals.values()}
    return sum(max(0, min(stretches[total], total - rank * stretches[total])) for total in totals.values())


def plain(model: Awkward) -> Engine:
    share = partial(_fair_share, _trained(model).values(), 0, 1)
    return Engine(model, _with_sgd(model), partial(_whole, model), share)


def ddp(model: Awkward) -> Engine:
    wrapped = DistributedDataParallel(model)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    share = partial(_fair_share, _trained(model).values(), rank, num_ranks)
    return Engine(wrapped, _with_sgd(wrapped), partial(_whole, model), share, part=rank)


# --- FSDP1 ---------------------------------------------------------------------------------------------------------


@cache
def mesh(shape: tuple[int, ...]) -> Any:
    """One mesh of a shape for the life of a rank: each makes process groups."""
    names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fsdp1(model: Awkward, *, strategy: str, use_orig_params: bool, nested: bool = True, **more: Any) -> Engine:
    shapes = {name: param.shape for name, param in model.named_parameters()}
    alone = [model.gain]  # FSDP refuses 0-d parameters
    if "HYBRID" in strategy:
        more["device_mesh"] = mesh((2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NO_SHARD is deprecated; BatchNorm is left out of mixed precision
        wrapped = FSDP(
            model,
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy({Block, Low, Frozen}) if nested else None,
            device_id=torch.device("cpu"),
            ignored_states=alone if nested else [*alone, *model.frozen.parameters()],
            **more,
        )
    full = partial(_joined_views, wrapped, shapes) if use_orig_params else partial(_joined_flats, wrapped)
    numel = partial(_numel_of_views, wrapped) if use_orig_params else partial(_numel_of_flats, wrapped)
    return Engine(wrapped, _with_sgd(wrapped, alone), full, numel, part=dist.get_rank())


def _joined_views(model: Any, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """With use_orig_params=True each rank has a stretch of each parameter: put one after the other they are whole."""
    mine = {name: param.detach().clone() for name, param in _trained(model).items()}
    ranks: list[Any] = [None] * dist.get_world_size(model.process_group)
    dist.all_gather_object(ranks, mine, group=model.process_group)
    return {
        name: mine[name]
        if mine[name].shape == shapes[name]  # not cut: NO_SHARD, or ignored
        else torch.cat([rank[name].view(-1) for rank in ranks]).view(shapes[name])
        for name in mine
    }


def _numel_of_views(model: Any) -> int:
    return sum(param.numel() for param in _trained(model).values())


def _flats(model: Any) -> list[tuple[str, Any]]:
    units = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDP)]
    return [(name, unit._handle) for name, unit in units if unit._handle and unit._handle.flat_param.requires_grad]


def _joined_flats(model: Any) -> dict[str, Tensor]:
    """With use_orig_params=False: every unit's flat parameter, gathered whole and taken apart."""
    full = {name: param.detach().clone() for name, param in _trained(model).items() if "_flat_param" not in name}
    for unit, handle in _flats(model):
        flat = handle.flat_param
        pieces = [torch.empty_like(flat.data) for _ in range(handle.process_group.size())]
        dist.all_gather(pieces, flat.data, group=handle.process_group)
        whole = torch.cat(pieces) if handle.uses_sharded_strategy else flat.data
        for (key, _, module), shape in zip(flat._param_infos, flat._shapes, strict=True):
            value, whole = whole[: shape.numel()], whole[shape.numel() :]
            full[clean(".".join(filter(None, (unit, module, key))))] = value.reshape(shape).clone()
    return full


def _numel_of_flats(model: Any) -> int:
    """Padding, all at the end here, is left out."""
    numel = sum(param.numel() for name, param in _trained(model).items() if "_flat_param" not in name)
    for _, handle in _flats(model):
        total, here = sum(shape.numel() for shape in handle.flat_param._shapes), handle.flat_param.numel()
        start = handle.process_group.rank() * here if handle.uses_sharded_strategy else 0
        numel += max(0, min(here, total - start))
    return numel


# --- FSDP2, tensor parallel ----------------------------------------------------------------------------------------


def _gathered_dtensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: param.detach().full_tensor() if isinstance(param, DTensor) else param.detach().clone()
        for name, param in _trained(model).items()
    }


def _numel_of_dtensors(model: nn.Module) -> int:
    params = _trained(model).values()
    return sum(param.to_local().numel() if isinstance(param, DTensor) else param.numel() for param in params)


def _fully_shard(model: Awkward, device_mesh: Any, **more: Any) -> None:
    for module in (*model.blocks, model.low, model.frozen):
        if module is not None:
            fully_shard(module, mesh=device_mesh, **more)
    fully_shard(model.norm, mesh=device_mesh)  # BatchNorm on CPUs wants parameters of its buffers' dtype
    fully_shard(model, mesh=device_mesh, ignored_params={model.gain}, **more)


def fsdp2(model: Awkward, *, shape: tuple[int, ...] | None = None, **more: Any) -> Engine:
    _fully_shard(model, mesh(shape or (dist.get_world_size(),)), **more)
    learn = _with_sgd(model, [model.gain])
    return Engine(model, learn, partial(_gathered_dtensors, model), partial(_numel_of_dtensors, model), dist.get_rank())


def tp(model: Awkward, *, and_fsdp2: bool = False) -> Engine:
    """Blocks cut on dims 0 (`wide`) and 1 (`narrow`); with `and_fsdp2` on a mesh (2, 2), everything cut again."""
    device_mesh = mesh((2, 2) if and_fsdp2 else (2,))
    for block in model.blocks:
        # Between the two the activation stays a DTensor: it is cut unevenly.
        plan = {"wide": ColwiseParallel(use_local_output=False), "narrow": RowwiseParallel()}
        parallelize_module(block, device_mesh["shard"], plan)
    part = 0
    if and_fsdp2:
        _fully_shard(model, device_mesh["replicate"])
        part = device_mesh.get_local_rank("replicate")
    learn = _with_sgd(model, [model.gain])
    return Engine(model, learn, partial(_gathered_dtensors, model), partial(_numel_of_dtensors, model), part)


# --- DeepSpeed -----------------------------------------------------------------------------------------------------


def zero(
    model: Awkward, *, stage: int, bf16: bool = False, num_groups: int = 1, persist: int = 0, **more: Any
) -> Engine:
    """`persist`: stage 3 keeps parameters of fewer elements than this gathered."""
    import deepspeed

    model = model.to(BF16) if bf16 else model
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [{"params": trained[index::num_groups], "lr": 0.1 / (index + 1)} for index in range(num_groups)]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persist, **more},
        },
    )
    own = BF16 if bf16 else torch.float32

    def learn(x: Tensor) -> None:
        engine.backward(loss_of(engine(x.to(own))))
        engine.step()

    full, numel = partial(_masters, engine, bf16), partial(_numel_of_masters, engine)
    return Engine(engine, learn, full, numel, dist.get_rank(), own)


def _masters(engine: Any, bf16: bool) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer, params = engine.optimizer, _trained(engine.module)
    if engine.zero_optimization_stage() > 0:
        return {name: safe_get_full_fp32_param(param).clone() for name, param in params.items()}
    if not bf16:
        return {name: param.detach().clone() for name, param in params.items()}
    if not hasattr(optimizer, "fp16_groups"):  # DeepSpeed 0.16.9: BF16_Optimizer, as for stage 1
        return {name: safe_get_full_fp32_param(param).clone() for name, param in params.items()}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    master_of = {id(low): high for group in pairs for low, high in zip(*group, strict=True)}
    return {name: master_of[id(param)].detach().clone() for name, param in params.items()}


def _numel_of_masters(engine: Any) -> int:
    rank, num_ranks, stage = dist.get_rank(), dist.get_world_size(), engine.zero_optimization_stage()
    params, optimizer = list(_trained(engine.module).values()), engine.optimizer
    if stage == 0 and hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer: pieces of even length
        return _numel_of_pieces(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, rank)
    if stage == 0:
        return _fair_share(params, rank, num_ranks)
    if stage == 3:
        return sum(min(max(p.ds_numel - rank * p.ds_tensor.ds_numel, 0), p.ds_tensor.ds_numel) for p in params)
    return _numel_of_pieces(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, rank)


def _numel_of_pieces(groups: Iterable[Any], masters: Iterable[Tensor], rank: int) -> int:
    """Without the padding, which is at the end of a group."""
    numel = 0
    for group, master in zip(groups, masters, strict=True):
        total = sum(param.numel() for param in group)
        numel += min(max(total - rank * master.numel(), 0), master.numel())
    return numel


# --- the table -----------------------------------------------------------------------------------------------------

_LOW = MixedPrecision(param_dtype=BF16, reduce_dtype=BF16, buffer_dtype=BF16)
_LOW2 = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)


def _fsdp1(strategy: str, use_orig_params: bool, **more: Any) -> Callable[[Awkward], Engine]:
    return partial(fsdp1, strategy=strategy, use_orig_params=use_orig_params, **more)


ENGINES = {
    "ddp": Row(ddp, (2, 3, 4)),
    "fsdp1-full-views": Row(_fsdp1("FULL_SHARD", True), (2, 3)),
    "fsdp1-full-flat": Row(_fsdp1("FULL_SHARD", False), (3, 4)),
    "fsdp1-full-views-one_unit": Row(_fsdp1("FULL_SHARD", True, nested=False), (3,), low=False),
    "fsdp1-full-flat-one_unit": Row(_fsdp1("FULL_SHARD", False, nested=False), (2,), low=False),
    "fsdp1-grad_op-views": Row(_fsdp1("SHARD_GRAD_OP", True), (3,)),
    "fsdp1-grad_op-flat": Row(_fsdp1("SHARD_GRAD_OP", False), (2,)),
    "fsdp1-no_shard-views": Row(_fsdp1("NO_SHARD", True), (2,)),
    "fsdp1-no_shard-flat": Row(_fsdp1("NO_SHARD", False), (3,)),
    "fsdp1-hybrid-views": Row(_fsdp1("HYBRID_SHARD", True), (4,)),
    "fsdp1-hybrid-flat": Row(_fsdp1("HYBRID_SHARD", False), (4,)),
    "fsdp1-mixed-views": Row(_fsdp1("FULL_SHARD", True, mixed_precision=_LOW), (2,), low=False, twin=True),
    "fsdp1-mixed-flat": Row(_fsdp1("SHARD_GRAD_OP", False, mixed_precision=_LOW), (3,), low=False, twin=True),
    "fsdp2": Row(fsdp2, (2, 3, 4)),
    "fsdp2-no_reshard": Row(partial(fsdp2, reshard_after_forward=False), (3,)),
    "fsdp2-reshard_to_2": Row(partial(fsdp2, reshard_after_forward=2), (4,)),
    "fsdp2-hsdp": Row(partial(fsdp2, shape=(2, 2)), (4,)),
    "fsdp2-mixed": Row(partial(fsdp2, mp_policy=_LOW2), (2,), twin=True),
    "fsdp2-offload": Row(partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)), (2,)),
    "tp": Row(tp, (2,), twin=True),
    "tp-fsdp2": Row(partial(tp, and_fsdp2=True), (4,), twin=True),
    "zero0": Row(partial(zero, stage=0), (2,), low=False, kind="deepspeed"),
    "zero0-bf16": Row(partial(zero, stage=0, bf16=True), (2,), low=False, kind="deepspeed", twin=True),
    "zero1-groups": Row(partial(zero, stage=1, num_groups=2), (3,), low=False, kind="deepspeed"),
    "zero1-bf16": Row(partial(zero, stage=1, bf16=True), (2,), low=False, kind="deepspeed", twin=True),
    "zero2": Row(partial(zero, stage=2), (2,), low=False, kind="deepspeed"),
    "zero2-bf16-groups": Row(
        partial(zero, stage=2, bf16=True, num_groups=2), (3,), low=False, kind="deepspeed", twin=True
    ),
    "zero3": Row(partial(zero, stage=3), (2,), low=False, kind="deepspeed"),
    "zero3-persistent": Row(partial(zero, stage=3, persist=10**5), (3,), low=False, kind="deepspeed"),
    "zero3-bf16-groups": Row(
        partial(zero, stage=3, bf16=True, num_groups=2, persist=8), (2,), low=False, kind="deepspeed", twin=True
    ),
}

# Without a process group, or as if there were none; in the test's own process.
ONE_PROCESS = Row(plain, (1,))


# Without --all, test_contract.py takes every engine on one number of ranks, and the other tables these: every way that
# parameters are cut or replicated, weights kept beside their masters, and left unsharded by a forward.
COVER = {
    ("ddp", 3),
    ("fsdp1-full-views", 2),
    ("fsdp1-grad_op-flat", 2),
    ("fsdp1-no_shard-flat", 3),
    ("fsdp1-hybrid-flat", 4),
    ("fsdp1-mixed-flat", 3),
    ("fsdp2", 3),
    ("fsdp2-hsdp", 4),
    ("fsdp2-offload", 2),
    ("tp-fsdp2", 4),
    ("zero0-bf16", 2),
    ("zero1-groups", 3),
    ("zero2", 2),
    ("zero3-bf16-groups", 2),
}
ROWS = [(name, size) for name, row in ENGINES.items() for size in row.world_sizes]
ONE_SIZE = [(name, row.world_sizes[0]) for name, row in ENGINES.items()]
every_engine = pytest.mark.parametrize(("row", "world_size"), covered_by(COVER, ROWS))
every_row = pytest.mark.parametrize(("row", "world_size"), covered_by(ONE_SIZE, ROWS))
one_size = pytest.mark.parametrize(
    ("row", "world_size"), covered_by([each for each in ONE_SIZE if each[0] in dict(COVER)], ONE_SIZE)
)


def run_row(row: str, world_size: int, check: Callable[[Row], None]) -> None:
    """Run `check`, a function of a module, on the ranks that a row wants."""
    if ENGINES[row].kind == "deepspeed":
        pytest.importorskip("deepspeed")
    run_on_ranks(world_size, _check_row, kind=ENGINES[row].kind, row=row, check=check)


def _check_row(row: str, check: Callable[[Row], None]) -> None:
    """On a rank."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # `full_tensor` may be slow
    check(ENGINES[row])
