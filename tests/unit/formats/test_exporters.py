"""`sharded-avg convert`: into folders that ShardedAverage loads, and out to files that the tools themselves load."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sharded_avg import EMA, SWA, CheckpointError, ConfigError, ShardedAverage, load_averaged_state_dict
from sharded_avg.commands.cli import main
from sharded_avg.commands.convert import Conversion, read_names
from sharded_avg.formats.importers import find_importer
from tests.helpers.foreign import BUILDERS, NAMES, SHAPES, Sample, State

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


class Named(nn.Module):
    """A module whose parameters have the names and shapes of the samples."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *parents, last = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            module.register_parameter(last, nn.Parameter(torch.zeros(shape)))


class Net(nn.Module):
    """Tied weights, a frozen parameter, BatchNorm's buffers, a bf16 parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(5, 5)
        self.low = nn.Linear(5, 3, bias=False).bfloat16()
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)


def trained(num_steps: int = 3) -> tuple[Net, ShardedAverage]:
    torch.manual_seed(0)
    net = Net()
    average = ShardedAverage(net, EMA(decay=0.5))
    for _ in range(num_steps):
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        net.norm(torch.randn(7, 5))
        average.update()
    return net, average


def full(average: ShardedAverage) -> dict[str, Any]:
    with average.summon_full_params() as state:
        return {name: value.clone() for name, value in state.items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)


# -- into ours ---------------------------------------------------------------------------------------------------------


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
    assert equal({key: value.float() for key, value in full(average).items()}, expected)
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


# -- out of ours -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Net, ShardedAverage]:
    net, average = trained()
    average.save(tmp_path / "ours")
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "raw.pt")
    return net, average


def test_out_to_averaged_model(tmp_path: Path, ours: tuple[Net, ShardedAverage]) -> None:
    net, average = ours
    Conversion(src=tmp_path / "ours", out=tmp_path / "x.pt", to="averaged_model", raw=tmp_path / "raw.pt").run()
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert content["n_averaged"].dtype == torch.long
    tool = AveragedModel(Net())
    tool.load_state_dict(content)
    assert int(tool.n_averaged) == average.n_averaged == 3
    assert equal(tool.module.state_dict(), {n: v.to(net.state_dict()[n].dtype) for n, v in full(average).items()})
    source = find_importer(tmp_path / "x.pt").open()
    assert source.facts["n_averaged"] == 3
    assert source.facts["aliases"] == {"head.weight": "embed.weight"}
    assert source.infos["low.weight"].dtype == torch.float32, "the average of a bf16 parameter is not narrowed"


def test_out_and_back_is_the_same(tmp_path: Path, ours: tuple[Net, ShardedAverage]) -> None:
    net, average = ours
    Conversion(src=tmp_path / "ours", out=tmp_path / "x.ckpt", to="lightning", raw=tmp_path / "raw.pt").run()
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    Conversion(src=tmp_path / "x.ckpt", out=tmp_path / "back", to="sharded_avg", names=names).run()
    fresh = ShardedAverage(net, EMA(decay=0.5))
    fresh.load(tmp_path / "back")
    assert fresh.n_averaged == average.n_averaged
    assert equal(full(fresh), full(average))


def lightning_module() -> Any:
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module


def fit(module: Any, callback: Any, num_epochs: int, **kwargs: Any) -> Any:
    import lightning.pytorch as pl

    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        trainer = pl.Trainer(
            max_epochs=num_epochs, accelerator="cpu", callbacks=[callback], enable_checkpointing=False, **options
        )
        data = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4)
        trainer.fit(module, data, **kwargs)
    return trainer


def test_out_to_lightning(tmp_path: Path) -> None:
    """EMAWeightAveraging resumes with both copies and the count; load_from_checkpoint gives the average."""
    module_class = lightning_module()
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = module_class()
    average = ShardedAverage(module.net, EMA(decay=0.5))
    for _ in range(4):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        average.update()
    average.save(tmp_path / "ours")
    torch.save(module.state_dict(), tmp_path / "raw.pt")
    out = tmp_path / "x.ckpt"
    options = {"to": "lightning", "add_prefix": "net.", "raw": tmp_path / "raw.pt"}
    Conversion(src=tmp_path / "ours", out=out, **options).run()
    expected = {f"net.{name}": value for name, value in full(average).items()}
    assert equal(module_class.load_from_checkpoint(out, weights_only=True).state_dict(), expected)

    class Watching(EMAWeightAveraging):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.average = {name: value.clone() for name, value in self._average_model.module.state_dict().items()}
            self.raw = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.count = int(self._average_model.n_averaged)

    callback = Watching(decay=0.5)
    fit(module_class(), callback, 1, ckpt_path=str(out))
    assert equal(callback.average, expected)
    assert equal(callback.raw, module.state_dict())
    assert callback.count == 4


def saved_in_epoch_3(module: Any, callback: Any, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Train, and save in the middle of it; what the average and the raw weights were then."""
    seen: dict[str, dict[str, torch.Tensor]] = {}
    original = callback.on_train_epoch_start

    def saving(trainer: Any, pl_module: Any) -> None:
        original(trainer, pl_module)
        if trainer.current_epoch == 3:
            copy = callback._average_model
            for key, holder in (("average", getattr(copy, "module", copy)), ("raw", pl_module)):
                seen[key] = {name: value.clone() for name, value in holder.state_dict().items()}
            trainer.save_checkpoint(path)

    callback.on_train_epoch_start = saving
    fit(module, callback, 5)
    return seen


def test_lightning_wrote_it(tmp_path: Path) -> None:
    """In the middle of training, by Lightning's own callbacks, and into a ShardedAverage of the inner module."""
    module_class = lightning_module()
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    for callback, format in (
        (EMAWeightAveraging(decay=0.5), "lightning"),
        (StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1), "lightning_swa"),
    ):
        module = module_class()
        seen = saved_in_epoch_3(module, callback, tmp_path / f"{format}.ckpt")
        found = find_importer(tmp_path / f"{format}.ckpt")
        assert found.format == format
        source = found.open()
        assert equal({name: source.read(name) for name in source.infos}, seen["average"])
        assert not torch.equal(seen["average"]["net.0.weight"], seen["raw"]["net.0.weight"])
        out = tmp_path / f"{format} ours"
        Conversion(src=tmp_path / f"{format}.ckpt", out=out, to="sharded_avg", prefix="net.").run()
        average = ShardedAverage(module.net, EMA(decay=0.5))
        average.load(out)
        assert torch.equal(full(average)["0.weight"], seen["average"]["net.0.weight"])


def test_out_to_lightning_without_raw_weights(tmp_path: Path, ours: tuple[Net, ShardedAverage]) -> None:
    """Then nothing in the file claims to be raw."""
    Conversion(src=tmp_path / "ours", out=tmp_path / "x.ckpt", to="lightning").run()
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert "current_model_state" not in content
    assert "averaging_state" not in content
    assert torch.equal(content["state_dict"]["embed.weight"], full(ours[1])["embed.weight"])


def test_raw_weights_that_do_not_fit(tmp_path: Path, ours: tuple[Net, ShardedAverage]) -> None:
    def convert(raw: Any) -> None:
        torch.save(raw, tmp_path / "other.pt")
        Conversion(src=tmp_path / "ours", out=tmp_path / "x.pt", to="averaged_model", raw=tmp_path / "other.pt").run()

    state = ours[0].state_dict()
    with pytest.raises(CheckpointError, match="holds no weights with the names and shapes"):
        convert({"embed.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"holds several \(\['a\.', 'b\.'\]\) weights"):
        convert({"a": state, "b": state})
    with pytest.raises(CheckpointError, match="it is a saved average"):
        Conversion(src=tmp_path / "ours", out=tmp_path / "x.pt", to="lightning", raw=tmp_path / "ours").run()
    with pytest.raises(ConfigError, match="has no place for raw weights"):
        Conversion(src=tmp_path / "ours", out=tmp_path / "x", to="safetensors", raw=tmp_path / "raw.pt")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_out_to_plain_files(to: str, tmp_path: Path, ours: tuple[Net, ShardedAverage]) -> None:
    out = tmp_path / ("x.safetensors" if to == "safetensors" else "x.pt")
    Conversion(src=tmp_path / "ours", out=out, to=to, dtype=torch.bfloat16).run()
    content = load_file(out) if to == "safetensors" else torch.load(out, weights_only=True)
    assert {value.dtype for value in content.values()} == {torch.bfloat16}
    assert equal(load_averaged_state_dict(out), content)


@pytest.mark.parametrize("options", [{"to": "nonsense"}, {"to": "torch", "n_averaged": 0}])
def test_what_cannot_be_asked(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Conversion(src=tmp_path / "a", out=tmp_path / "b", **options)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from sharded_avg.commands.convert import Conversion
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Conversion(src=Path(sys.argv[1]), out=Path(sys.argv[2]), to=sys.argv[3]).run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("to", ["sharded_avg", "averaged_model"])
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
