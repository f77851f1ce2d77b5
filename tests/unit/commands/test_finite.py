"""R10: infinities and NaN are not written without a word, and what is refused leaves nothing under its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sharded_avg
from sharded_avg import CheckpointError
from sharded_avg.commands.cli import main
from sharded_avg.commands.consolidate import consolidate
from sharded_avg.commands.target import Target
from sharded_avg.files import source as source_
from sharded_avg.formats.open import open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
INF, NAN = float("inf"), float("nan")


def averaged(path: Path, **values: Tensor) -> Path:
    """An average as torch.optim.swa_utils writes it."""
    torch.save({"n_averaged": torch.tensor(2), **{f"module.{name}": value for name, value in values.items()}}, path)
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    fits = torch.full((3,), 7.0)
    return averaged(tmp_path / "in.pt", a=fits, b=torch.tensor([[1.0, -70000.0, 66000.0]]), c=torch.tensor(1e9))


COMMANDS = ("consolidate", "merge", "convert")


def run(command: str, source: Path, out: Path, *more: str) -> int:
    how = ["--uniform"] if command == "merge" else []
    return main([command, str(source), str(out), *how, *more])


@pytest.mark.each_value
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("out", ["x.safetensors", "x.pt", "folder"])
def test_too_large_for_fp16(command, out, large, tmp_path, capsys, monkeypatch):
    """The tensors are named with the largest value, also where it lies in a slab that was not reached."""
    folder = tmp_path / "out"
    folder.mkdir()
    more = ["--to", "torch"] if command == "convert" and out == "x.pt" else []
    assert run(command, large, folder / out, "--dtype", "fp16", *more) == 3
    told = capsys.readouterr().err
    assert "'b' (2 of 3 values, the largest is 70000, and float16 ends at 65504)" in told
    assert "'c' (1 of 1 values, the largest is 1e+09" in told
    assert "'a'" not in told
    assert "--allow-nonfinite" in told
    assert not list(folder.iterdir())
    assert run(command, large, folder / out, "--dtype", "fp16", "--allow-nonfinite", *more) == 0
    found = sharded_avg.load_averaged_state_dict(folder / out)
    assert torch.equal(found["b"], torch.tensor([[1.0, -INF, INF]], dtype=torch.float16))


@pytest.mark.parametrize("to", ["averaged_model", "lightning", "torch", "safetensors", "sharded_avg"])
def test_every_target_of_convert(to, large, tmp_path, capsys):
    out = tmp_path / f"out.{to}"
    assert main(["convert", str(large), str(out), "--to", to, "--dtype", "fp16"]) == 3
    assert "'b'" in capsys.readouterr().err
    assert not out.exists()


def test_several_files_leave_no_folder(large, tmp_path):
    assert main(["consolidate", str(large), str(tmp_path / "hf"), "--max-shard-size", "4", "--dtype", "fp16"]) == 3
    assert not (tmp_path / "hf").exists()


DTYPES = [
    (torch.float16, 65520.0),
    (torch.bfloat16, 3.4e38),
    (torch.float8_e4m3fn, 1e4),
    (torch.float8_e4m3fn, 466.0),
    (torch.float8_e5m2, 1e6),
    (torch.float32, 1e39),
]


@pytest.mark.parametrize(("dtype", "value"), DTYPES, ids=str)
def test_every_narrower_dtype(dtype, value, tmp_path):
    path = averaged(tmp_path / "in.pt", w=torch.tensor([0.5, value], dtype=torch.float64))
    target = Target(path=tmp_path / "x.pt", format="torch")
    with pytest.raises(CheckpointError, match=r"'w' \(1 of 2 values, the largest is"):
        consolidate(path, target, dtype=dtype)
    assert not target.path.exists()
    consolidate(averaged(path, w=torch.tensor([0.5, 2.0])), target, dtype=dtype)
    assert torch.equal(open_source(target.path).read("w").float(), torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("max_bytes", [4, 8, 1 << 20])
def test_the_largest_value_of_all_slabs(max_bytes, tmp_path, monkeypatch):
    path = averaged(tmp_path / "in.pt", w=torch.tensor([70000.0, 1.0, 90000.0, 2.0, -95000.0]))
    whole = source_.slabs
    for module in ("sharded_avg.files.sinks", "sharded_avg.files.rounded"):
        monkeypatch.setattr(f"{module}.slabs", lambda info: whole(info, max_bytes=max_bytes))
    with pytest.raises(CheckpointError, match="3 of 5 values, the largest is 95000"):
        consolidate(path, Target(path=tmp_path / "x.safetensors", format="safetensors"), dtype=torch.float16)


def test_many_tensors(tmp_path, capsys):
    path = averaged(tmp_path / "in.pt", **{f"w{i}": torch.tensor(1e6 + i) for i in range(13)})
    assert main(["consolidate", str(path), str(tmp_path / "x.pt"), "--dtype", "fp16"]) == 3
    told = capsys.readouterr().err
    assert "13 of 13 tensors would not be finite" in told
    assert "and 3 more tensors" in told


# -- what is not finite in the source ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_nan_in_the_source(command, tmp_path, capsys):
    path = averaged(tmp_path / "in.pt", w=torch.tensor([1.0, NAN]), fine=torch.ones(2))
    assert run(command, path, tmp_path / "x.safetensors") == 3
    told = capsys.readouterr().err
    assert "'w' (1 of 2 values, it is so in" in told
    assert run(command, path, tmp_path / "x.safetensors", "--allow-nonfinite") == 0
    assert sharded_avg.load_averaged_state_dict(tmp_path / "x.safetensors")["w"].isnan().tolist() == [False, True]


@pytest.mark.each_value
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("more", [[], ["--dtype", "bf16"], ["--dtype", "fp64"]], ids=str)
def test_a_mask_stays_a_mask(command, more, tmp_path, capsys):
    """An infinity that is meant is written, and told."""
    mask = torch.full((3, 3), -INF).triu(1)
    path = averaged(tmp_path / "in.pt", mask=mask, w=torch.ones(2))
    assert run(command, path, tmp_path / "x.safetensors", *more) == 0
    assert "['mask']: infinities were written as they are in the source" in capsys.readouterr().err
    assert torch.equal(sharded_avg.load_averaged_state_dict(tmp_path / "x.safetensors")["mask"].float(), mask)


def merge_of(tmp_path: Path, left: Tensor, right: Tensor, *more: str) -> int:
    paths = [str(averaged(tmp_path / f"{i}.pt", w=value)) for i, value in enumerate((left, right))]
    return main(["merge", *paths, str(tmp_path / "x.pt"), *more])


@pytest.mark.parametrize("how", [["--uniform"], ["--weights", "-2,3"], ["--weights", "3,-2"]], ids=str)
def test_a_mask_in_a_merge(how, tmp_path, capsys):
    mask = torch.tensor([0.0, -INF, INF])
    assert merge_of(tmp_path, mask, mask, *how) == 0
    assert "infinities" in capsys.readouterr().err
    assert torch.equal(open_source(tmp_path / "x.pt").read("w"), mask)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_a_merge_names_the_source_that_is_not_finite(bad, tmp_path, capsys):
    assert merge_of(tmp_path, torch.ones(2), torch.tensor([1.0, bad]), "--uniform") == 3
    assert "it is so in source 2" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()
    assert merge_of(tmp_path, torch.ones(2), torch.tensor([1.0, bad]), "--weights", "1,0") == 0, "it is not read"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.bfloat16])
def test_a_sum_beyond_what_the_sources_can_hold(dtype, tmp_path, capsys):
    """Both are finite; 3 x the one less 2 x the other is not, in the dtype that they have."""
    end = torch.finfo(dtype).max
    left, right = torch.tensor([-end, 1.0]).to(dtype), torch.tensor([end, 1.0]).to(dtype)
    assert merge_of(tmp_path, left, right, "--weights=-2,3") == 3
    assert f"'w' (1 of 2 values, the largest is {5 * end:.6g}" in capsys.readouterr().err
    if dtype != torch.bfloat16:
        assert merge_of(tmp_path, left, right, "--weights=-2,3", "--dtype", "fp32") == 0


def test_a_merge_is_rounded_once(tmp_path):
    """fp64 to fp16, not by way of fp32, where 1 + 2**-11 + 2**-26 would lose its last bit and then round to even."""
    one = torch.tensor([1 + 2**-10, 1.0], dtype=torch.float64)
    other = torch.tensor([1 + 2**-25, 1.0], dtype=torch.float64)
    assert merge_of(tmp_path, one.float(), other.float(), "--uniform", "--dtype", "fp16") == 0
    exact = (one.float().double() + other.float().double()) / 2
    assert torch.equal(open_source(tmp_path / "x.pt").read("w"), exact.to(torch.float16))


@pytest.mark.parametrize("value", [449.0, 464.0, -464.0])
def test_rounding_to_the_largest_value_loses_nothing(value, tmp_path):
    path = averaged(tmp_path / "in.pt", w=torch.tensor([value]))
    consolidate(path, Target(path=tmp_path / "x.pt", format="torch"), dtype=torch.float8_e4m3fn)
    assert open_source(tmp_path / "x.pt").read("w").float().abs() == 448


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_what_a_format_without_infinities_would_write(bad, tmp_path):
    path = averaged(tmp_path / "in.pt", w=torch.tensor([1.0, bad]))
    with pytest.raises(CheckpointError, match=r"'w' \(1 of 2 values, it is so in the source\)"):
        consolidate(path, Target(path=tmp_path / "x.pt", format="torch"), dtype=torch.float8_e4m3fn)


def test_a_sum_that_ends_where_float8_does(tmp_path, capsys):
    left, right = (torch.tensor([value, 1.0]).to(torch.float8_e4m3fn) for value in (-448.0, 448.0))
    assert merge_of(tmp_path, left, right, "--weights=-2,3") == 3
    assert "'w' (1 of 2 values, the largest is 2240, and float8_e4m3fn ends at 448)" in capsys.readouterr().err


def test_a_sum_too_large_for_what_it_is_summed_in(tmp_path, capsys):
    left, right = torch.tensor([-3e38, 1.0]), torch.tensor([3e38, 1.0])
    assert merge_of(tmp_path, left, right, "--weights=-2,3", "--accumulate", "fp32", "--dtype", "fp64") == 3
    assert "'w' (1 of 2 values, the sum is too large for float32)" in capsys.readouterr().err
    assert merge_of(tmp_path, left, right, "--weights=-2,3", "--dtype", "fp64") == 0


@pytest.mark.parametrize("left", [INF, NAN])
def test_infinities_of_a_merge_that_are_none_of_a_mask(left, tmp_path, capsys):
    """Of other signs, or in a merge of numbers that are none."""
    assert merge_of(tmp_path, torch.tensor([left]), torch.tensor([-INF]), "--uniform") == 3
    assert "it is so in source 1" in capsys.readouterr().err
    assert merge_of(tmp_path, torch.tensor([left]), torch.tensor([-INF]), "--uniform", "--allow-nonfinite") == 0


def test_complex_values(tmp_path):
    path = averaged(tmp_path / "in.pt", w=torch.tensor([1 + 1j, complex(1, NAN)]))
    with pytest.raises(CheckpointError, match="'w'"):
        consolidate(path, Target(path=tmp_path / "x.pt", format="torch"))
