"""DeepSpeed ZeRO 1, 2, 3 on one rank. Nothing has to be compiled: torch's optimizer, and no op of DeepSpeed's."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from sharded_avg import EMA, ShardedAverage

from ..check import check, optional
from ..devices import is_gpu
from ..engines import Engine, Make, join_alone
from ..proof import prove
from ..reference import DECAY, ByHand, State, assert_same, batch, loss_of, net, trained

ROOM = "zero"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFLOADED = {"device": "cpu", "pin_memory": True}
KEPT_ELEMENTS = 8  # parameters up to this size stay gathered under stage 3
FIRST_SCALE_POWER = 24  # of the loss: a few steps overflow until it is small enough


def _deepspeed(device: torch.device) -> Any:
    # On a CPU DeepSpeed compiles its own communication, with paths of this environment: see tests/conftest.py.
    if not is_gpu(device):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    return optional("deepspeed")


def zero(device: torch.device, *, stage: int, dtype: str, more: dict[str, Any], **config: Any) -> Engine:
    deepspeed = _deepspeed(device)
    model = net(device)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": KEPT_ELEMENTS, **more},
    }
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings | config)[0]
    low = DTYPES[dtype]

    def learn(step: int) -> None:
        engine.backward(loss_of(engine(batch(step, device, low))))
        engine.step()

    full, working = partial(_masters, engine), partial(_working, engine)
    tolerance = 1e-5 if dtype == "fp32" else 0.05
    home = torch.device("cpu") if "offload_optimizer" in more else device
    return Engine(engine, learn, full, working, device, low, tolerance, home, engine.destroy)


def _masters(engine: Any) -> State:
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, param in trained(engine.module).items():
        master = safe_get_full_fp32_param(param).detach().to(engine.device, torch.float32, copy=True)
        found[name] = master.view(getattr(param, "ds_shape", param.shape))
    return found


def _working(engine: Any) -> State:
    params: dict[str, nn.Parameter] = trained(engine.module)
    partitioned = [param for param in params.values() if hasattr(param, "ds_id")]

    def clones() -> State:
        return {name: param.detach().clone() for name, param in params.items()}

    if not partitioned:
        return clones()
    with optional("deepspeed").zero.GatheredParameters(partitioned):
        return clones()


ENGINES: dict[str, Make] = {
    "stage1_fp32": partial(zero, stage=1, dtype="fp32", more={}),
    "stage1_bf16": partial(zero, stage=1, dtype="bf16", more={}, data_types={"grad_accum_dtype": "fp32"}),
    "stage2_bf16": partial(zero, stage=2, dtype="bf16", more={}),
    "stage2_offload": partial(zero, stage=2, dtype="bf16", more={"offload_optimizer": OFFLOADED}),
    "stage3_fp32": partial(zero, stage=3, dtype="fp32", more={}),
    "stage3_bf16": partial(zero, stage=3, dtype="bf16", more={}),
    "stage3_offload": partial(
        zero, stage=3, dtype="bf16", more={"offload_optimizer": OFFLOADED, "offload_param": OFFLOADED}
    ),
}


def _enter(name: str) -> None:
    @check("one rank: bits of the masters, swap seen by forward and undone, files", room=ROOM, name=name)
    def one_rank(device: torch.device) -> str:
        _deepspeed(device)
        join_alone(device)
        return prove(ENGINES[name], device)


for _name in ENGINES:
    _enter(_name)


@check("fp16 that overflows: a step that DeepSpeed skips is no update", room=ROOM)
def skipped_steps(device: torch.device) -> str:
    accelerator = type(_deepspeed(device).get_accelerator())
    if is_gpu(device):
        return _skipped_steps(device)
    with mock.patch.object(accelerator, "is_fp16_supported", return_value=True):  # it says no, and torch's CPUs have it
        return _skipped_steps(device)


def _skipped_steps(device: torch.device) -> str:
    join_alone(device)
    told = []
    for stage in (1, 2, 3):
        scale = {"enabled": True, "initial_scale_power": FIRST_SCALE_POWER, "hysteresis": 1, "loss_scale_window": 1000}
        made = zero(device, stage=stage, dtype="fp16", more={}, fp16=scale)
        engine: Any = made.model
        average, hand = ShardedAverage(engine, EMA(decay=DECAY, warmup=True)), ByHand()
        took = []
        for step in range(FIRST_SCALE_POWER + 4):
            skipped = engine.skipped_steps
            made.learn(step)
            took.append(average.update())
            assert took[-1] == (engine.skipped_steps == skipped), f"stage {stage}, step {step}"
            if took[-1]:
                hand.take(made.full())
        assert 0 < engine.skipped_steps < len(took), f"{engine.skipped_steps} of {len(took)} steps overflowed"
        assert average.num_steps == sum(took)
        with average.summon_full_params(offload_to_cpu=False) as full:
            assert_same(full, hand.average, f"stage {stage}")
        told.append(f"stage {stage}: {engine.skipped_steps} of {len(took)} steps skipped")
        made.close()
    return "; ".join(told)
