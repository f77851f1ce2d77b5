"""What is relied on of Lightning, in both of its packages, `lightning.pytorch` and `pytorch_lightning`.

Their classes differ and their code is the same, so nothing here asks which package a trainer is from, and classes are
known by name.

[Note: Lightning internals]
A missing one is an `EngineVersionError`, when a callback is built or at setup.

    trainer   save_checkpoint, strategy, callbacks, loggers, callback_metrics, fit_loop, global_step, is_last_batch
              interrupted, validate_loop, test_loop, world_size
    loops     epoch_loop, val_loop, _batches_that_stepped
    strategy  load_checkpoint, save_checkpoint, broadcast, model, optimizers
              _state_dict_type  FSDPStrategy
              _save_distributed_checkpoint  ModelParallelStrategy
              load_full_weights, zero_stage_3  DeepSpeedStrategy
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist

from .. import EngineVersionError
from ..integration import how_to_install, installed_version, is_too_old, requirement

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# strategy class -> the attribute that says whether it writes folders, and the value that does
_FOLDER_FLAGS = {
    "FSDPStrategy": ("_state_dict_type", "sharded"),
    "ModelParallelStrategy": ("_save_distributed_checkpoint", True),
}
_left_out: list[tuple[str, str]] = []  # (package, why): installed, and no base of our callbacks


def callback_class() -> type:
    """A class that is a `Callback` of every Lightning that is installed, and not too old."""
    bases, _left_out[:] = [], []
    for package in PACKAGES:
        if find_spec(package.partition(".")[0]) is None:
            continue
        base = _callback_of(package)
        if isinstance(base, str):
            _left_out.append((package, base))
        else:
            bases.append(base)
    if not bases:
        raise EngineVersionError(
            f"sharded_avg.lightning needs {requirement('lightning')}, and "
            f"{', '.join(f'{package} {reason}' for package, reason in _left_out) or 'none is installed'}. "
            f"Install it with: {how_to_install('lightning')}"
        )
    return type("Callback", tuple(bases), {"__doc__": "A callback of every Lightning that is installed."})


def _callback_of(package: str) -> type | str:
    """The class, or why it cannot be had. One that is too old is not imported, so that it is known who did."""
    version = getattr(sys.modules.get(package), "__version__", None) or installed_version(package.partition(".")[0])
    if version is not None and is_too_old("lightning", version):
        return f"{version} is too old"
    try:
        module = importlib.import_module(package)
        callback: type = module.Callback
    except (ImportError, AttributeError) as error:
        return f"cannot be imported: {error!r}"
    if is_too_old("lightning", version := getattr(module, "__version__", "")):  # another copy than was installed
        return f"{version} is too old"
    return callback


def tell_left_out() -> None:
    """Warn once where the user's program has imported a Lightning whose trainers would not know our callbacks."""
    for package, reason in [left for left in _left_out if left[0] in sys.modules]:
        _left_out.remove((package, reason))
        name = "pytorch-lightning" if package == "pytorch_lightning" else "lightning"
        warnings.warn(
            f"{package} {reason}, and has been imported: its Trainer will not take this for a callback, and may train "
            f"without averaging. Use the other Lightning that is installed, or {how_to_install(name)}",
            stacklevel=3,
        )


def is_named(thing: object, name: str) -> bool:
    """Whether `thing` is an instance of the Lightning class `name`, or of a subclass of it."""
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def writes_folder(strategy: Any) -> bool:
    """Whether this strategy's checkpoints are folders, to which every rank adds its part."""
    if is_named(strategy, "DeepSpeedStrategy"):
        return True
    for name, (attribute, value) in _FOLDER_FLAGS.items():
        if is_named(strategy, name):
            return bool(need(strategy, attribute) == value)
    return False


def loads_by_itself(strategy: Any) -> bool:
    """Whether `load_checkpoint` puts the weights into the model, instead of handing them to Lightning."""
    if is_named(strategy, "DeepSpeedStrategy"):
        return not (need(strategy, "load_full_weights") and need(strategy, "zero_stage_3"))
    return any(is_named(strategy, name) for name in _FOLDER_FLAGS)


def collects_together(strategy: Any) -> bool:
    """Whether all ranks must take part in collecting what a checkpoint has of model and optimizers."""
    return any(is_named(strategy, name) for name in ("DeepSpeedStrategy", *_FOLDER_FLAGS))


def job_group(trainer: Any) -> dist.ProcessGroup | None:
    """All ranks of this trainer; `None` if it has one."""
    return dist.group.WORLD if trainer.world_size > 1 and dist.is_initialized() else None


def spans_rank_0(group: dist.ProcessGroup | None) -> bool:
    """Whether this rank is of the part of the job that rank 0 is of: a mesh may have the model once more elsewhere."""
    return group is None or 0 in dist.get_process_group_ranks(group)


def evaluation_loops(trainer: Any) -> list[Any]:
    """The loops that validate and test, during fit and alone."""
    fit_loop = need(need(trainer.fit_loop, "epoch_loop"), "val_loop")
    return [fit_loop, trainer.validate_loop, trainer.test_loop]


def need(owner: Any, name: str) -> Any:
    """An attribute of Lightning that this package relies on."""
    if not hasattr(owner, name):
        versions = [f"{p} {v}" for p in PACKAGES if (v := getattr(sys.modules.get(p), "__version__", None))]
        raise EngineVersionError(
            f"{' / '.join(versions) or 'this Lightning'} has no {type(owner).__name__}.{name}, which "
            f"sharded_avg.lightning relies on; install {requirement('lightning')}, or a newer sharded_avg"
        )
    return getattr(owner, name)


def check(trainer: Any) -> None:
    """Raise `EngineVersionError` now if something is missing that would be needed in the middle of a run."""
    for name in ("save_checkpoint", "strategy", "callbacks", "loggers", "callback_metrics", "fit_loop", "global_step"):
        need(trainer, name)
    for name in ("is_last_batch", "interrupted"):
        need(trainer, name)
    for name in ("load_checkpoint", "save_checkpoint", "broadcast", "model", "optimizers"):
        need(trainer.strategy, name)
    need(trainer.fit_loop.epoch_loop, "_batches_that_stepped")
    writes_folder(trainer.strategy)
    evaluation_loops(trainer)
