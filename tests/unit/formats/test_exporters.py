"""Our averages out to files that the tools themselves load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sharded_avg import EMA, CheckpointError, ConfigError, ShardedAverage, load_averaged_state_dict
from sharded_avg.commands.conversion import Conversion
from sharded_avg.formats.importers import find_importer
from tests.unit.formats.models import Net, equal, full, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


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


def has_a_function_in_its_state() -> bool:
    """Older torch: SWALR keeps a static method, for which a pickle asks with `getattr`: a file with foreign objects."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return "anneal_func" in torch.optim.swa_utils.SWALR(optimizer, 0.1).state_dict()


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
        foreign = format == "lightning_swa" and has_a_function_in_its_state()
        found = find_importer(tmp_path / f"{format}.ckpt", ignore_classes=foreign)
        assert found.format == format
        source = found.open()
        assert equal({name: source.read(name) for name in source.infos}, seen["average"])
        assert not torch.equal(seen["average"]["net.0.weight"], seen["raw"]["net.0.weight"])
        out = tmp_path / f"{format} ours"
        source_file = tmp_path / f"{format}.ckpt"
        Conversion(src=source_file, out=out, to="sharded_avg", prefix="net.", ignore_classes=foreign).run()
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
