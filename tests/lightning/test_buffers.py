"""What else is in the model: BatchNorm, integer and bool buffers, bf16 weights, inference mode."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_avg import refreshed_batch_norm
from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny, batches
from .reference import DECAY, NUM_STEPS, Weights, assert_same, plain_average, plain_loss, plain_training
from .runs import Recorder, module, run, trainer
from .strategies import among
from .watching import Looks, full_average


class Buffers(Tiny):
    """BatchNorm; an integer and a bool buffer that must never change; what validation found in them is kept."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("index", torch.arange(512))
        self.register_buffer("mask", torch.arange(7) % 2 == 0)
        self.found: list[Weights] = []

    def on_validation_epoch_end(self) -> None:
        names = ("shift", "calls", "index", "mask", "norm.running_mean", "norm.num_batches_tracked")
        if not self.trainer.sanity_checking:
            self.found.append({name: self.get_buffer(name).clone() for name in names})


def fit_with_buffers(tmp_path: Path, name: str, use_buffers: bool, **settings: Any) -> dict[str, Any]:
    ours = EMAWeightAveraging(decay=0.9, use_buffers=use_buffers, update_every_n_steps=1 if use_buffers else 8)
    looks, model = Looks(), module(name, Buffers, norm=True)
    fitted = trainer(tmp_path, name, [ours, looks], **settings)
    fitted.fit(model)
    return {"found": model.found, "weights": looks.weights, "metrics": looks.metrics, "average": full_average(ours)}


def with_norm(weights: Weights) -> Tiny:
    model = Tiny(norm=True)
    model.load_state_dict({name: value for name, value in weights.items() if name not in ("index", "mask")})
    return model


@among("single", "ddp", "fsdp2")
def test_buffers_that_are_not_averaged(name: str, tmp_path: Path) -> None:
    """P39, L14: they are the live ones of the moment, not those of the last update, seven steps ago."""
    _, weights = plain_training(NUM_STEPS, norm=True)
    parameters = dict(Tiny(norm=True).named_parameters())
    for seen in run(name, fit_with_buffers, tmp_path, name=name, use_buffers=False):
        for number, step in enumerate((NUM_BATCHES, NUM_STEPS)):
            live = weights[step]
            for buffer in ("shift", "calls", "norm.running_mean", "norm.num_batches_tracked"):
                assert torch.equal(seen["found"][number][buffer], live[buffer])
            mixed = {key: weights[1][key] if key in parameters else value for key, value in live.items()}
            loss = plain_loss(with_norm(mixed), first=100)
            assert seen["metrics"][number]["val_loss"] == pytest.approx(loss, rel=1e-6)


@among("single", "ddp", "fsdp2", "deepspeed_2")
def test_integer_and_bool_buffers(name: str, tmp_path: Path) -> None:
    """P47, L10, L11: copied, whatever the decay; those that count are live while the average is validated."""
    _, weights = plain_training(NUM_STEPS, norm=True)
    for seen in run(name, fit_with_buffers, tmp_path, name=name, use_buffers=True):
        for found in (*seen["found"], seen["average"], seen["weights"][-1]):
            assert torch.equal(found["index"], torch.arange(512))
            assert torch.equal(found["mask"], torch.arange(7) % 2 == 0)
        assert [int(found["calls"]) for found in seen["found"]] == [NUM_BATCHES, NUM_STEPS]
        assert [int(found["norm.num_batches_tracked"]) for found in seen["found"]] == [NUM_BATCHES, NUM_STEPS]
        average = plain_average(weights, 0.9)
        assert_same(seen["found"][1], {key: seen["average"][key] for key in seen["found"][1]})
        assert_same({key: seen["average"][key] for key in average}, average)


@pytest.mark.own_processes
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_inference_mode(inference_mode: bool, use_buffers: bool, tmp_path: Path) -> None:
    """P90: what is exchanged in inference mode can be trained on."""
    settings = {"inference_mode": inference_mode, "val_check_interval": 1}
    _, weights = plain_training(NUM_STEPS, norm=True)
    seen = fit_with_buffers(tmp_path, "single", use_buffers, **settings)
    assert len(seen["weights"]) == NUM_STEPS
    for step, found in enumerate(seen["weights"], start=1):
        assert_same({key: found[key] for key in weights[step]}, weights[step])


def fit_in_bf16(tmp_path: Path, name: str) -> dict[str, Any]:
    ours, looks, recorder = EMAWeightAveraging(decay=0.99), Looks(), Recorder()
    options = {"bf16": {"enabled": True}} if name.startswith("deepspeed") else {}
    fitted = trainer(tmp_path, name, [ours, looks, recorder], options=options, precision="bf16-true")
    fitted.fit(module(name, InBf16))
    return {"steps": recorder.weights, "looks": looks.weights, "average": full_average(ours)}


class InBf16(Tiny):
    """Its loss is in fp32; DeepSpeed's engine casts no inputs of a Trainer's."""

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x.to(self.head.weight.dtype)).float() - y.float()).square().mean()


@among("single", "fsdp2", "deepspeed_2")
def test_bf16_weights_have_an_average_in_fp32(name: str, tmp_path: Path) -> None:
    """L12, P55, P56: a validation after each epoch rounds neither the average nor, under ZeRO, the masters."""
    for seen in run(name, fit_in_bf16, tmp_path, name=name):
        steps = {step: seen["steps"][step] for step in sorted(seen["steps"]) if step}
        parameters = [key for key in steps[1] if key not in ("shift", "calls")]
        wide = {step: {key: weights[key].float() for key in parameters} for step, weights in steps.items()}
        assert_same({key: seen["average"][key] for key in parameters}, plain_average(wide, 0.99))
        rounded = {key: seen["average"][key].bfloat16().float() for key in parameters}
        assert any(not torch.equal(rounded[key], seen["average"][key]) for key in parameters)
        for weights, step in zip(seen["looks"], (NUM_BATCHES, NUM_STEPS), strict=True):
            assert_same(weights, steps[step])


class Refreshed(Tiny):
    """Recomputes BatchNorm statistics for what is validated, as the guide says."""

    refresh = ExitStack()

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.refresh = ExitStack()
            self.refresh.enter_context(refreshed_batch_norm(self, batches(NUM_BATCHES)))

    def on_validation_epoch_end(self) -> None:
        self.refresh.close()


def fit_refreshed(tmp_path: Path, name: str, use_buffers: bool) -> dict[str, Any]:
    ours, looks, recorder = EMAWeightAveraging(decay=DECAY, use_buffers=use_buffers), Looks(), Recorder()
    trainer(tmp_path, name, [ours, looks, recorder]).fit(module(name, Refreshed, norm=True))
    return {"metrics": looks.metrics, "steps": recorder.weights}


@pytest.mark.each_value
@among("single", "ddp", "fsdp2")
@pytest.mark.parametrize("use_buffers", [True, False])
def test_batch_norm_refreshed_for_the_average(name: str, use_buffers: bool, tmp_path: Path) -> None:
    """P32: validated with statistics of the average's own; those of training are as if there had been none."""
    _, weights = plain_training(NUM_STEPS, norm=True)
    wanted = []
    for step in (NUM_BATCHES, NUM_STEPS):
        average = plain_average({s: weights[s] for s in range(1, step + 1)})
        model = with_norm(average if use_buffers else average | {"shift": weights[step]["shift"]})
        data: list[Any] = [x for x, _ in batches(NUM_BATCHES)]
        torch.optim.swa_utils.update_bn(data, model)
        wanted.append(plain_loss(model, first=100))
    for seen in run(name, fit_refreshed, tmp_path, name=name, use_buffers=use_buffers):
        assert [each["val_loss"] for each in seen["metrics"]] == pytest.approx(wanted, rel=1e-6)
        for step, found in weights.items():
            assert_same(seen["steps"][step], found)
