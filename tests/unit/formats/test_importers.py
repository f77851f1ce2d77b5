"""Averages of other tools: each sample is claimed by one importer, and what comes out is the average, not the raw."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharded_avg import CheckpointError, ConfigError
from sharded_avg.formats.importers import IMPORTERS, find_importer
from sharded_avg.formats.importers.opened import open_content
from tests.helpers.foreign import (
    AVERAGE,
    BUILDERS,
    NAMES,
    RAW,
    SHAPES,
    Sample,
    composer,
    composer_ema,
    prefixed,
    pretrained,
    saved,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def check(sample: Sample, format: str, forced: str | None = None) -> None:
    found = find_importer(sample.path, forced)
    assert found is not None
    assert found.format == format
    source = found.open(NAMES if sample.needs_names else None)
    assert set(source.infos) == set(sample.average)
    for name, expected in sample.average.items():
        value = source.read(name)
        assert (source.infos[name].shape, source.infos[name].dtype) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(value, expected)
        assert name not in RAW or not torch.equal(value, RAW[name].to(value.dtype))
    assert source.facts["format"] == format
    assert {key: source.facts[key] for key in sample.facts} == sample.facts


@pytest.mark.parametrize("name", BUILDERS)
def test_sample(name: str, tmp_path: Path) -> None:
    format, build = BUILDERS[name]
    sample = build(tmp_path)
    check(sample, format)
    check(sample, format, forced=format)


@pytest.mark.parametrize("name", BUILDERS)
def test_one_importer_claims_it(name: str, tmp_path: Path) -> None:
    format, build = BUILDERS[name]
    content = open_content(build(tmp_path).path)
    assert content is not None
    assert [importer.format for importer in IMPORTERS if importer.claims(content)] == [format]


def test_every_importer_has_a_sample() -> None:
    formats = [importer.format for importer in IMPORTERS]
    assert len(formats) == len(set(formats))
    assert set(formats) == {format for format, _ in BUILDERS.values()}
    documented = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    assert not [format for format in formats if f"`{format}`" not in documented]


NOT_AVERAGES = {
    "state dict": RAW,
    "Lightning": {"state_dict": RAW, "callbacks": {"ModelCheckpoint": {}}, "optimizer_states": [{"state": {}}]},
    "Lightning, only weights of an average": {"state_dict": RAW, "pytorch-lightning_version": "2.6.0"},
    "NeMo's file of raw weights": {"state_dict": RAW, "optimizer_states": [{"state": {}, "param_groups": []}]},
    "a model with a submodule called ema": prefixed("ema.", RAW),
    "a model with a submodule called teacher": {"model": prefixed("teacher.", RAW)},
    "an entry that holds more than a state dict": {"model": RAW, "ema": {"decay": 0.9, **RAW}},
    "a student and its teacher, which is another model": {"student": RAW, "teacher": AVERAGE, "optimizer": {}},
    "a list": [1, 2],
}


@pytest.mark.parametrize("name", NOT_AVERAGES)
def test_raw_weights_are_not_claimed(name: str, tmp_path: Path) -> None:
    torch.save(NOT_AVERAGES[name], tmp_path / "file.pt")
    assert find_importer(tmp_path / "file.pt") is None


def test_names_of_folders_are_no_witness(tmp_path: Path) -> None:
    """A run called x_ema holds raw weights; ema.pt may be one rank's shard (defect 20); a model folder is a model."""
    run = pretrained(tmp_path / "run_ema", {}, RAW)
    assert find_importer(run) is None
    assert find_importer(run / "diffusion_pytorch_model.safetensors") is None
    torch.save(RAW, tmp_path / "ema.pt")
    assert find_importer(tmp_path / "ema.pt") is None
    with pytest.raises(CheckpointError, match=r"may be one rank's shard"):
        find_importer(tmp_path / "ema.pt", "ema_file").open()
    (tmp_path / "empty").mkdir()
    assert find_importer(tmp_path / "empty") is None


NOT_STARTED = {
    "averaged_model": {"n_averaged": torch.tensor(0), **prefixed("module.", RAW)},
    "lightning": {
        "state_dict": RAW,
        "current_model_state": RAW,
        "averaging_state": {"n_averaged": torch.tensor(0)},
    },
    "lightning_swa": {
        "state_dict": RAW,
        "callbacks": {"StochasticWeightAveraging": {"n_averaged": 0, "average_model_state": RAW}},
    },
    "ema_pytorch": {"initted": torch.tensor(False), "step": torch.tensor(0), **prefixed("ema_model.", RAW)},
    "mmengine": {"state_dict": RAW, "ema_state_dict": {"steps": torch.tensor(0), **prefixed("module.", RAW)}},
    "torch_ema": {"decay": 0.9, "num_updates": 0, "shadow_params": list(RAW.values()), "collected_params": None},
    "composer": composer(RAW, composer_ema(RAW, active=False, started=False)),
}


@pytest.mark.parametrize("format", NOT_STARTED)
def test_before_the_first_update_there_is_no_average(format: str, tmp_path: Path) -> None:
    """P03: what is in its place are the weights that training began with."""
    torch.save(NOT_STARTED[format], tmp_path / "file.pt")
    found = find_importer(tmp_path / "file.pt")
    assert found is not None
    assert found.format == format
    with pytest.raises(CheckpointError, match="no update has gone into its average"):
        found.open(NAMES)


def test_swa_callback_before_it_has_a_model(tmp_path: Path) -> None:
    callbacks = {"StochasticWeightAveraging": {"n_averaged": 1, "average_model_state": None}}
    torch.save({"state_dict": RAW, "callbacks": callbacks}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="holds no tensors where lightning_swa keeps the average"):
        find_importer(tmp_path / "file.pt").open()


def test_several_formats_in_one_file(tmp_path: Path) -> None:
    torch.save({"state_dict": RAW, "state_dict_ema": AVERAGE, "ema": AVERAGE}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"\['timm', 'ema_entry'\].*--from"):
        find_importer(tmp_path / "file.pt")
    check(Sample(tmp_path / "file.pt"), "timm", forced="timm")
    with pytest.raises(ConfigError, match="format='nonsense'"):
        find_importer(tmp_path / "file.pt", "nonsense")


@pytest.mark.parametrize("name", NOT_AVERAGES)
def test_a_forced_format_does_not_invent(name: str, tmp_path: Path) -> None:
    torch.save(NOT_AVERAGES[name], tmp_path / "file.pt")
    for importer in IMPORTERS:
        if "teacher" in name and importer.format in ("dino", "dinov3"):
            continue  # where somebody says that it is DINO's, the teacher is the average
        with pytest.raises(CheckpointError):
            find_importer(tmp_path / "file.pt", importer.format).open(NAMES)


def test_two_averaged_models(tmp_path: Path) -> None:
    one = {"n_averaged": torch.tensor(1), **prefixed("module.", RAW)}
    torch.save({"a": one, "b": one}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"2 AveragedModels \['a\.', 'b\.'\]"):
        find_importer(tmp_path / "file.pt", "averaged_model").open()


# -- numbered tensors ----------------------------------------------------------------------------------------------


def numbered(tmp_path: Path) -> Path:
    return BUILDERS["torch_ema"][1](tmp_path).path


def test_numbered_tensors_need_names(tmp_path: Path) -> None:
    found = find_importer(numbered(tmp_path))
    with pytest.raises(CheckpointError, match=r"4 averaged tensors .* Give the names: --names FILE"):
        found.open()
    with pytest.raises(CheckpointError, match="4 averaged tensors, and 3 names"):
        found.open(NAMES[:3])
    with pytest.raises(CheckpointError, match=r"4 names were given \(3 different\)"):
        found.open([*NAMES[:3], NAMES[0]])


def test_given_shapes_are_checked(tmp_path: Path) -> None:
    found = find_importer(numbered(tmp_path))
    assert set(found.open(SHAPES).infos) == set(SHAPES)
    with pytest.raises(CheckpointError, match=r"'net\.0\.bias' has shape \[5\], and the tensor in its place \[5, 3\]"):
        found.open({name: SHAPES[name] for name in ["net.0.bias", "net.0.weight", "net.1.scale", "head.weight"]})


# -- names without dots --------------------------------------------------------------------------------------------


def lit_ema(tmp_path: Path, raw: dict[str, torch.Tensor], ema: dict[str, torch.Tensor]) -> Path:
    counts = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(-1)}
    torch.save({"state_dict": {**raw, **prefixed("model_ema.", ema), **counts}}, tmp_path / "file.ckpt")
    return tmp_path / "file.ckpt"


def test_lit_ema_of_the_whole_module_that_does_not_count(tmp_path: Path) -> None:
    path = lit_ema(tmp_path, RAW, {name.replace(".", ""): value for name, value in AVERAGE.items()})
    source = find_importer(path).open()
    assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)
    assert "n_averaged" not in source.facts


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model.a.bc": torch.zeros(2), "model.ab.c": torch.zeros(2)}, "or more than one each"),
        ({"model.a.bd": torch.zeros(2)}, "match no parameters"),
        ({"model.a.bc": torch.zeros(3)}, "match no parameters"),
        ({"model.a.bc": torch.zeros(2), "other.a.bc": torch.zeros(2)}, "match 2 submodules"),
    ],
)
def test_ambiguous_names_are_refused(raw: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_importer(lit_ema(tmp_path, raw, {"abc": torch.ones(2)})).open()


# -- files -----------------------------------------------------------------------------------------------------------


def test_foreign_classes_are_refused_and_can_be_left_out(tmp_path: Path) -> None:
    torch.save({"state_dict": RAW, "state_dict_ema": AVERAGE, "args": argparse.Namespace(lr=0.1)}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*--ignore-classes"):
        find_importer(tmp_path / "f.pt")
    source = find_importer(tmp_path / "f.pt", ignore_classes=True).open()
    assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("ignore_classes", [False, True])
def test_nothing_in_a_file_runs(ignore_classes: bool, tmp_path: Path) -> None:
    hostile = Hostile()
    hostile.target = tmp_path / "made by the file"
    torch.save({"model": RAW, "ema": AVERAGE, "x": hostile}, tmp_path / "f.pt")
    if ignore_classes:
        source = find_importer(tmp_path / "f.pt", ignore_classes=True).open()
        assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)
    else:
        with pytest.raises(CheckpointError, match=r"mkdir.*--ignore-classes"):
            find_importer(tmp_path / "f.pt")
    assert not hostile.target.exists()


def test_a_pickled_module_is_no_state_dict(tmp_path: Path) -> None:
    """YOLOv5 and Ultralytics keep the average as a module: its tensors have no keys to read them by."""
    torch.save({"model": None, "ema": nn.Linear(3, 2), "updates": 5}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        find_importer(tmp_path / "best.pt")
    assert find_importer(tmp_path / "best.pt", ignore_classes=True) is None


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_cut_short(keep: float, tmp_path: Path) -> None:
    path = BUILDERS["averaged_model"][1](tmp_path).path
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError):
        find_importer(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_importer(tmp_path / "nothing")


def test_keys_that_read_alike(tmp_path: Path) -> None:
    torch.save({"ema.net": torch.zeros(1), "ema": {"net": torch.ones(1)}}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="keys with dots"):
        find_importer(tmp_path / "f.pt")


def test_two_names_that_are_one_without_wrappers(tmp_path: Path) -> None:
    values = {"module.a": torch.zeros(1), "module._orig_mod.a": torch.zeros(1), "n_averaged": torch.tensor(1)}
    torch.save(values, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="two tensors have the same name"):
        find_importer(tmp_path / "f.pt").open()


def test_tied_names(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    other = tied[1:]
    values = {"module.embed": tied, "module.head": tied, "module.row": other, "n_averaged": torch.tensor(1)}
    torch.save(values, tmp_path / "f.pt")
    assert find_importer(tmp_path / "f.pt").open().facts["aliases"] == {"head": "embed"}


def test_a_file_of_ours_is_not_foreign(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    save_file(AVERAGE, tmp_path / "ema.safetensors")
    assert find_importer(tmp_path) is None


# -- the tools themselves, where they are installed --------------------------------------------------------------------


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


NONSENSE: list[object] = ["x", None, float("nan"), float("inf"), -3, torch.zeros(2), {}, torch.tensor(float("nan"))]


@pytest.mark.parametrize("value", NONSENSE, ids=str)
def test_nonsense_in_the_place_of_numbers(value: object, tmp_path: Path) -> None:
    """An average or a clear error, and no other exception."""
    ema = {"decay": value, "num_updates": value, "shadow_params": list(AVERAGE.values()), "collected_params": None}
    optimizer = {
        "opt": {},
        "ema": list(AVERAGE.values()),
        "current_step": value,
        "decay": value,
        "every_n_steps": value,
    }
    contents: list[dict[str, object]] = [
        {"n_averaged": value, **prefixed("module.", AVERAGE)},
        {
            "state_dict": AVERAGE,
            "current_model_state": RAW,
            "averaging_state": {"n_averaged": value},
            "global_step": value,
        },
        {"state_dict": AVERAGE, "optimizer_states": [optimizer]},
        {"initted": value, "step": value, **prefixed("ema_model.", AVERAGE)},
        ema,
        {"state_dict": AVERAGE, "ema_state_dict": {"steps": value, **prefixed("module.", RAW)}, "meta": value},
        {"ema": AVERAGE, "step": value},
    ]
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"{number}.pt")
        try:
            source = find_importer(tmp_path / f"{number}.pt").open(NAMES)
        except CheckpointError:
            continue
        assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)
        assert all(isinstance(source.facts.get(key, 0), int) for key in ("n_averaged", "step"))


def test_composer_that_does_not_say_which_is_active(tmp_path: Path) -> None:
    algorithms = composer_ema(AVERAGE, active=False)
    del algorithms[0][1]["ema_weights_active"]
    torch.save(composer(RAW, algorithms), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="does not say which weights are the average"):
        find_importer(tmp_path / "file.pt").open()
