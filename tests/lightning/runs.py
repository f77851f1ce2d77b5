"""Trainer runs: where they happen, with which settings, and what their weights have become.

trainer       a quiet Trainer of one of the STRATEGIES
module        what it trains
run           a body on all ranks of a strategy, wherever these are
full_weights  the whole state of a live model, by the engine's own means and without this package
Recorder      a callback that keeps full_weights after every optimizer step
"""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn

from tests.helpers.excepted_warnings import settings_of_a_child
from tests.helpers.launch import run_python
from tests.helpers.pool import run_on_ranks

from .modules import OLDER_TORCH, Tiny, TinyHooks, of_package
from .strategies import LIGHTNING, STRATEGIES

SPAWNING_S = 280.0  # on an idle machine 20 s
QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,  # until a ModelCheckpoint is among the callbacks
    "logger": False,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,  # the data already is what each rank should see
    "max_epochs": 2,
}


def trainer(
    tmp_path: Path,
    strategy_name: str,
    callbacks: Sequence[Any] = (),
    *,
    package: str = LIGHTNING,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A Trainer for the ranks of this strategy. `options` go to the strategy, `kwargs` to the Trainer."""
    row, lightning = STRATEGIES[strategy_name], importlib.import_module(package)
    settings = QUIET | {"default_root_dir": tmp_path} | kwargs
    if any(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks):
        settings["enable_checkpointing"] = True
    if row.where == "here":  # also where torchrun started this process
        environments = importlib.import_module(f"{package}.plugins.environments")
        settings["plugins"] = [*settings.get("plugins", []), environments.LightningEnvironment()]
    return lightning.Trainer(
        accelerator="cpu",
        devices=row.world_size,
        strategy=row.make(package, **(row.options | (options or {}))),
        callbacks=list(callbacks),
        **settings,
    )


def module(strategy_name: str, kind: type[TinyHooks] = Tiny, *, package: str = LIGHTNING, **options: Any) -> Any:
    """A new module of this kind, ready for the strategy."""
    return of_package(kind, package)(by_hand=STRATEGIES[strategy_name].by_hand, **options)


def run(strategy_name: str, body: Callable[..., Any], /, tmp_path: Path, **arguments: Any) -> list[Any]:
    """What the module-level `body(tmp_path=..., **arguments)` returned on each rank of the strategy, in rank order.

    Where the strategy makes its ranks itself, `body` runs once, and they exist only while its Trainers run.
    """
    row = STRATEGIES[strategy_name]
    if row.where == "here":
        return [body(tmp_path=tmp_path, **arguments)]
    if row.where == "fresh":
        return [_run_fresh(body, tmp_path, arguments)]
    # DeepSpeed and meshes of two dims keep groups for the next run; older DTensors those of any mesh.
    called = _called if row.where == "deepspeed" or row.world_size > 3 or OLDER_TORCH else _end_its_groups
    arguments |= {"tmp_path": tmp_path}
    return run_on_ranks(row.world_size, called, kind=row.where, body=body, arguments=arguments)


def _called(body: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """On a rank. Its arguments may have any name."""
    return body(**arguments)


def _end_its_groups(body: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """On a rank. A Trainer makes the groups of its mesh anew, each with threads: hundreds, before a pool retires."""
    groups = dist.distributed_c10d._world.pg_map
    before = list(groups)
    value = body(**arguments)
    dist.barrier()  # nobody is in one of them
    for group in [group for group in groups if group not in before]:
        dist.destroy_process_group(group)
    return value


def _run_fresh(body: Callable[..., Any], tmp_path: Path, arguments: dict[str, Any]) -> Any:
    job, answer = tmp_path / "job.pickle", tmp_path / "answer.pickle"
    job.write_bytes(pickle.dumps((body.__module__, body.__qualname__, arguments | {"tmp_path": tmp_path})))
    finished = run_python(["-m", __name__, str(job), str(answer)], tmp_path, timeout_s=SPAWNING_S)
    assert finished.code == 0, finished.output
    return pickle.loads(answer.read_bytes())


def _main(job: str, answer: str) -> None:
    torch.set_num_threads(1)
    module, name, arguments = pickle.loads(Path(job).read_bytes())
    torch.manual_seed(0)
    value = getattr(importlib.import_module(module), name)(**arguments)
    Path(answer).write_bytes(pickle.dumps(value))


def _warn_like_pytest() -> None:
    """The processes that a strategy spawns import this file, too: what warns in them fails them."""
    from _pytest.config import apply_warning_filters

    apply_warning_filters(settings_of_a_child().getini("filterwarnings"), [])


class Recorder(Callback):
    """Keeps the full raw weights after every batch that ended with a step, by global step. Every rank has them all."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step not in self.weights:
            self.weights[trainer.global_step] = full_weights(trainer)


def full_weights(trainer: Any) -> dict[str, Tensor]:
    """Collective. Copies of all parameters and persistent buffers of the live model, by the names of the user's module.

    Under ZeRO these are the fp32 masters while there is an optimizer that owns them. An engine that only evaluates has
    none, although its parameters still refer to those of the engine that trained them.
    """
    model = trainer.strategy.model
    has_masters = any(getattr(model, "optimizer", None) is optimizer for optimizer in trainer.strategy.optimizers)
    full = {_plain(name): _whole(tensor) for name, tensor in _stateful(model).items()}
    for name, param in _parameters(model).items():
        if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
            full[name] = _zero_param(param, has_masters)
    full.update(_fsdp1_params(model))
    return full


def _stateful(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones under each name. No state_dict: engines hook into that."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): param for name, param in model.named_parameters(remove_duplicate=False)}


def _plain(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.").removeprefix("_forward_module.")


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def _zero_param(param: nn.Parameter, has_masters: bool) -> Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(param) if has_masters and param.requires_grad else None
    if master is not None:
        return master.detach().clone()
    if not hasattr(param, "ds_id"):
        return param.detach().clone()
    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def _fsdp1_params(model: nn.Module) -> dict[str, Tensor]:
    """Flat parameters gathered and cut by hand."""
    full: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        handle = getattr(module, "_handle", None)
        if handle is None:
            continue
        flat, shard = handle.flat_param, handle.flat_param._local_shard.detach()
        pieces = [torch.empty_like(shard) for _ in range(dist.get_world_size(handle.process_group))]
        dist.all_gather(pieces, shard, group=handle.process_group)
        values, start = torch.cat(pieces), 0
        for numel, shape, info in _flat_rows(flat):
            if info is not None:
                full[_plain(f"{prefix}.{info}" if prefix else info)] = values[start : start + numel].view(shape).clone()
            start += numel
        shared = {_plain(f"{prefix}.{p.module_name}.{p.param_name}"): p for p in flat._shared_param_infos}
        for name, p in shared.items():
            full[name] = full[_plain(f"{prefix}.{p.prim_module_name}.{p.prim_param_name}")].clone()
    return full


def _flat_rows(flat: Any) -> list[tuple[int, Any, str | None]]:
    """Elements, shape and name of each stretch of a flat parameter; padding has no name."""
    named = iter(zip(flat._shapes, flat._fqns, strict=True))
    rows: list[tuple[int, Any, str | None]] = []
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        shape, name = (None, None) if is_padding else next(named)
        rows.append((numel, shape, name))
    return rows


if __name__ in ("__main__", "__mp_main__"):
    _warn_like_pytest()
if __name__ == "__main__":
    _main(*sys.argv[1:])
