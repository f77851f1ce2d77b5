"""The file format is the contract: what version 1 wrote loads for ever, with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sharded_avg
from sharded_avg import ShardedAverage
from tests.golden.make import NUM_STEPS, RULES, SCHEDULE, Fuller, Golden

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = [GOLDEN / "v1"]


def expected(name: str, kind: type[Golden] = Golden) -> dict[str, torch.Tensor]:
    """Averages of the weights at steps 2 and 4, computed here."""
    states = []
    for step in (2, 4):
        model = kind()
        model.set(step)
        averaged = {key: value for key, value in model.state_dict().items() if key in Golden().state_dict()}
        states.append({key: value.clone().float() for key, value in averaged.items()})
    decay = min(0.5, (1 + 1) / (10 + 1))
    weight = {"ema": 1 - decay, "mean": 1 / 2}[name]
    return {key: value.lerp(states[1][key], weight) for key, value in states[0].items()}


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request) -> Path:
    return request.param


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_loads_into_an_average(folder):
    model = Golden()
    average = ShardedAverage(model, RULES, buffers="average", schedule=SCHEDULE)
    average.load(folder)
    assert average.n_averaged == 2
    for name in RULES:
        with average.summon_full_params(name) as full:
            assert all(torch.equal(full[key], value) for key, value in expected(name).items()), name
            assert full.keys() == expected(name).keys()
    model.set(NUM_STEPS + 1)
    assert average.update()  # step 6 is on the schedule: the position was restored
    assert average.n_averaged == 3


@pytest.mark.parametrize("name", RULES)
def test_loads_without_a_model(folder, name):
    weights = sharded_avg.load_averaged_state_dict(folder, name)
    assert all(torch.equal(weights[key], value) for key, value in expected(name).items())
    Golden().load_state_dict(weights, strict=True)


def test_the_manifest_is_what_it_was():
    """Of version 1, field by field: programs read this file."""
    manifest = json.loads((FOLDERS[0] / "manifest.json").read_text())
    assert manifest["format"] == "sharded_avg"
    assert manifest["version"] == 1
    assert manifest["step"] == NUM_STEPS
    assert manifest["averages"] == {
        "ema": {"rule": {"kind": "EMA", "decay": 0.5, "warmup": True}, "n_averaged": 2, "updates": [[2, 4, 2]]},
        "mean": {"rule": {"kind": "SWA"}, "n_averaged": 2, "updates": [[2, 4, 2]]},
    }
    assert manifest["tensors"]["low.weight"] == {"shape": [7, 5], "dtype": "float32"}
    assert manifest["tensors"]["mean"] == {"shape": [5], "dtype": "float32"}
    assert manifest["aliases"] == {"last.weight": "first.weight"}
    assert manifest["schedule"] == {"kind": "Schedule", "every_steps": 2, "start_step": 2}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", RULES)
def test_what_was_added_to_version_1(name):
    """R09: parameters without elements, frozen ones, buffers, extra state; saved by two ranks with_buffers."""
    weights = sharded_avg.load_averaged_state_dict(GOLDEN / "v1_1", name)
    fresh, last = Fuller(), Fuller()
    fresh.load_state_dict(weights, strict=True)
    last.set(NUM_STEPS)
    assert all(torch.equal(weights[key], value) for key, value in expected(name, Fuller).items())
    assert torch.equal(weights["frozen.weight"], last.frozen.weight)
    assert (weights["none"].shape, weights["count"].dtype, int(weights["count"])) == ((0, 3), torch.int64, 7)
    told = dict(fresh.told)
    assert torch.equal(told.pop("tensor"), torch.arange(5, dtype=torch.uint8))
    assert told == {"bytes": b"\x00\xff", (1, 2): [2.5, None]}
    average = ShardedAverage(fresh, RULES, buffers="average", schedule=SCHEDULE)
    assert str(average.load(GOLDEN / "v1_1")) == "all of it was loaded"
    assert average.n_averaged == 2
    manifest = json.loads((GOLDEN / "v1_1" / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["empty"] == {"none": {"shape": [0, 3], "dtype": "float32"}}
    assert list(manifest["extra"]) == ["_extra_state"]
