"""R14: what a module keeps for itself is the last source's in a merge, of whatever kind and length it is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from sharded_avg.commands.cli import main
from sharded_avg.formats.open import load_averaged_state_dict, open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def state(number: int, extra: Any) -> dict[str, Any]:
    return {"l.weight": torch.full((3, 3), float(number)), "l._extra_state": extra}


def written(kind: str, number: int, extra: Any, folder: Path) -> str:
    path = folder / f"{number}{kind}"
    if kind == ".safetensors":
        safetensors.torch.save_file(state(number, extra), path)
    elif kind == ".pt":
        torch.save(state(number, extra), path)
    elif kind == ".average.pt":  # torch.optim.swa_utils.AveragedModel
        torch.save({"n_averaged": torch.tensor(2), **{f"module.{k}": v for k, v in state(number, extra).items()}}, path)
    else:
        dcp.save(state(number, extra), checkpoint_id=path)
    return str(path)


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, io.BytesIO):
        return isinstance(right, io.BytesIO) and left.getvalue() == right.getvalue()
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


TENSORS = [
    pytest.param(lambda n: torch.arange(40 + n, dtype=torch.uint8), id="bytes"),
    pytest.param(lambda n: torch.full((n,), 70000.0), id="floats of unequal length"),
    pytest.param(lambda n: torch.full((3,), 0.1 * n, dtype=torch.float64), id="floats of equal length"),
]
OBJECTS = [
    pytest.param(lambda n: io.BytesIO(b"scales" * n), id="BytesIO"),
    pytest.param(lambda n: {"amax": [1.0] * n, "scale": torch.full((n,), 0.5)}, id="a dict"),
    pytest.param(lambda n: b"raw" * n, id="bytes"),
]


@pytest.mark.each_value
@pytest.mark.parametrize("extra", TENSORS)
@pytest.mark.parametrize("kind", [".safetensors", ".pt", ".average.pt", ".dcp"])
@pytest.mark.parametrize("out", ["x.safetensors", "x.pt", "folder"])
def test_tensors_of_unequal_length(kind, extra, out, tmp_path):
    """R14: nor is it rounded, whatever --dtype says of weights."""
    paths = [written(kind, number, extra(number), tmp_path) for number in (1, 2)]
    assert main(["merge", *paths, str(tmp_path / out), "--uniform", "--dtype", "fp16"]) == 0
    found = load_averaged_state_dict(tmp_path / out)
    assert torch.equal(found["l.weight"], torch.full((3, 3), 1.5, dtype=torch.float16))
    assert equal(found["l._extra_state"], extra(2))
    assert found["l._extra_state"].dtype == extra(2).dtype


@pytest.mark.each_value
@pytest.mark.parametrize("extra", OBJECTS)
@pytest.mark.parametrize("kind", [".pt", ".average.pt"])
@pytest.mark.parametrize("out", ["x.safetensors", "x.pt", "folder"])
def test_objects(kind, extra, out, tmp_path, capsys):
    """R14: a safetensors file has no place for one, which is told."""
    paths = [written(kind, number, extra(number), tmp_path) for number in (1, 2)]
    assert main(["merge", *paths, str(tmp_path / out), "--uniform"]) == 0
    source = open_source(tmp_path / out)
    if out == "x.safetensors":
        assert "left out, as it is no tensor: l._extra_state" in capsys.readouterr().err
        assert not source.extra
    else:
        expected = extra(2)
        found = source.extra["l._extra_state"]
        if isinstance(expected, dict):
            assert found.keys() == expected.keys()
            assert all(equal(found[key], expected[key]) for key in expected)
        else:
            assert equal(found, expected)


def test_in_one_source_only(tmp_path):
    """R14: the last source's, so none if it has none; its weights are summed all the same."""
    safetensors.torch.save_file({"l.weight": torch.zeros(3, 3)}, tmp_path / "without.safetensors")
    with_ = written(".safetensors", 2, torch.arange(5), tmp_path)
    without = str(tmp_path / "without.safetensors")
    for number, paths in enumerate(([with_, without], [without, with_])):
        out = tmp_path / f"out{number}.pt"
        assert main(["merge", *paths, str(out), "--uniform"]) == 0
        assert ("l._extra_state" in open_source(out).infos) == (number == 1)


def test_other_tensors_that_are_no_floats_are_the_last_ones(tmp_path):
    """R14: of the same kind: lists of seen samples, tables of positions."""
    for number in (1, 2):
        torch.save({"w": torch.ones(3), "seen": torch.arange(number)}, tmp_path / f"{number}.pt")
    assert main(["merge", *(str(tmp_path / f"{n}.pt") for n in (1, 2)), str(tmp_path / "x.pt"), "--uniform"]) == 0
    assert open_source(tmp_path / "x.pt").read("seen").tolist() == [0, 1]
