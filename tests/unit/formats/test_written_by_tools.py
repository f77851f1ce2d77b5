"""Files that the tools themselves wrote, where they are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sharded_avg.formats.importers import find_importer
from tests.helpers.foreign import (
    Sample,
    saved,
)
from tests.unit.formats.checking import check

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 7, bias=False))


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def parameters_differ(average: dict[str, torch.Tensor], model: nn.Module) -> bool:
    return all(not torch.equal(average[name], value) for name, value in model.named_parameters() if name in average)


def test_torch_wrote_it(tmp_path: Path) -> None:
    model = small()
    tool = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        moved(model)
        tool.update_parameters(model)
    check(saved(tmp_path, tool.state_dict(), average=copied(tool.module), facts={"n_averaged": 3}), "averaged_model")
    assert parameters_differ(copied(tool.module), model)


@pytest.mark.parametrize("online", [True, False])
def test_ema_pytorch_wrote_it(online: bool, tmp_path: Path) -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = small()
    tool = ema_pytorch.EMA(model, beta=0.9, update_after_step=0, update_every=1, include_online_model=online)
    for _ in range(4):
        moved(model)
        tool.update()
    content = {"model": model.state_dict(), "ema": tool.state_dict()}
    check(saved(tmp_path, content, average=copied(tool.ema_model), facts={"step": 4}), "ema_pytorch")
    assert parameters_differ(copied(tool.ema_model), model)


def test_ema_pytorch_wrote_it_post_hoc(tmp_path: Path) -> None:
    """Defect 24: the snapshots are fp16; they stay it, visibly, until someone asks for another dtype."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = small()
    options = {"update_every": 1, "checkpoint_every_num_steps": 3, "checkpoint_folder": str(tmp_path)}
    tool = ema_pytorch.PostHocEMA(model, sigma_rels=(0.05, 0.28), **options)
    for _ in range(3):
        moved(model)
        tool.update()
    average = {name: value.half() for name, value in copied(tool.ema_models[1].ema_model).items()}
    check(Sample(tmp_path / "1.3.pt", average=average, facts={"step": 3}), "ema_pytorch")


def test_torch_ema_wrote_it(tmp_path: Path) -> None:
    torch_ema = pytest.importorskip("torch_ema")
    model = small()
    tool = torch_ema.ExponentialMovingAverage(model.parameters(), 0.9)
    for _ in range(3):
        moved(model)
        tool.update()
    names = [name for name, _ in model.named_parameters()]
    for swapped in (False, True):
        if swapped:
            tool.store()
        torch.save(tool.state_dict(), tmp_path / "f.pt")
        source = find_importer(tmp_path / "f.pt").open(names)
        for name, expected in zip(names, tool.shadow_params, strict=True):
            assert torch.equal(source.read(name), expected)


def test_diffusers_wrote_it(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.training_utils import EMAModel

    class Small(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 5) -> None:
            super().__init__()
            self.net = nn.Linear(3, width)

    model = Small()
    tool = EMAModel(model.parameters(), decay=0.9, model_cls=Small, model_config=model.config)
    for _ in range(3):
        moved(model)
        tool.step(model.parameters())
    tool.save_pretrained(str(tmp_path / "net_ema"))
    average = dict(zip((n for n, _ in model.named_parameters()), tool.shadow_params, strict=True))
    check(Sample(tmp_path / "net_ema", average=average, facts={"step": 3}), "diffusers")


def test_timm_wrote_it(tmp_path: Path) -> None:
    timm_utils = pytest.importorskip("timm.utils")
    model = small()
    tool = timm_utils.ModelEmaV3(model, decay=0.9)
    for step in range(3):
        moved(model)
        tool.update(model, step=step + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    timm_utils.CheckpointSaver(model, optimizer, model_ema=tool, **folders).save_checkpoint(0, metric=1.0)
    check(Sample(tmp_path / "last.pth.tar", average=copied(tool.module)), "timm")


def test_composer_wrote_it(tmp_path: Path) -> None:
    """Its EMA is swapped in when it is saved; frozen parameters are in the file, and no part of the average."""
    pytest.importorskip("composer", exc_type=ImportError)
    from composer import Trainer
    from composer.algorithms import EMA
    from composer.models import ComposerModel
    from torch.utils.data import DataLoader

    class Small(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.frozen = small(), nn.Linear(2, 3).requires_grad_(False)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(batch)
            return out

        def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            return outputs.square().mean()

    model, tool = Small(), EMA(half_life="50ba")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    loader: DataLoader[torch.Tensor] = DataLoader(torch.randn(20, 3), batch_size=5)  # type: ignore[arg-type]
    options = {"device": "cpu", "progress_bar": False, "save_folder": str(tmp_path), "save_filename": "ep{epoch}.pt"}
    Trainer(
        model=model, train_dataloader=loader, max_duration="2ep", optimizers=optimizer, algorithms=tool, **options
    ).fit()
    assert tool.ema_weights_active  # since the checkpoint: what the algorithm then holds is raw
    found = find_importer(tmp_path / "ep2.pt", ignore_classes=True)
    assert found is not None
    source = found.open()
    assert source.facts["step"] == 8
    assert set(source.facts["averaged"]) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name in source.facts["averaged"]:
        assert torch.equal(source.read(name), model.state_dict()[name])
        assert not torch.equal(source.read(name), tool.ema_model.named_parameters_dict[name])
