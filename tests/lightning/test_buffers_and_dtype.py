"""In which dtype the callbacks keep an average, and which buffers they average."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sharded_avg import ConfigError
from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging

from .modules import NUM_BATCHES, Tiny
from .runs import Recorder, module, run, trainer

DECAY = 0.75
Weights = dict[str, Tensor]


class Spectral(Tiny):
    """With statistics, whose mean is one, and unit vectors and masks, which have none."""

    def _make_layers(self) -> None:
        super()._make_layers()
        self.head = parametrizations.spectral_norm(nn.Linear(7, 3))


class Double(Tiny):
    """In float64."""

    def _make_layers(self) -> None:
        super()._make_layers()
        self.double()

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return super()._loss((x.double(), y.double()))


def plain_average(weights: dict[int, Weights], dtype: torch.dtype | None = None) -> Weights:
    """By torch alone, in the weights' dtype or another."""
    average = {key: value.to(dtype or value.dtype) for key, value in weights[1].items() if value.is_floating_point()}
    for step in range(2, len(weights) + 1):
        for key, value in average.items():
            torch._foreach_lerp_([value], [weights[step][key].to(value.dtype)], 1 - DECAY)
    return average


def fit(tmp_path: Path, name: str, kind: Any, options: dict[str, Any], **settings: Any) -> dict[str, Any]:
    ours, recorder = EMAWeightAveraging(decay=DECAY, end_with="raw", **settings), Recorder()
    fitted = trainer(tmp_path, name, [recorder, ours], max_epochs=1)
    fitted.fit(module(name, kind, **options))
    with ours.average.summon_full_params(rank0_only=False) as full:
        average = {key: value.clone() for key, value in full.items()}
    return {"average": average, "steps": {step: weights for step, weights in recorder.weights.items() if step}}


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_float64_weights_are_averaged_in_float64(name: str, tmp_path: Path) -> None:
    """R08: mace#249, by default."""
    for found in run(name, fit, tmp_path, name=name, kind=Double, options={}):
        expected = plain_average(found["steps"])
        assert expected["head.bias"].dtype == torch.float64
        for key, value in expected.items():
            assert torch.equal(found["average"][key], value), key


@pytest.mark.own_processes
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("auto", torch.float32), ("float64", torch.float64), (torch.bfloat16, torch.bfloat16), (None, torch.float32)],
)
def test_the_dtype_of_the_average(dtype: Any, kept: torch.dtype, tmp_path: Path) -> None:
    """R08: an argument, by name as a YAML file has it, too."""
    found = fit(tmp_path, "single", Tiny, {}, dtype=dtype)
    for key, value in plain_average(found["steps"], kept).items():
        assert found["average"][key].dtype == kept
        assert torch.equal(found["average"][key], value), key


@pytest.mark.own_processes
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "fp33", torch.int32, 32])
def test_a_dtype_that_cannot_be(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype="):
        WeightAveraging(dtype=dtype)


@pytest.mark.own_processes
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's calls
def test_both_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
        trainer:
          accelerator: cpu
          logger: false
          callbacks:
            class_path: sharded_avg.lightning.EMAWeightAveraging
            init_args: {dtype: float64, buffers: {"*.running_*": average}}
        """
    )
    monkeypatch.setattr(sys, "argv", ["train"])
    cli = LightningCLI(
        Tiny, run=False, save_config_callback=None, seed_everything_default=False, args=["--config", str(config)]
    )
    (ours,) = (one for one in cli.trainer.callbacks if isinstance(one, WeightAveraging))
    assert (ours.dtype, ours.buffers) == (torch.float64, {"*.running_*": "average"})


STATISTICS = {"norm.running_mean", "norm.running_var"}
POLICIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all": ({}, {*STATISTICS, "shift"}),
    "none": ({"use_buffers": False}, set()),
    "a pattern": ({"buffers": {"*.running_*": "average"}}, STATISTICS),
    "a pattern, and not all": ({"buffers": {"*.running_mean": "copy", "*": "average"}}, {"norm.running_var", "shift"}),
    "a predicate": ({"buffers": lambda name, tensor: tensor.shape == (5,) and "norm" not in name}, {"shift"}),
    "by name": ({"buffers": "average", "use_buffers": False}, {*STATISTICS, "shift"}),
}


@pytest.mark.own_processes
@pytest.mark.parametrize("policy", POLICIES)
def test_which_buffers_are_averaged(policy: str, tmp_path: Path) -> None:
    """R19, P40: by `use_buffers`, by pattern or by predicate; unit vectors of a power iteration never are."""
    settings, averaged = POLICIES[policy]
    found = fit(tmp_path, "single", Spectral, {"norm": True}, **settings)
    last, means = found["steps"][NUM_BATCHES], plain_average(found["steps"])
    buffers = dict(module("single", Spectral, norm=True).named_buffers())
    vectors = {key for key in buffers if key.endswith(("._u", "._v"))}
    assert vectors
    for key in buffers:
        expected = means[key] if key in averaged else last[key]
        assert torch.equal(found["average"][key], expected), key
    for key in vectors:
        assert not torch.equal(means[key], last[key])
        assert torch.linalg.vector_norm(found["average"][key]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_by_pattern_on_ranks(name: str, tmp_path: Path) -> None:
    """R19: alike on all ranks."""
    settings = {"buffers": {"shift": "average"}}
    for found in run(name, fit, tmp_path, name=name, kind=Tiny, options={"norm": True}, **settings):
        last, means = found["steps"][NUM_BATCHES], plain_average(found["steps"])
        assert torch.equal(found["average"]["shift"], means["shift"])
        for key in STATISTICS:
            assert torch.equal(found["average"][key], last[key])


@pytest.mark.own_processes
@pytest.mark.parametrize("buffers", ["mean", {"*": True}, {1: "average"}, 3])
def test_a_policy_that_cannot_be(buffers: Any) -> None:
    with pytest.raises(ConfigError, match="buffers="):
        WeightAveraging(buffers=buffers)


@pytest.mark.own_processes
def test_a_build_for_an_accelerator_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R17: as torch from PyPI on a login node: it names the accelerator that it was built for, and cannot start it."""

    def no_driver(*_: Any) -> Any:
        raise RuntimeError("Found no NVIDIA driver on your system")

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in ("current_device_index", "current_device_idx", "synchronize"):
        monkeypatch.setattr(torch.accelerator, name, no_driver)
    ours, model = EMAWeightAveraging(decay=DECAY, evaluate_with="both"), module("single", norm=True)
    fitted = trainer(tmp_path, "single", [ours], max_epochs=1)
    fitted.fit(model)
    fitted.test(model, verbose=False)
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    resumed = EMAWeightAveraging(decay=DECAY)
    trainer(tmp_path, "single", [resumed]).fit(module("single", norm=True), ckpt_path=tmp_path / "end.ckpt")
    assert resumed.average.n_averaged == 2 * NUM_BATCHES
