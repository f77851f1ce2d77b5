"""`sharded-avg convert`: averages of other tools into folders that ShardedAverage loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sharded_avg import EMA, SWA, CheckpointError, ConfigError, ShardedAverage, load_averaged_state_dict
from sharded_avg.commands.cli import main
from sharded_avg.commands.conversion import Conversion, read_names
from tests.helpers.foreign import BUILDERS, NAMES, SHAPES, Sample, State, composer, composer_ema
from tests.helpers.further import further
from tests.unit.formats.models import Named, Net, equal, full

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@pytest.mark.parametrize("name", BUILDERS)
def test_into_a_folder_that_loads(name: str, tmp_path: Path) -> None:
    """Every format, into a ShardedAverage on a plain model, which then goes on."""
    (tmp_path / "theirs").mkdir()
    sample = BUILDERS[name][1](tmp_path / "theirs")
    prefix = "model." if BUILDERS[name][0] == "lit_ema" else ""
    names = NAMES if sample.needs_names else None
    Conversion(src=sample.path, out=tmp_path / "ours", to="sharded_avg", names=names, prefix=prefix).run()
    average = ShardedAverage(Named(), EMA(decay=0.5))
    average.load(tmp_path / "ours")
    assert average.n_averaged == sample.facts.get("n_averaged", 1)
    expected: State = {key.removeprefix(prefix): value.float() for key, value in sample.average.items()}
    parameters = {key: value for key, value in expected.items() if key in SHAPES}  # buffers lie beside the average
    assert equal({key: value.float() for key, value in full(average).items()}, parameters)
    loaded = load_averaged_state_dict(tmp_path / "ours")
    assert equal(loaded, {key.removeprefix(prefix): value for key, value in sample.average.items()})
    assert average.update()


def test_dtypes_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Defects 23 and 24: an fp16 average stays fp16, an fp32 one fp32, and inspect says which; --dtype is a request."""
    source = BUILDERS["ema_pytorch, post hoc: all in fp16"][1](tmp_path).path
    assert main(["convert", str(source), str(tmp_path / "kept")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dtypes"], told["n_averaged"]) == (["float16"], 1)
    assert main(["inspect", str(tmp_path / "kept")]) == 0
    assert "float16" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "wide"), "--dtype", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["dtypes"] == ["float32"]
    wide = load_averaged_state_dict(tmp_path / "wide")
    kept = load_averaged_state_dict(tmp_path / "kept")
    assert equal(wide, {name: value.float() for name, value in kept.items()})


def test_an_average_that_would_be_rounded_is_refused(tmp_path: Path) -> None:
    """Defect 23."""
    source = BUILDERS["averaged_model"][1](tmp_path).path
    Conversion(src=source, out=tmp_path / "ours", to="sharded_avg").run()
    average = ShardedAverage(Named().bfloat16(), EMA(decay=0.5), dtype=None)
    with pytest.raises(CheckpointError, match="would be rounded to bfloat16"):
        average.load(tmp_path / "ours")


def averaged_model(net: nn.Module, num_steps: int = 3) -> AveragedModel:
    tool = AveragedModel(net, use_buffers=False)
    for _ in range(num_steps):
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        tool.update_parameters(net)
    return tool


def test_ties_buffers_and_frozen_parameters(tmp_path: Path) -> None:
    """Buffers lie beside the average: load has no use for them, and the full state is strict all the same."""
    torch.manual_seed(0)
    net = Net()
    tool = averaged_model(net)
    torch.save(tool.state_dict(), tmp_path / "tool.pt")
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    Conversion(src=tmp_path / "tool.pt", out=tmp_path / "ours", to="sharded_avg", names=names).run()
    average = ShardedAverage(net, SWA())
    average.load(tmp_path / "ours")
    assert average.n_averaged == 3
    expected = tool.module.state_dict()
    found = full(average)
    assert all(torch.equal(found[name], expected[name].float()) for name in names)
    assert torch.equal(found["head.weight"], expected["embed.weight"])
    loaded = load_averaged_state_dict(tmp_path / "ours")
    assert loaded["head.weight"] is loaded["embed.weight"]
    fresh = Net()
    fresh.load_state_dict(loaded)
    assert equal(fresh.state_dict(), expected)


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("active", [True, False])
def test_composers_file_names_what_is_averaged(active: bool, wrapper: str, tmp_path: Path) -> None:
    """Its EMA lists the trained parameters: frozen ones, which are in `state["model"]`, are not taken for averages.

    Under DDP the names in its lists begin with `module.`, and those in `state["model"]` do not.
    """
    torch.manual_seed(0)
    net = nn.ModuleDict({"trained": nn.Linear(3, 5), "norm": nn.BatchNorm1d(5), "frozen": nn.Linear(5, 7)})
    net["frozen"].requires_grad_(False)
    average = {name: torch.randn(p.shape) for name, p in net.named_parameters() if p.requires_grad}
    buffers = {name: value.clone() + 1 for name, value in net.named_buffers()}
    raw = {name: value.clone() for name, value in net.state_dict().items()}
    swapped = {**raw, **average, **buffers}
    in_model, in_algorithm = (swapped, raw) if active else (raw, swapped)
    ema = composer_ema({wrapper + name: in_algorithm[name] for name in average}, active=active)
    ema[0][1]["ema_model"]["named_buffers_dict"] = {wrapper + name: in_algorithm[name] for name in buffers}
    torch.save(composer(in_model, ema), tmp_path / "ep1.pt")
    Conversion(src=tmp_path / "ep1.pt", out=tmp_path / "ours", to="sharded_avg").run()
    own = ShardedAverage(net, EMA(decay=0.5))
    own.load(tmp_path / "ours")
    with own.swapped():
        assert all(torch.equal(p, average[name]) for name, p in net.named_parameters() if p.requires_grad)
    loaded = load_averaged_state_dict(tmp_path / "ours")
    assert all(torch.equal(loaded[name], value) for name, value in (average | buffers).items())


def test_without_names_the_statistics_of_batch_norm_are_buffers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    tool = averaged_model(net)
    torch.save(tool.state_dict(), tmp_path / "tool.pt")
    Conversion(src=tmp_path / "tool.pt", out=tmp_path / "ours", to="sharded_avg").run()
    ShardedAverage(net, SWA()).load(tmp_path / "ours")
    fresh = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    fresh.load_state_dict(load_averaged_state_dict(tmp_path / "ours"))
    assert equal(fresh.state_dict(), tool.module.state_dict())


def test_counts_go_on(tmp_path: Path) -> None:
    """An equal-weight mean converted after 3 updates and continued for 2 is the mean of 5."""
    torch.manual_seed(0)
    net = nn.Linear(3, 5)
    tool = averaged_model(net)
    torch.save(tool.state_dict(), tmp_path / "tool.pt")
    Conversion(src=tmp_path / "tool.pt", out=tmp_path / "ours", to="sharded_avg").run()
    average = ShardedAverage(net, SWA())
    average.load(tmp_path / "ours")
    for _ in range(2):
        with torch.no_grad():
            net.weight.add_(1.0)
        tool.update_parameters(net)
        average.update()
    assert average.n_averaged == int(tool.n_averaged) == 5
    torch.testing.assert_close(full(average)["weight"], tool.module.weight.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("given", "expected", "how"), [(None, 1, "not recorded"), (40, 40, "given")])
def test_unknown_counts(
    given: int | None, expected: int, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = BUILDERS["timm"][1](tmp_path).path
    extra = [] if given is None else ["--n-averaged", str(given)]
    assert main(["convert", str(source), str(tmp_path / "ours"), *extra]) == 0
    assert ("give --n-averaged" in capsys.readouterr().err) == (given is None)
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert manifest["averages"]["average"]["n_averaged"] == expected
    assert manifest["provenance"]["n_averaged"].startswith(how)
    assert manifest["provenance"]["format"] == "timm"


def test_names_of_the_model_alone(tmp_path: Path) -> None:
    source = BUILDERS["lit_ema"][1](tmp_path).path
    with pytest.raises(ConfigError, match=r"prefix='modle\.': no name begins with it"):
        Conversion(src=source, out=tmp_path / "ours", to="sharded_avg", prefix="modle.").run()
    written = Conversion(src=source, out=tmp_path / "x.safetensors", to="safetensors", prefix="model.").run()
    assert set(written.infos) == set(SHAPES)
    assert set(load_file(tmp_path / "x.safetensors")) == set(SHAPES)


def test_an_existing_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    source = BUILDERS["averaged_model"][1](tmp_path).path
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no saved average"):
        Conversion(src=source, out=tmp_path / "mine", to="sharded_avg").run()
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("text", ["a\n\nb \n", '["a", "b"]', '{"a": [1], "b": [2, 3]}'])
def test_files_of_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(text)
    assert list(read_names(tmp_path / "names")) == ["a", "b"]


@pytest.mark.parametrize("text", ["[1]", '{"a": 3}', '["a"', "\xff"])
def test_files_that_are_no_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(text.encode("latin-1"))
    with pytest.raises((ConfigError, CheckpointError)):
        read_names(tmp_path / "names")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_names(tmp_path / "nothing")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(BUILDERS["torch_ema"][1](tmp_path).path)
    assert main(["convert", source, str(tmp_path / "ours")]) == 3
    assert "--names FILE" in capsys.readouterr().err
    (tmp_path / "names.json").write_text(json.dumps({name: list(shape) for name, shape in SHAPES.items()}))
    assert main(["convert", source, str(tmp_path / "ours"), "--names", str(tmp_path / "names.json")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["from"], told["to"], told["n_averaged"], told["tensors"]) == ("torch_ema", "sharded_avg", 3, 4)
    assert main(["convert", source, str(tmp_path / "x.pt")]) == 2
    assert "say --to averaged_model" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "ours" / "x"), "--to", "torch"]) == 2
    torch.save({"a": torch.zeros(2)}, tmp_path / "raw.pt")
    assert main(["convert", str(tmp_path / "raw.pt"), str(tmp_path / "other")]) == 3
    assert "nothing in it says that they are an average" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [{"to": "nonsense"}, {"to": "torch", "n_averaged": 0}])
def test_what_cannot_be_asked(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Conversion(src=tmp_path / "a", out=tmp_path / "b", **options)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from sharded_avg.commands.conversion import Conversion
from tests.helpers.further import further
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Conversion(src=Path(sys.argv[1]), out=Path(sys.argv[2]), to=sys.argv[3]).run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("to", ["sharded_avg", further("averaged_model")])
def test_memory_is_that_of_slabs(to: str, tmp_path: Path) -> None:
    """512 MiB of weights in two tensors pass through, in less than half of that beside what importing torch takes."""
    values = {"n_averaged": torch.tensor(1), "module.a": torch.zeros(64 << 20), "module.b": torch.zeros(64 << 20)}
    torch.save(values, tmp_path / "big.pt")
    del values
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "big.pt"), str(tmp_path / "out.pt"), to]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 256 << 10, f"{done.stdout} KiB"


def test_a_sample_is_of_the_named_model() -> None:
    assert {name: tuple(p.shape) for name, p in Named().named_parameters()} == SHAPES
    assert isinstance(next(iter(BUILDERS.values()))[1], object)
    assert Sample(Path()).average.keys() == SHAPES.keys()
