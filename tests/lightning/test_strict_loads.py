"""R09: whatever a strict load needs is in Lightning's checkpoints: `_extra_state`, parameters without elements."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_avg import load_averaged_state_dict
from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny
from .runs import module, run, trainer
from .strategies import STRATEGIES

FP8_STATE = torch.tensor([1, 2, 3], dtype=torch.uint8)


class Remembering(nn.Module):
    """State of its own, as modules of TransformerEngine have: bytes, or objects, or nothing yet."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Strict(Tiny):
    """With extra states, and a buffer without elements."""

    def _make_layers(self) -> None:
        super()._make_layers()
        self.fp8, self.other = Remembering(FP8_STATE.clone()), Remembering({"scale": 0.5})
        self.register_buffer("nothing", torch.empty(0))


class StrictAndEmpty(Strict):
    """With a parameter without elements, too: FSDP and ZeRO 3 cannot train one."""

    def _make_layers(self) -> None:
        super()._make_layers()
        self.none = nn.Parameter(torch.empty(0, 3))

    def _loss(self, batch: Any) -> Tensor:
        return super()._loss(batch) + self.none.sum()


# DeepSpeed 0.16 flattens a parameter without elements.
KEEPING_SHAPES = () if find_spec("deepspeed") is None or version("deepspeed").startswith("0.16") else ("deepspeed_2",)


def kind_for(name: str) -> type[Strict]:
    return StrictAndEmpty if name in ("single", "ddp", *KEEPING_SHAPES) else Strict


def saved_and_loaded(tmp_path: Path, name: str) -> dict[str, Any]:
    path, ours = tmp_path / "end.ckpt", EMAWeightAveraging(decay=0.5)
    fitted = trainer(tmp_path, name, [ours], max_epochs=1)
    fitted.fit(module(name, kind_for(name)))
    fitted.save_checkpoint(path)
    if name == "fsdp_sharded":  # Lightning cannot read objects back into FSDP1's own state, with or without a callback
        return {"resumed": 2 * NUM_BATCHES}
    resumed_ours = EMAWeightAveraging(decay=0.5)
    resumed = trainer(tmp_path, name, [resumed_ours], max_epochs=2)
    resumed.fit(module(name, kind_for(name)), ckpt_path=path)
    return {"resumed": resumed_ours.average.n_averaged}


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp_full", "fsdp_sharded", "fsdp2", "deepspeed_2", "deepspeed_3"])
def test_what_a_strict_load_needs(name: str, tmp_path: Path) -> None:
    """R09: saved, resumed, and loaded into a plain module that knows nothing yet."""
    for found in run(name, saved_and_loaded, tmp_path, name=name):
        assert found["resumed"] == 2 * NUM_BATCHES
    fresh, path = module("single", kind_for(name)), tmp_path / "end.ckpt"
    for remembering in (fresh.fp8, fresh.other):
        remembering.state = None
    fresh.load_state_dict(load_averaged_state_dict(path))
    assert torch.equal(fresh.fp8.state, FP8_STATE)
    assert fresh.other.state == {"scale": 0.5}
    if not STRATEGIES[name].writes_folder:
        again = kind_for(name).load_from_checkpoint(path, strict=True)
        assert torch.equal(again.fp8.state, FP8_STATE)
        assert again.other.state == {"scale": 0.5}
