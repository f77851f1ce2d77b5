"""The commands and files that somebody made to harm: refused, and nothing is left."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from sharded_avg.commands.cli import main
from tests.unit.files.hostile import Payload, make, place_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make(tmp_path / "average")


def test_commands_refuse_and_leave_nothing(saved, tmp_path, capsys):
    canary = tmp_path / "canary"
    (saved / ".metadata").write_bytes(pickle.dumps(Payload(canary, "os.system")))
    out = tmp_path / "out"
    out.mkdir()
    for command in (
        ["inspect", str(saved)],
        ["consolidate", str(saved), str(out / "x.safetensors")],
        ["consolidate", str(saved), str(out / "x.pt")],
        ["merge", str(saved), str(saved), str(out / "x"), "--uniform"],
    ):
        assert main(command) == 3
        assert "nothing in it was run" in capsys.readouterr().err
    assert not list(out.iterdir())
    assert not canary.exists(), "something in the file was run"


def test_a_damaged_tensor_is_noticed_while_writing(saved, tmp_path):
    """Checksums are looked at when the bytes are read: by then, the target has been begun."""
    index = pickle.loads((saved / ".metadata").read_bytes())
    place = place_of(index, "average.b")
    file = saved / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    begin = data.index(b"PK\x01\x02", place.offset)  # of the directory; the tensor's bytes lie before it
    torch.manual_seed(0)
    value = torch.randn(5, 3), torch.randn(7)
    at = data.index(value[1].numpy().tobytes(), place.offset, begin)
    data[at + 5] ^= 4
    file.write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.safetensors", "x.pt", "folder"):
        assert main(["consolidate", str(saved), str(out / name)]) == 3
    assert main(["merge", str(saved), str(out / "merged"), "--uniform"]) == 3
    assert [path for path in out.rglob("*") if path.is_file()] == []


def test_terminal_escapes_in_names_are_not_printed(tmp_path, capsys):
    torch.save({"\x1b[2Jname": torch.ones(2)}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt"), "--tensors"]) == 0
    assert "\x1b" not in capsys.readouterr().out
