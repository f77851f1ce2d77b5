"""R13: weights that nothing says are an average are not written as if they were one."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from sharded_avg import SWA, ShardedAverage
from sharded_avg.commands.cli import main
from sharded_avg.formats.open import open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def state() -> dict[str, Tensor]:
    return {"weight": torch.full((5, 3), 2.0), "bias": torch.full((5,), 7.0)}


def torch_file(folder: Path) -> Path:
    torch.save(state(), folder / "plain.pt")
    return folder / "plain.pt"


def safetensors_file(folder: Path) -> Path:
    safetensors.torch.save_file(state(), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def folder_of_safetensors(folder: Path) -> Path:
    (folder / "hf").mkdir()
    safetensors.torch.save_file(state(), folder / "hf" / "model.safetensors")
    return folder / "hf"


def dcp_folder(folder: Path) -> Path:
    dcp.save(state(), checkpoint_id=folder / "dcp")
    return folder / "dcp"


PLAIN = (torch_file, safetensors_file, folder_of_safetensors, dcp_folder)


@pytest.mark.each_value
@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("out", ["x.safetensors", "x.pt", "hf-out"])
def test_consolidate_writes_averages(plain, out, tmp_path, capsys):
    """R13: from every kind of file, into every kind; --raw writes them, and what is written is no average either."""
    path = plain(tmp_path)
    assert main(["consolidate", str(path), str(tmp_path / out)]) == 3
    told = capsys.readouterr().err
    assert "nothing in it says that they are an average" in told
    assert "--raw" in told
    assert not (tmp_path / out).exists()
    assert main(["consolidate", str(path), str(tmp_path / out), "--raw"]) == 0
    written = open_source(tmp_path / out)
    assert all(torch.equal(written.read(name), tensor) for name, tensor in state().items())
    assert "average" not in written.facts
    assert main(["consolidate", str(tmp_path / out), str(tmp_path / "again.pt")]) == 3


def test_convert_asks_what_the_weights_are(tmp_path, capsys):
    """R13: of the same kind."""
    for number, plain in enumerate(PLAIN):
        (tmp_path / str(number)).mkdir()
        assert main(["convert", str(plain(tmp_path / str(number))), str(tmp_path / "out")]) == 3
        assert "nothing in it says that they are an average" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_weights_under_one_key(tmp_path, capsys):
    """R13: who names a key has said which weights are meant."""
    torch.save({"model": state(), "optimizer": {"lr": 0.1}}, tmp_path / "run.pt")
    out = tmp_path / "x.safetensors"
    assert main(["consolidate", str(tmp_path / "run.pt"), str(out), "--name", "ema"]) == 3
    assert "no tensors under 'ema'" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path / "run.pt"), str(out), "--name", "model"]) == 0
    assert open_source(out).infos.keys() == state().keys()


def test_raw_weights_beside_an_average(tmp_path, capsys):
    """R13: a checkpoint of the user's has both, and --name says which."""
    average = ShardedAverage(nn.Linear(3, 5), SWA())
    average.update()
    dcp.save({"model": state(), "average": average}, checkpoint_id=tmp_path / "run")
    assert main(["consolidate", str(tmp_path / "run"), str(tmp_path / "raw.pt"), "--name", "model"]) == 0
    assert torch.equal(open_source(tmp_path / "raw.pt").read("weight"), state()["weight"])
    assert "average" not in open_source(tmp_path / "raw.pt").facts
    assert main(["consolidate", str(tmp_path / "run"), str(tmp_path / "x.pt"), "--name", "ema"]) == 3
    assert "holds no average 'ema' of ['average']" in capsys.readouterr().err


@pytest.fixture
def average(tmp_path: Path) -> Path:
    average = ShardedAverage(nn.Linear(3, 5), SWA())
    average.update()
    average.save(tmp_path / "average")
    return tmp_path / "average"


def test_raw_is_not_for_averages(average, tmp_path, capsys):
    assert main(["consolidate", str(average), str(tmp_path / "x.pt"), "--raw"]) == 2
    assert "holds the average 'average': without --raw it is written" in capsys.readouterr().err


def test_a_merge_of_an_average_and_plain_weights(average, tmp_path, capsys):
    """R13: of the same kind: the sum would be called an average, and one of its sources is none."""
    sources = [str(average), str(torch_file(tmp_path))]
    for order in (sources, sources[::-1]):
        assert main(["merge", *order, str(tmp_path / "x.pt"), "--uniform"]) == 3
        told = capsys.readouterr().err
        assert "plain.pt'] hold weights" in told
        assert "--raw" in told
    assert not (tmp_path / "x.pt").exists()
    assert main(["merge", *sources, str(tmp_path / "x.pt"), "--uniform", "--raw"]) == 0
