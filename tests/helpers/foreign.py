"""Checkpoints of other tools, made by hand from their documented keys: one builder for each format.

Sample   where the file is, the average that is in it (every value differs from the raw one), and what it records

docs/formats.md says which of these layouts were also held against files that the tools themselves wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
SHAPES = {"net.0.weight": (5, 3), "net.0.bias": (5,), "net.1.scale": (1,), "head.weight": (2, 7, 3)}


def state(offset: float, dtype: torch.dtype = torch.float32) -> State:
    """Values that no other offset has."""
    values = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        values[name] = (offset + 10 * number + torch.arange(count) / 64).reshape(shape).to(dtype)
    return values


AVERAGE, RAW = state(0.5), state(500.25)
NAMES = list(SHAPES)


def prefixed(prefix: str, values: State) -> State:
    return {prefix + name: value for name, value in values.items()}


@dataclass(frozen=True)
class Sample:
    path: Path
    average: State = field(default_factory=lambda: dict(AVERAGE))
    facts: dict[str, Any] = field(default_factory=dict)
    needs_names: bool = False


Builder = Callable[[Path], Sample]
BUILDERS: dict[str, tuple[str, Builder]] = {}  # a name for the sample -> its format, and how to make it


def sample(format: str, name: str | None = None) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS[name or format] = format, builder
        return builder

    return register


def saved(folder: Path, content: Any, name: str = "file.pt", **kwargs: Any) -> Sample:
    torch.save(content, folder / name)
    return Sample(folder / name, **kwargs)


def as_dcp(folder: Path, content: dict[str, Any]) -> Path:
    dcp.save(content, checkpoint_id=str(folder / "dcp"))
    return folder / "dcp"


@sample("averaged_model")
def _(folder: Path) -> Sample:
    content = {"n_averaged": torch.tensor(4), **prefixed("module.", AVERAGE)}
    return saved(folder, content, facts={"n_averaged": 4})


@sample("averaged_model", "averaged_model beside the raw model")
def _(folder: Path) -> Sample:
    content = {"model": RAW, "swa_model": {"n_averaged": torch.tensor(4), **prefixed("module.", AVERAGE)}}
    return saved(folder, content, facts={"n_averaged": 4})


@sample("averaged_model", "averaged_model as a submodule (SimpleFold)")
def _(folder: Path) -> Sample:
    ema = prefixed("model_ema.", {"n_averaged": torch.tensor(4), **prefixed("module.", AVERAGE)})
    return saved(folder, {"state_dict": {**prefixed("model.", RAW), **ema}, "epoch": 1}, facts={"n_averaged": 4})


@sample("averaged_model", "averaged_model of a wrapped, compiled model")
def _(folder: Path) -> Sample:
    wrapped = prefixed("module._orig_mod._fsdp_wrapped_module.", AVERAGE)
    return saved(folder, {"n_averaged": torch.tensor(4), **wrapped}, facts={"n_averaged": 4})


@sample("lightning")
def _(folder: Path) -> Sample:
    content = {
        "state_dict": AVERAGE,
        "current_model_state": RAW,
        "averaging_state": {"n_averaged": torch.tensor(7)},
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": 7}},
        "global_step": 9,
    }
    return saved(folder, content, "last.ckpt", facts={"n_averaged": 7, "step": 9})


@sample("lightning_swa")
def _(folder: Path) -> Sample:
    swa = {"n_averaged": 2, "latest_update_epoch": 3, "scheduler_state": None, "average_model_state": AVERAGE}
    content = {"state_dict": RAW, "callbacks": {"StochasticWeightAveraging": swa}, "global_step": 9}
    return saved(folder, content, "last.ckpt", facts={"n_averaged": 2, "step": 9, "rule": {"kind": "SWA"}})


def nemo(ema: list[Tensor]) -> list[dict[str, Any]]:
    return [{"opt": {}, "ema": tuple(ema), "current_step": 12, "decay": 0.99, "every_n_steps": 5}]


NEMO_FACTS = {"step": 12, "n_averaged": 3, "rule": {"kind": "EMA", "decay": 0.99}}


@sample("nemo")
def _(folder: Path) -> Sample:
    content = {"state_dict": AVERAGE, "optimizer_states": nemo(list(AVERAGE.values())[:2])}
    return saved(folder, content, "x-EMA.ckpt", facts=NEMO_FACTS)


@sample("nemo", "nemo without its checkpoint callback: state_dict is raw")
def _(folder: Path) -> Sample:
    content = {"state_dict": RAW, "optimizer_states": nemo(list(AVERAGE.values()))}
    return saved(folder, content, "x.ckpt", facts=NEMO_FACTS, needs_names=True)


@sample("lit_ema")
def _(folder: Path) -> Sample:
    dotless = {f"model_ema.{name.replace('.', '')}": value for name, value in AVERAGE.items()}
    counts = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(6, dtype=torch.int32)}
    content = {**prefixed("model.", RAW), **dotless, **counts, "first_stage.weight": torch.zeros(2)}
    facts = {"n_averaged": 6, "rule": {"kind": "EMA", "decay": 0.5}}
    return saved(folder, {"state_dict": content}, "sd.ckpt", average=prefixed("model.", AVERAGE), facts=facts)


@sample("ema_pytorch")
def _(folder: Path) -> Sample:
    content = {
        "initted": torch.tensor(True),
        "step": torch.tensor(11),
        **prefixed("online_model.", RAW),
        **prefixed("ema_model.", AVERAGE),
    }
    return saved(folder, content, facts={"step": 11})


@sample("ema_pytorch", "ema_pytorch, post hoc: all in fp16")
def _(folder: Path) -> Sample:
    content = {
        "initted": torch.tensor(1.0, dtype=torch.float16),
        "step": torch.tensor(4099, dtype=torch.float16),
        **prefixed("ema_model.", state(0.5, torch.float16)),
    }
    return saved(folder, content, "1.4099.pt", average=state(0.5, torch.float16), facts={"step": 4099})


@sample("torch_ema")
def _(folder: Path) -> Sample:
    content = {"decay": 0.5, "num_updates": 3, "shadow_params": list(AVERAGE.values()), "collected_params": None}
    facts = {"n_averaged": 3, "rule": {"kind": "EMA", "decay": 0.5}}
    return saved(folder, content, needs_names=True, facts=facts)


@sample("torch_ema", "torch_ema while swapped: collected_params are raw")
def _(folder: Path) -> Sample:
    ema = {
        "decay": 0.5,
        "num_updates": 3,
        "shadow_params": list(AVERAGE.values()),
        "collected_params": list(RAW.values()),
    }
    return saved(folder, {"model": AVERAGE, "ema": ema}, needs_names=True, facts={"n_averaged": 3})


DIFFUSERS = {
    "decay": 0.99,
    "min_decay": 0.0,
    "optimization_step": 30,
    "update_after_step": 10,
    "use_ema_warmup": False,
    "inv_gamma": 1.0,
    "power": 2 / 3,
}


def pretrained(folder: Path, config: dict[str, Any], values: State) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet", **config}))
    save_file(values, folder / "diffusion_pytorch_model.safetensors")
    return folder


@sample("diffusers")
def _(folder: Path) -> Sample:
    facts = {"step": 30, "n_averaged": 20, "rule": {"kind": "EMA", "decay": 0.99}}
    return Sample(pretrained(folder / "unet_ema", DIFFUSERS, AVERAGE), facts=facts)


@sample("diffusers", "diffusers, the folder above")
def _(folder: Path) -> Sample:
    pretrained(folder / "run" / "unet_ema", DIFFUSERS, AVERAGE)
    pretrained(folder / "run" / "unet", {}, RAW)
    return Sample(folder / "run", facts={"n_averaged": 20})


@sample("diffusers_state")
def _(folder: Path) -> Sample:
    content = {**DIFFUSERS, "shadow_params": list(AVERAGE.values())}
    return saved(folder, content, needs_names=True, facts={"step": 30, "n_averaged": 20})


@sample("diffusers_state", "SimpleTuner: numbered keys")
def _(folder: Path) -> Sample:
    numbered = {f"shadow_params.{i}": value for i, value in enumerate(AVERAGE.values())}
    return saved(folder, {**DIFFUSERS, **numbered}, "ema_model.pt", needs_names=True, facts={"n_averaged": 20})


@sample("ema_file")
def _(folder: Path) -> Sample:
    save_file(RAW, folder / "model.safetensors")
    save_file(AVERAGE, folder / "ema.safetensors")
    return Sample(folder / "ema.safetensors")


@sample("ema_file", "ema_file, the folder above")
def _(folder: Path) -> Sample:
    save_file(RAW, folder / "model.safetensors")
    save_file(AVERAGE, folder / "ema.safetensors")
    return Sample(folder)


@sample("ema_file", "a pretrained folder beside the raw one")
def _(folder: Path) -> Sample:
    pretrained(folder / "model", {}, RAW)
    return Sample(pretrained(folder / "model_ema", {}, AVERAGE))


def composer(model: State, algorithms: list[Any]) -> dict[str, Any]:
    timestamp = {"Timestamp": {"epoch": 1, "batch": 8}}
    return {"state": {"model": model, "timestamp": timestamp, "algorithms": algorithms}, "rng": []}


def composer_ema(values: State, *, active: bool, started: bool = True) -> list[Any]:
    dicts = {"named_parameters_dict": values, "named_buffers_dict": {}}
    return [("EMA", {"repr": "EMA()", "ema_model": dicts, "ema_weights_active": active, "ema_started": started})]


@sample("composer")
def _(folder: Path) -> Sample:
    return saved(folder, composer(RAW, composer_ema(AVERAGE, active=False)), facts={"step": 8})


@sample("composer", "composer while the EMA is swapped in: the algorithm holds raw weights")
def _(folder: Path) -> Sample:
    return saved(folder, composer(AVERAGE, composer_ema(RAW, active=True)))


@sample("composer", "composer before 0.13")
def _(folder: Path) -> Sample:
    ema = {"ema_model": AVERAGE, "training_model": RAW, "ema_weights_active": False, "ema_started": True}
    return saved(folder, composer(RAW, [("EMA", ema)]))


@sample("composer", "composer's SWA")
def _(folder: Path) -> Sample:
    swa_model = {"n_averaged": torch.tensor(3), **prefixed("module.", AVERAGE)}
    swa = {"swa_model": swa_model, "swa_completed": False, "swa_started": True, "swa_scheduler": None}
    return saved(folder, composer(RAW, [("SWA", {**swa, "step_counter": 3})]), facts={"n_averaged": 3, "step": 8})


@sample("mmengine")
def _(folder: Path) -> Sample:
    content = {
        "meta": {"iter": 40, "epoch": 2},
        "state_dict": AVERAGE,
        "ema_state_dict": {"steps": torch.tensor(20), **prefixed("module.", RAW)},
        "optimizer": {},
    }
    return saved(folder, content, "epoch_2.pth", facts={"n_averaged": 20, "step": 40})


@sample("fairseq")
def _(folder: Path) -> Sample:
    low = {name: value.to(torch.bfloat16) for name, value in AVERAGE.items()}
    fp32 = dict(list(AVERAGE.items())[:3])
    average = {**low, **fp32}
    return saved(folder, {"model": RAW, "extra_state": {"ema": low, "ema_fp32_params": fp32}}, average=average)


def entry(format: str, content: dict[str, Any], name: str | None = None) -> None:
    sample(format, name)(lambda folder: saved(folder, content))


entry("timm", {"state_dict": RAW, "state_dict_ema": AVERAGE, "epoch": 3, "arch": "x"})
entry("timm", {"state_dict": RAW, "model_ema": prefixed("module.", AVERAGE)}, "timm, legacy")
entry("d2go", {"model": RAW, "ema_state": AVERAGE})
entry("long_live", {"generator": RAW, "generator_ema": prefixed("_fsdp_wrapped_module.", AVERAGE)})
entry("infinity", {"gpt_wo_ddp": RAW, "gpt_ema_for_vis": AVERAGE})
entry("basicsr", {"params": RAW, "params_ema": AVERAGE})
entry("dino", {"student": RAW, "teacher": AVERAGE, "dino_loss": {"center": torch.zeros(1, 3)}})
entry("dino", {"teacher": AVERAGE}, "dino, for evaluation")
entry("ema_entry", {"model": RAW, "ema": AVERAGE, "updates": 5})
entry("ema_entry", {"model": RAW, "ema": {"module": AVERAGE, "updates": 5}}, "ema_entry with module")
entry("ema_entry", {"state_dict": RAW, "ema_state_dict": AVERAGE}, "ema_entry: ema_state_dict")
entry("cosmos", {**prefixed("net.", RAW), **prefixed("net_ema.", AVERAGE)})


@sample("cosmos", "cosmos, DCP")
def _(folder: Path) -> Sample:
    return Sample(as_dcp(folder, {**prefixed("net.", RAW), **prefixed("net_ema.", AVERAGE)}))


@sample("dinov3")
def _(folder: Path) -> Sample:
    model = {**prefixed("student.", RAW), **prefixed("teacher.", RAW), **prefixed("model_ema.", AVERAGE)}
    return Sample(as_dcp(folder, {"iteration": 5, "model": model, "optimizer": {}}))


@sample("torchtitan")
def _(folder: Path) -> Sample:
    ema = {f"ema_optimizer.state.{name}.ema_params": value for name, value in AVERAGE.items()}
    return Sample(as_dcp(folder, {**RAW, **ema, "ema_optimizer.param_groups.step": 7}))


@sample("torchtitan", "torchtitan since August 2026: buffers among them")
def _(folder: Path) -> Sample:
    average = {**AVERAGE, "norm.running_mean": torch.full((5,), 0.25)}
    ema = {f"ema.state.{name}.ema_params": value for name, value in average.items()}
    raw = {**RAW, "norm.running_mean": torch.full((5,), 500.0)}
    return Sample(as_dcp(folder, {**raw, **ema, "ema.param_groups.step": 7}), average=average)


@sample("ema_pytorch", "F5-TTS: a released safetensors file")
def _(folder: Path) -> Sample:
    counts = {"step": torch.tensor(5), "initted": torch.tensor(True)}
    save_file({**prefixed("ema_model.", AVERAGE), **counts}, folder / "model.safetensors")
    return Sample(folder / "model.safetensors", facts={"step": 5})


def flat(node: Any, path: str = "") -> State:
    """What a safetensors file can hold of an object: tensors, and numbers as tensors, under keys joined by dots."""
    if isinstance(node, Tensor):
        return {path: node.contiguous()}
    if isinstance(node, (bool, int, float)):
        return {path: torch.tensor(node, dtype=torch.float64 if isinstance(node, float) else None)}
    if not isinstance(node, (dict, list, tuple)):
        return {}
    found: State = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found |= flat(value, f"{path}.{key}" if path else str(key))
    return found
