"""DeepSpeed's classes and attributes, and which engines are refused. Nothing here imports DeepSpeed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ....errors import EngineVersionError, UnsupportedModelError
from ....version import require, requirement

# optimizer class -> (lists of parameters, flat low-precision weights, fp32 masters), each one entry per parameter group
FLAT_ATTRIBUTES = {
    "DeepSpeedZeroOptimizer": ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    "BF16_Optimizer": ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
    "FP16_Optimizer": ("fp16_groups", "fp16_groups_flat", "fp32_groups_flat"),
}
STAGE_3, UNFUSED = "DeepSpeedZeroOptimizer_Stage3", "FP16_UnfusedOptimizer"
STAGE_3_EVALUATION = "DeepSpeedZeRoOffload"  # what stands in the optimizer's place where there is none


def kind(optimizer: Any) -> str:
    """The DeepSpeed optimizer class that this one is, or "" for an optimizer that steps the parameters themselves."""
    known = (*FLAT_ATTRIBUTES, STAGE_3, UNFUSED)
    return next((name for name in known if is_a(optimizer, name)), "")


def is_a(thing: object, name: str) -> bool:
    """Whether `thing` is an instance of DeepSpeed's class `name`; does not import DeepSpeed."""
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == "deepspeed" for cls in type(thing).__mro__)


def need(owner: Any, name: str) -> Any:
    """An attribute of DeepSpeed that this module relies on."""
    if not hasattr(owner, name):
        version = _installed() or "of an unknown version"
        raise EngineVersionError(
            f"DeepSpeed {version} has no {type(owner).__name__}.{name}, which sharded_avg reads to find the fp32 "
            f"weights; install {requirement('deepspeed')}, or a newer sharded_avg"
        )
    return getattr(owner, name)


def _installed() -> str:
    """The version of the DeepSpeed that is imported, "" if none is."""
    return str(getattr(sys.modules.get("deepspeed"), "__version__", ""))


def looks_like_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed owns parameters of `model`, which is not its engine: the user must pass the engine instead.

    Stage 0 leaves no mark on parameters; its engine hooks the module that it calls.
    """
    if is_a(model, "DeepSpeedEngine"):
        return False
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(hasattr(param, "ds_id") or hasattr(param, "_hp_mapping") for param in model.parameters()) or any(
        getattr(hook, "__module__", None) == "deepspeed.runtime.engine" for hook in hooks
    )


def refuse(engine: Any) -> None:
    """Raise `UnsupportedModelError` for what would be averaged wrongly, `EngineVersionError` for an old DeepSpeed."""
    if version := _installed():
        require("deepspeed", version)
    if not is_a(engine, "DeepSpeedEngine"):
        hint = (
            "its parameters belong to DeepSpeed: " if isinstance(engine, nn.Module) and looks_like_zero(engine) else ""
        )
        raise UnsupportedModelError(
            f"{type(engine).__name__} is not a DeepSpeedEngine; {hint}"
            "pass the engine that deepspeed.initialize returned"
        )
    for refusal in _REFUSALS:
        if refusal.is_so(engine):
            raise UnsupportedModelError(f"cannot average this DeepSpeed engine: {refusal.reason}; {refusal.remedy}")


def uses_autotp(engine: Any) -> bool:
    """Whether DeepSpeed itself cuts parameters over tensor-parallel ranks; then its own module stands as the mpu."""
    return getattr(getattr(engine, "mpu", None), "__name__", "") == "deepspeed.utils.groups"


def moved_away(engine: Any) -> str:
    """What `engine.offload_states()` has put elsewhere for now; "" if nothing."""
    states = getattr(engine.optimizer, "offloaded_states", None) or ()
    return ", ".join(sorted(str(getattr(state, "value", state)) for state in states))


def never_steps(engine: Any) -> bool:
    """Whether it has no optimizer: an engine for evaluation only."""
    optimizer = engine.optimizer
    idle = optimizer is None or is_a(optimizer, STAGE_3_EVALUATION) or is_a(optimizer, "DummyOptim")
    return idle or not getattr(optimizer, "using_real_optimizer", True)


def steps_taken(engine: Any) -> int:
    """Optimizer steps since `initialize`, skipped ones too; micro-batches in between are none."""
    return int(need(engine, "global_steps"))


def writes_checkpoints(engine: Any) -> bool:
    """Whether `engine.save_checkpoint` works: not in stage 3 without an optimizer.

    There its first rank raises an AttributeError, for which the others wait.
    """
    return not is_a(engine, "DeepSpeedEngine") or need(engine, "checkpoint_engine") is not None


def _weights_in_files(engine: Any) -> bool:
    """Whether some do not fit into `max_in_cpu` elements: trained ones have no flat buffer then."""
    homes = (getattr(param, "ds_tensor", None) for param in engine.module.parameters())
    in_files = any(getattr(home, "final_location", None) == "nvme" for home in homes)
    return in_files or any(flat is None for flat in getattr(engine.optimizer, "fp16_partitioned_groups_flat", ()))


def _unknown_optimizer(engine: Any) -> bool:
    optimizer = engine.optimizer
    if never_steps(engine):
        return False
    return not kind(optimizer) and (engine.zero_optimization_stage() > 0 or is_a(optimizer, "DeepSpeedOptimizer"))


class _Refusal(NamedTuple):
    is_so: Callable[[Any], bool]
    reason: str  # what, and why
    remedy: str
    read_in: str  # the release of DeepSpeed, and the file in it, in which the reason was last looked for


def _read(file: str) -> str:
    return f"0.19.8, {file}"


# Asked in this order.
_REFUSALS = (
    _Refusal(
        lambda engine: is_a(engine, "PipelineEngine"),
        "under pipeline parallelism each rank has another part of the model, and no group of ranks has all of it",
        "train with ZeRO 1, 2 or 3 without a PipelineModule",
        _read("runtime/pipe/module.py"),
    ),
    _Refusal(
        lambda engine: is_a(engine, "DeepSpeedHybridEngine"),
        "the hybrid engine keeps further copies of the weights for generation, which an exchange would miss",
        "set hybrid_engine.enabled to false",
        _read("runtime/hybrid_engine.py"),
    ),
    _Refusal(
        lambda engine: bool(getattr(engine, "has_moe_layers", False)),
        "experts under one name differ from rank to rank",
        "train without DeepSpeed's MoE layers, or average the dense part in a model of its own",
        _read("moe/experts.py"),
    ),
    _Refusal(
        lambda engine: getattr(engine, "mp_world_size", 1) > 1 and not uses_autotp(engine),
        "tensor parallelism by an mpu of your own cuts the parameters, and nothing says along which dim",
        "use AutoTP (tensor_parallel.autotp_size), data parallelism only, or FSDP2 with tensor parallelism",
        _read("runtime/engine.py"),
    ),
    _Refusal(
        lambda engine: (
            engine.zero_optimization_stage() < 3
            and getattr(engine, "mesh_device", None) is not None
            and getattr(engine, "sequence_parallel_size", 1) > 1
        ),
        "with mesh_param, DeepSpeed reduces gradients over the data-parallel ranks only in stages 0 to 2, so that the "
        "masters of sequence-parallel ranks differ",
        "use stage 3, or pass sequence parallelism as an mpu",
        _read("utils/groups.py"),
    ),
    _Refusal(
        lambda engine: (
            bool(getattr(engine, "zenflow", False)) or is_a(engine.optimizer, "SuperOffloadOptimizer_Stage3")
        ),
        "ZenFlow and SuperOffload step parts of the masters later, on the CPU, so they are never all of one step",
        "turn zero_optimization.zenflow and offload_optimizer.super_offload off",
        _read("runtime/zenflow/zenflow_stage_1_and_2.py"),
    ),
    _Refusal(
        lambda engine: bool(getattr(engine.optimizer, "params_in_nvme_and_cpu", False)) and _weights_in_files(engine),
        "low-precision weights are in files between uses (offload_param to NVMe), where a swap cannot write averages "
        "into them",
        'raise offload_param.max_in_cpu until all of them fit, or use {"device": "cpu"}, or none',
        _read("runtime/swap_tensor/partitioned_param_swapper.py"),
    ),
    _Refusal(
        lambda engine: is_a(engine.optimizer, "MiCS_Optimizer"),
        "MiCS is untested here, and DeepSpeed has removed it",
        "use ZeRO 3, perhaps with zero_hpz_partition_size",
        _read("runtime/config.py"),
    ),
    _Refusal(
        lambda engine: any(
            hasattr(getattr(param, "ds_tensor", None), "ds_quant_scale") for param in engine.module.parameters()
        ),
        "frozen weights are stored quantized (zero_quantized_nontrainable_weights)",
        "turn that option off",
        _read("runtime/zero/stage3.py"),
    ),
    _Refusal(
        lambda engine: bool(getattr(engine, "is_deepcompile_active", bool)()),
        "DeepCompile gathers parameters in compiled code that cannot be told to forget",
        "turn it off",
        _read("compile/init_z3.py"),
    ),
    _Refusal(
        _unknown_optimizer,
        "its optimizer class is not known here, so the masters cannot be found",
        "use ZeRO 1, 2 or 3 with bf16, fp16 or fp32 and an ordinary optimizer",
        _read("runtime/base_optimizer.py"),
    ),
)
